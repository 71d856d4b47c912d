"""What rescoring found: scores of longer trainings, and what they say of the search's choice and of its winner."""

import statistics
from dataclasses import dataclass
from pathlib import Path

from meme.support.intervals import Interval
from meme_nas.record.trial_log import TrialRecord


@dataclass(frozen=True)
class Rescored:
    """A trial scored again in ways the search has not seen: a finalist at proxy length with other sampling noise, what is audited
    after longer training with several seeds."""

    trial: TrialRecord
    scores: tuple[float, ...]
    """FID or KID, one a sampling seed of a finalist, one a training seed in the audit."""
    samples: int | None = None
    """Images behind each score; None: as many as in the search."""
    steps: int | None = None
    """Training steps of an expert; None: as many as in the search."""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores)

    @property
    def deviation(self) -> float:
        """Sample standard deviation over the seeds; 0 for a single seed."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else 0.0


@dataclass(frozen=True)
class Confirmed:
    """Winner and hand-made pattern after longer trainings, with seeds that chose neither."""

    winner: Rescored
    """One score a training seed."""
    hand_made: Rescored
    difference: Interval
    """Of log FID (or KID), winner less hand-made pattern, over the training seeds."""
    steps: int
    """Training steps of an expert, after those of the trunk."""
    trunk_steps: int
    winner_folder: Path | None = None
    """Where its samples lie, of the first training seed."""
    hand_made_folder: Path | None = None

    def of(self, trial: TrialRecord) -> Rescored | None:
        """Return the scores of a confirmed config; None for others."""
        return next((each for each in (self.winner, self.hand_made) if each.trial.is_same_config(trial)), None)

    def folder_of(self, trial: TrialRecord) -> Path | None:
        """Return the folder of a confirmed config's samples; None for others."""
        found = self.of(trial)
        return None if found is None else self.winner_folder if found is self.winner else self.hand_made_folder

    @property
    def winner_is_better(self) -> bool:
        """Return whether the winner is recommended: its mean over the seeds is lower, whatever the interval."""
        return self.difference.mean < 0

    @property
    def recommended(self) -> TrialRecord:
        """Return the trial whose config is to be trained in full."""
        return (self.winner if self.winner_is_better else self.hand_made).trial


@dataclass(frozen=True)
class Agreement:
    """How well one signal of the search ranks configurations as the longer training does."""

    signal: str
    tau: float
    low: float
    """2.5th percentile over bootstrap samples of the configurations."""
    high: float
    count: int
    among_best: "Agreement | None" = None
    """The same among the better half by the search's scores, from which the search chooses."""


@dataclass(frozen=True)
class Regret:
    """How much worse than the best of the audited configurations the search's own choice is."""

    picked: TrialRecord
    """What the search would have chosen."""
    best: TrialRecord
    """What has the lowest mean score of those that cost no more than the hand-made pattern."""
    behind: Interval
    """Log FID (or KID) of the choice less that of the best, over training seeds that the search has not used."""
    is_fresh: bool
    """False: the only training seed is the search's own, whose luck both share, so there is no interval."""
    count: int
    """Configurations compared."""


@dataclass(frozen=True)
class Judged:
    """The audit's winner against the hand-made pattern, over training seeds that chose neither."""

    winner: TrialRecord
    difference: Interval
    """Of log FID (or KID), winner less hand-made pattern."""
