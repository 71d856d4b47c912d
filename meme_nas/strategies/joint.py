"""Joint strategy: every trial is a whole configuration, proposed from the configurations before it."""

import random

from meme.support.seeding import derive_seed
from meme_nas.record.study import Study
from meme_nas.record.trial_log import TrialRecord
from meme_nas.settings import LEAST_LAG, SearchSettings
from meme_nas.strategies.base import Strategy
from meme_nas.strategies.optuna_proposer import Proposer
from search_spaces.domain import Choices, draw, neighbours

REPEATS_BEFORE_WALK = 10  # repeated proposals in a row, after which a random walk looks for a new point
REFUSALS_BEFORE_WALK = 20  # refused proposals in a row, after which a random walk looks for a point within the limits


class Joint(Strategy):
    """Strategy that trains and scores whole configurations."""

    def __init__(self, settings: SearchSettings, study: Study, **replaced):
        super().__init__(settings, study, **replaced)
        self._proposer = Proposer(self.space.domains, settings.proposer, len(settings.objectives))
        self._found_none = False

    @property
    def counted(self) -> int:
        """Number of trials that the budget has paid for: all except those refused before training."""
        return len(self.study.trials) - self.study.ensembles.refused

    @property
    def budget(self) -> int:
        """Number of trials that the budget pays for. A trial costs one training for each training seed."""
        return max(1, self.settings.budget // self.settings.training_seeds)

    @property
    def exhausted(self) -> bool:
        return self._found_none

    @property
    def spent(self) -> tuple[int, int]:
        return self.counted - len(self.study.ensembles.running), self.budget

    @property
    def done(self) -> bool:
        return not self.study.ensembles.running and (self.exhausted or self.counted >= self.budget)

    def _next(self) -> TrialRecord | None:
        while not self.exhausted and self.counted < self.budget:
            trial = self._start_next()
            if trial is None or not trial.finished:
                return trial
        return None

    def _start_next(self) -> TrialRecord | None:
        """Start or refuse the next trial and return it. None if its proposal needs a result that is not there yet."""
        if (yardstick := self._next_yardstick()) is not None:
            return yardstick
        number = len(self.study.trials)
        end = max(0, number - (self.settings.proposal_lag or LEAST_LAG) + 1)
        if any(running < end for running in self.study.ensembles.running):
            return None
        choices = self._unseen_choices(number, self.study.frozen_trials()[:end])
        if choices is None:
            self._found_none = True
            return None
        config = self.space.config(choices, f"trial-{number:03d}")
        return self.study.start(config, "candidate", choices, self.distributions, refused=self.costs.refusal(config))

    def _unseen_choices(self, number: int, known: list) -> Choices | None:
        """Return the choices of trial ``number``, of an architecture not tried before; None if none is found.

        Choices of a warm start are first, then proposals. If these only repeat earlier trials, a random walk finds a new point.
        Repeats cost no training.
        """
        seen = self.study.ensembles.architecture_ids
        source = random.Random(derive_seed(self.settings.seed, "walk", number))
        for choices in self.warm:
            if self._architecture(choices) not in seen:
                return choices
        choices = {}
        for attempt in range(REPEATS_BEFORE_WALK):
            choices = self._proposer.propose(known, derive_seed(self.settings.seed, "proposal", number, attempt))
            if self._refused_in_a_row() >= REFUSALS_BEFORE_WALK:
                break
            if self._architecture(choices) not in seen:
                return choices
            self.repeats += 1
        return self._walk(choices, seen, source)

    def _walk(self, start: Choices, seen: set[str], source: random.Random) -> Choices | None:
        """Return the first unseen point within the limits on a random walk with jumps from ``start``; None if none is found."""
        domains, point = self.space.domains, start
        for step in range(2_000):
            config = self.space.config(point, "")
            if config.architecture_id not in seen and not self.costs.refusal(config):
                return point
            point = draw(domains, source) if step % 50 == 49 else source.choice(list(neighbours(domains, point)))
        return None

    def _refused_in_a_row(self) -> int:
        count = 0
        for trial in reversed(self.study.trials):
            if trial.state != "refused":
                break
            count += 1
        return count

    def _architecture(self, choices: Choices) -> str:
        return self.space.config(choices, "").architecture_id
