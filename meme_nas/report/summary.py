"""What a search came to, gathered for the report and the console."""

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
class AtLength:
    """The score of one trial's config after trainings of one length."""

    steps: int
    """Of an expert, after those of the trunk."""
    score: float
    seeds: int
    """Training seeds behind it."""
    samples: int
    """Images behind each score: FIDs of different numbers do not compare."""


@dataclass(frozen=True)
class Summary:
    """One study, as a person is shown it."""

    title: str
    folder: Path
    objectives: tuple[str, ...] = field(kw_only=True)
    """What is minimised: fid or kid first, then costs."""
    trials: list[TrialRecord]
    winner: TrialRecord | None
    """The best of the searched space that has no more of any minimised cost than the hand-made pattern."""
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
    regret: Regret | None = None
    """How much the search's choice among the audited costs; None without an audit."""
    judged: Judged | None = None
    """The audit's winner judged by seeds that did not choose it; None where none were kept for that."""
    dominant: Dominant | None = None
    """The kind of choice that explains most of the spread of the search's scores, if one does."""
    portraits: list[Portrait] = field(default_factory=list)
    """Of the winner and the hand-made pattern; while the search runs, where that takes a moment."""
    effort: Effort | None = None
    """What the search took, its audit and all that follows it left out; None while it runs."""
    confirmed: Confirmed | None = None
    """Winner and hand-made pattern trained longer; None where that was not done."""

    @property
    def metric(self) -> str:
        """What is minimised first, fid or kid."""
        return self.objectives[0]

    def folder_of(self, trial: TrialRecord) -> Path:
        """Return the folder of the trial's samples: after its longest training."""
        longer = self.confirmed.folder_of(trial) if self.confirmed else None
        return longer or trial_folder(self.folder, trial.number)

    def lengths_of(self, trial: TrialRecord) -> list[AtLength]:
        """Return the scores of ``trial``'s config at each length it was trained to, shortest first: in the search, the audit and
        the confirmation."""
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
        """The trial whose config is ``winner.yaml``."""
        return self.confirmed.recommended if self.confirmed else self.winner


def as_record(summary: Summary) -> dict[str, Any]:
    """What a script wants of a search: where it lies, how its trials ended, the winner, and the finalists' fresh scores."""
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
