"""Summary of a search's results for the report and the console."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from meme.support.intervals import Interval
from meme_nas.record.effort import Effort
from meme_nas.record.folder import trial_folder
from meme_nas.record.trial_log import TrialRecord
from meme_nas.report.spread import Dominant
from meme_nas.rescoring.findings import Agreement, Confirmed, Judged, Regret, Rescored


@dataclass(frozen=True)
class Frame:
    """Some images at one step between noise and data."""

    expert: int
    """Number of the expert that made the last step; 0 for the initial noise."""
    timestep: int
    """Noise level of the images; 0 at the end."""
    png: bytes
    """The images one below the other, the same ones in every frame."""


@dataclass(frozen=True)
class Spectrum:
    """Relative log amplitude by frequency of the output of an expert's last stage."""

    expert: int
    timestep: int
    """Timestep of the measurement, the middle of the expert's interval."""
    frequencies: tuple[float, ...]
    """Frequencies in units of pi."""
    relative_log_amplitude: tuple[float, ...]


@dataclass(frozen=True)
class Portrait:
    """Denoising film and spectra of one trial."""

    trial: TrialRecord
    film: tuple[Frame, ...]
    """Frames in the order of denoising."""
    spectra: tuple[Spectrum, ...]
    """One spectrum for each expert."""


@dataclass(frozen=True)
class AtLength:
    """Score of one trial's config after trainings of one length."""

    steps: int
    """Training steps of an expert, after those of the trunk."""
    score: float
    seeds: int
    """Number of training seeds in the mean."""
    samples: int
    """Number of images behind each score. FIDs of different numbers cannot be compared."""


@dataclass(frozen=True)
class Summary:
    """Results of one study, as report and console show them."""

    title: str
    folder: Path
    objectives: tuple[str, ...] = field(kw_only=True)
    """Minimised quantities: fid or kid first, then costs."""
    trials: list[TrialRecord]
    winner: TrialRecord | None
    """Best trial of the searched space among those that cost no more than the hand-made pattern in any minimised cost."""
    finalists: list[Rescored] = field(default_factory=list)
    """Winner and yardsticks scored again; empty while the search runs."""
    importance: dict[str, float] = field(default_factory=dict)
    """Share of the first objective's variation that each choice explains, by Optuna; empty while there are too few trials."""
    facts: dict[str, str] = field(default_factory=dict)
    """Facts that a reader needs beside the scores: command, data, feature space, samples, proxy length, versions, hardware."""
    audited: list[Rescored] = field(default_factory=list)
    """Configurations trained longer, with several seeds; empty without an audit."""
    agreements: list[Agreement] = field(default_factory=list)
    """Rank agreement of the search's signals with the audit, the score first; empty if too few configurations were audited."""
    regret: Regret | None = None
    """Regret of the search's choice against the best audited configuration; None without an audit."""
    judged: Judged | None = None
    """Comparison of the audit's winner with the hand-made pattern; None if the audit kept no seeds for it."""
    dominant: Dominant | None = None
    """Kind of choice that explains most of the spread of the search's scores; None if no kind does."""
    portraits: list[Portrait] = field(default_factory=list)
    """Portraits of the winner and the hand-made pattern; while the search runs, only those that are quickly made."""
    effort: Effort | None = None
    """Effort of the search, without its audit and later stages; None while it runs."""
    confirmed: Confirmed | None = None
    """Comparison of winner and hand-made pattern after longer training; None without a confirmation."""

    @property
    def metric(self) -> str:
        """First objective, fid or kid."""
        return self.objectives[0]

    def folder_of(self, trial: TrialRecord) -> Path:
        """Return the folder of the trial's samples after its longest training."""
        longer = self.confirmed.folder_of(trial) if self.confirmed else None
        return longer or trial_folder(self.folder, trial.number)

    def lengths_of(self, trial: TrialRecord) -> list[AtLength]:
        """Return the scores of ``trial``'s config in search, audit and confirmation, ordered by length of training."""
        searched = next((each for each in self.trials if each.is_same_config(trial) and each.state == "complete"), None)
        found = []
        if searched:
            outcome, config = searched.scored, searched.config
            score, seeds = outcome.values([self.metric])[0], len(outcome.fids) or 1
            found.append(AtLength(config.training.steps, score, seeds, config.evaluation.samples))
        longer = [*self.audited, *((self.confirmed.winner, self.confirmed.hand_made) if self.confirmed else ())]
        for each in longer:
            if each.trial.is_same_config(trial) and each.steps and each.samples:
                found.append(AtLength(each.steps, each.mean, len(each.scores), each.samples))
        found.sort(key=lambda each: each.steps)
        return found

    @property
    def recommended(self) -> TrialRecord | None:
        """Trial whose config is ``winner.yaml``."""
        return self.confirmed.recommended if self.confirmed else self.winner


def as_record(summary: Summary) -> dict[str, Any]:
    """Return the results for scripts: folder, number of trials by state, winner, comparisons and the finalists' fresh scores."""
    states = [trial.state for trial in summary.trials]
    best, confirmed = summary.recommended, summary.confirmed
    return {
        "folder": summary.folder,
        "trials": {state: states.count(state) for state in sorted(set(states))},
        "winner": best and {"trial": best.number, "choices": best.choices, "config": summary.folder / "winner.yaml"},
        "best_of_search": summary.winner and summary.winner.number,
        "confirmed": confirmed
        and {
            **_interval(confirmed.difference),
            "steps": confirmed.steps,
            "trunk_steps": confirmed.trunk_steps,
            "winner": confirmed.winner.scores,
            "hand_made": confirmed.hand_made.scores,
        },
        "finalists": [
            {"trial": each.trial.number, "kind": each.trial.kind, summary.metric: each.scores, **_costs(each.trial, summary)}
            for each in summary.finalists
        ],
        "regret": summary.regret and _interval(summary.regret.behind) | {"picked": summary.regret.picked.number},
        "judged": summary.judged and _interval(summary.judged.difference),
        "effort": summary.effort and asdict(summary.effort),
        "features": best.scored.features if best else None,
    }


def _interval(difference: Interval) -> dict[str, Any]:
    return {"log_ratio": difference.mean, "low": difference.low, "high": difference.high, "seeds": difference.count}


def _costs(trial: TrialRecord, summary: Summary) -> dict[str, float]:
    kinds = dict.fromkeys(("macs", *summary.objectives[1:]))
    return dict(zip(kinds, trial.scored.values(tuple(kinds)), strict=True))
