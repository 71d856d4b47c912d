"""The joint strategy: a trial is a whole configuration, proposed from all configurations before it."""

import random

from meme.support.seeding import derive_seed
from meme_nas.record.study import Study
from meme_nas.record.trial_log import TrialRecord
from meme_nas.settings import LEAST_LAG, SearchSettings
from meme_nas.strategies.base import Strategy
from meme_nas.strategies.optuna_proposer import Proposer
from search_spaces.domain import Choices, draw, neighbours

REPEATS_BEFORE_WALK = 10  # proposals seen before in a row, after which an unseen neighbour is taken instead
REFUSALS_BEFORE_WALK = 20  # proposals over a limit in a row, after which a cheaper point is sought directly


class Joint(Strategy):
    """Hands out whole configurations to train and score, and takes their outcomes."""

    def __init__(self, settings: SearchSettings, study: Study, **replaced):
        super().__init__(settings, study, **replaced)
        self._proposer = Proposer(self.space.domains, settings.proposer, len(settings.objectives))
        self._found_none = False

    @property
    def counted(self) -> int:
        """How many trials the budget has paid for: all but those refused before training."""
        return len(self.study.trials) - self.study.ensembles.refused

    @property
    def budget(self) -> int:
        """Trials, each of which the budget pays for as often as there are training seeds."""
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
        """Start (or refuse) the next trial; None where a proposal still lacks a result it must know."""
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
        """The proposal for trial ``number``; where it repeats an architecture, another one, at no cost."""
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
        """The first unseen point that keeps the limits on a random walk from ``start``, with jumps; None if there is none."""
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
