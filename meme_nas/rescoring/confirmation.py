"""Confirmation of the winner: longer trainings of it and the hand-made pattern, with seeds and noise that chose neither.

Short trainings can rank two configurations in another order than full ones, and the scores that chose a winner are biased in its
favour. So the search recommends the configuration that is better here, with a confidence interval. Differences of log FID are
paired, because both sides share data order, noise and initial weights of each training seed.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from meme.config.schema import Config
from meme.support.intervals import Interval, log_ratios, paired
from meme_nas.record.folder import trial_folder
from meme_nas.record.tasks import CONFIRMATION
from meme_nas.record.trial_log import TrialRecord
from meme_nas.rescoring.base import Rescoring, key_of
from meme_nas.rescoring.chosen import Chosen
from meme_nas.rescoring.findings import Confirmed, Rescored
from meme_nas.settings import SearchSettings
from meme_nas.strategies.base import Strategy

FIRST_TRAINING_SEED = 1_000  # added to the search's seed, so that neither search nor audit trains with it
FIRST_SAMPLING_SEED = 2_001  # sampling noise that no other score uses
SAMPLINGS = 2  # sampling seeds for each training seed


@dataclass(frozen=True)
class Way:
    """One training seed and one sampling seed."""

    training_seed: int
    sampling_seed: int


class Confirmation(Rescoring):
    """Trainings of winner and hand-made pattern with every seed. It may only be used when search and audit are done."""

    unit = "confirmations"
    kind = CONFIRMATION

    def __init__(self, settings: SearchSettings, search: Strategy, chosen: Chosen):
        super().__init__(settings, search, search.study.confirmation())
        self._chosen = chosen

    @property
    def seeds(self) -> range:
        """Training seeds of the confirmation."""
        first = self.settings.seed + FIRST_TRAINING_SEED
        return range(first, first + self.settings.confirm_seeds)

    @property
    def steps(self) -> int:
        """Training steps of an expert, after those of the trunk."""
        return self.settings.trained_to(self._search.space.base, self.settings.confirm_share).training.steps

    @cached_property
    def chosen(self) -> list[TrialRecord]:
        """Hand-made pattern and winner; empty if one is missing or the pattern itself won."""
        trials, best = self._search.study.trials, self._chosen.best
        hand_made = next((trial for trial in trials if trial.kind == "hand-made" and trial.state == "complete"), None)
        return [hand_made, best] if hand_made and best and best is not hand_made else []

    def _ways(self, trial: TrialRecord) -> list[Config]:
        config = self.settings.trained_to(trial.config, self.settings.confirm_share)
        samples = self.settings.full_config().evaluation.samples
        return [
            config.with_(training={"seed": way.training_seed}, evaluation={"samples": samples, "seed": way.sampling_seed})
            for way in self._seed_pairs
        ]

    @property
    def _seed_pairs(self) -> list[Way]:
        return seed_pairs(self.seeds)

    def _seeds(self, config: Config) -> tuple[int, ...]:
        return (config.training.seed,)

    def result(self) -> Confirmed | None:
        """Return the comparison; None before it is complete, or if a score is not above 0."""
        results = self.results()
        if len(results) < len(self.chosen) or not results:
            return None
        found = compared(results[0], results[1], self._seed_pairs)
        if found is None:
            return None
        hand_made, winner, difference = found
        config = self.settings.trained_to(winner.trial.config, self.settings.confirm_share)
        folders = [self._folder_of(each.trial) for each in (winner, hand_made)]
        return Confirmed(winner, hand_made, difference, config.training.steps, config.training.trunk_steps, *folders)

    def _folder_of(self, trial: TrialRecord) -> Path:
        """Return the folder with the samples of the first scoring of ``trial``."""
        first = self._ways(trial)[0]
        number = self._begun[key_of(first, first.architecture_id)].number
        return trial_folder(self._search.study.folder, number, self.kind)


def seed_pairs(training_seeds: Sequence[int]) -> list[Way]:
    """Return all pairs of seeds. Training seeds change fastest, so that parallel workers train different experts.

    Each training seed has its own sampling seeds. So the differences, and their interval, include the variance of both.
    """
    return [
        Way(training, FIRST_SAMPLING_SEED + SAMPLINGS * place + again)
        for again in range(SAMPLINGS)
        for place, training in enumerate(training_seeds)
    ]


def compared(hand_made: Rescored, winner: Rescored, pairs: Sequence[Way]) -> tuple[Rescored, Rescored, Interval] | None:
    """Return both sides with one score for each training seed, and the interval of log winner less log hand-made pattern.

    Scores are in the order of ``pairs``. None if a score is not above 0, which an unbiased KID can be.
    """
    if min(*hand_made.scores, *winner.scores) <= 0:
        return None
    ours, theirs = _by_training_seed(winner, pairs), _by_training_seed(hand_made, pairs)
    return theirs, ours, paired(log_ratios(ours.scores, theirs.scores) or [])


def _by_training_seed(each: Rescored, pairs: Sequence[Way]) -> Rescored:
    """Return ``each`` with one score for each training seed, the geometric mean over its sampling seeds."""
    scores: dict[int, list[float]] = {}
    for way, score in zip(pairs, each.scores, strict=True):
        scores.setdefault(way.training_seed, []).append(score)
    return Rescored(each.trial, tuple(map(statistics.geometric_mean, scores.values())), each.samples, each.steps)
