"""What a search came to, gathered for the report and the console."""

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meme_nas.trial_log import TrialRecord


@dataclass(frozen=True)
class Rescored:
    """A trial scored again in ways the search has not seen: a finalist at proxy length with other sampling noise, what is audited
    after longer training with several seeds."""

    trial: TrialRecord
    scores: tuple[float, ...]
    """FID or KID, one a sampling seed of a finalist, one a training seed in the audit."""
    samples: int | None = None
    """Images behind each score; None: as many as in the search."""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores)

    @property
    def deviation(self) -> float:
        """Sample standard deviation over the seeds; 0 for a single seed."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else 0.0


@dataclass(frozen=True)
class Agreement:
    """How well one signal of the search ranks configurations as the longer training does."""

    signal: str
    tau: float
    low: float
    """2.5th percentile over bootstrap samples of the configurations."""
    high: float
    count: int


@dataclass(frozen=True)
class Frame:
    """Some images on their way from noise to data."""

    expert: int
    """Whose step left them so; 0: nobody's, it is the noise."""
    timestep: int
    """The noise level they are at; 0: they are done."""
    png: bytes
    """The images beneath each other; the same ones in every frame."""


@dataclass(frozen=True)
class Spectrum:
    """Relative log amplitude by frequency of what an expert's last stage puts out."""

    expert: int
    timestep: int
    """The middle of its interval, at which it was asked."""
    frequencies: tuple[float, ...]
    """In units of pi."""
    relative_log_amplitude: tuple[float, ...]


@dataclass(frozen=True)
class Portrait:
    """How one trial's images come about."""

    trial: TrialRecord
    film: tuple[Frame, ...]
    """In the order of denoising."""
    spectra: tuple[Spectrum, ...]
    """One an expert."""


@dataclass(frozen=True)
class Summary:
    """One study, as a person is shown it."""

    title: str
    folder: Path
    trials: list[TrialRecord]
    winner: TrialRecord | None
    """The best of the searched at no more MACs than the hand-made pattern."""
    finalists: list[Rescored] = field(default_factory=list)
    """Winner and yardsticks scored again; empty while the search runs."""
    importance: dict[str, float] = field(default_factory=dict)
    """Share of the first objective's variation that each choice explains, by Optuna; empty while there are too few trials."""
    facts: dict[str, str] = field(default_factory=dict)
    """What a reader must know beside the scores: command, data, feature space, samples, proxy length, versions, hardware."""
    audited: list[Rescored] = field(default_factory=list)
    """Configurations trained longer, with several seeds; empty without an audit."""
    agreements: list[Agreement] = field(default_factory=list)
    """How well what the search knew ranks them as that did, its score first; empty where there are too few."""
    portraits: list[Portrait] = field(default_factory=list)
    """Of the winner and the hand-made pattern; while the search runs, where that takes a moment."""
    metric: str = "fid"
    """What is minimised first, fid or kid."""


def as_record(summary: Summary) -> dict[str, Any]:
    """What a script wants of a search: where it lies, how its trials ended, the winner, and the finalists' fresh scores."""
    states = [trial.state for trial in summary.trials]
    best = summary.winner
    return {
        "folder": summary.folder,
        "trials": {state: states.count(state) for state in sorted(set(states))},
        "winner": best and {"trial": best.number, "choices": best.choices, "config": summary.folder / "winner.yaml"},
        "finalists": [
            {"trial": each.trial.number, "kind": each.trial.kind, summary.metric: each.scores, "macs": each.trial.scored.macs}
            for each in summary.finalists
        ],
        "features": best.scored.features if best else None,
    }
