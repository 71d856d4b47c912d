"""Results of rescoring: scores of longer trainings, and the comparisons drawn from them."""

import statistics
from dataclasses import dataclass
from pathlib import Path

from meme.support.intervals import Interval
from meme_nas.record.trial_log import TrialRecord


@dataclass(frozen=True)
class Rescored:
    """A trial with its new scores: a finalist's at proxy length with fresh noise, or others after longer training."""

    trial: TrialRecord
    scores: tuple[float, ...]
    """FID or KID: one value for each sampling seed of a finalist, or for each training seed in the audit."""
    samples: int | None = None
    """Number of images behind each score; None: the number of the search."""
    steps: int | None = None
    """Training steps of an expert; None: the number of the search."""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores)

    @property
    def deviation(self) -> float:
        """Sample standard deviation over the seeds; 0 for a single seed."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else 0.0


@dataclass(frozen=True)
class Confirmed:
    """Comparison of winner and hand-made pattern after longer trainings, with seeds that chose neither."""

    winner: Rescored
    """The winner with one score for each training seed."""
    hand_made: Rescored
    difference: Interval
    """Difference of log FID (or KID), winner less hand-made pattern, over the training seeds."""
    steps: int
    """Training steps of an expert, after those of the trunk."""
    trunk_steps: int
    winner_folder: Path | None = None
    """Folder of its samples from the first training seed."""
    hand_made_folder: Path | None = None

    def of(self, trial: TrialRecord) -> Rescored | None:
        """Return the scores of ``trial``'s config; None if that was not confirmed."""
        return next((each for each in (self.winner, self.hand_made) if each.trial.is_same_config(trial)), None)

    def folder_of(self, trial: TrialRecord) -> Path | None:
        """Return the folder of the samples of ``trial``'s config; None if that was not confirmed."""
        found = self.of(trial)
        return None if found is None else self.winner_folder if found is self.winner else self.hand_made_folder

    @property
    def winner_is_better(self) -> bool:
        """True if the winner's mean log score over the seeds is lower. It is then recommended, whatever the interval."""
        return self.difference.mean < 0

    @property
    def recommended(self) -> TrialRecord:
        """Trial whose config is recommended for full training."""
        return (self.winner if self.winner_is_better else self.hand_made).trial


@dataclass(frozen=True)
class Agreement:
    """Kendall's tau between one signal of the search and the scores of longer training."""

    signal: str
    tau: float
    low: float
    """2.5th percentile over bootstrap samples of the configurations."""
    high: float
    """97.5th percentile."""
    count: int
    """Number of configurations."""
    among_best: "Agreement | None" = None
    """The same within the better half by the search's scores, from which the search chooses."""


@dataclass(frozen=True)
class Regret:
    """Distance of the search's own choice from the best of the audited configurations."""

    picked: TrialRecord
    """The search's own choice, without the audit."""
    best: TrialRecord
    """The trial with the lowest mean score among those that cost no more than the hand-made pattern."""
    behind: Interval
    """Log FID (or KID) of the choice less that of the best, over training seeds that the search has not used."""
    is_fresh: bool
    """False if the only training seed is the search's own. There is then no interval, because both share its luck."""
    count: int
    """Number of configurations compared."""


@dataclass(frozen=True)
class Judged:
    """Comparison of the audit's winner with the hand-made pattern, over training seeds that chose neither."""

    winner: TrialRecord
    difference: Interval
    """Difference of log FID (or KID), winner less hand-made pattern."""
