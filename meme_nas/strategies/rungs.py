"""Successive halving of experts' candidates: all are trained briefly, and the better half is trained further.

A rung is a length of training, twice that of the rung below. The highest rung has the proxy length. Every rung is a factorised
search of its own: the scores of its cascades give every candidate its credit at that length, so cascades are compared only with
others of their rung. New candidates enter at the lowest rung. Each higher rung takes the better half of the rung below, by
non-dominated rank over credit and the minimised costs. Round i of a rung depends only on rounds up to i of the rung below. So
rungs run side by side, and promotions do not depend on the engine or on the order in which trials end.

A promoted expert resumes from its state in the bank, so no step is trained twice. The budget, counted in steps, therefore pays
for more candidates.
"""

import itertools
from collections.abc import Sequence
from functools import cached_property

from meme.config.schema import Config
from meme_nas.record.study import Study
from meme_nas.record.tasks import Outcome, Task
from meme_nas.record.trial_log import TrialRecord
from meme_nas.settings import SearchSettings
from meme_nas.strategies.base import proxy_space, yardsticks_of
from meme_nas.strategies.factorised import KEPT, Factorised, candidates_in_full, steps_at
from meme_nas.surrogate.costs import Latency
from search_spaces.domain import Choices
from search_spaces.space import Space


def factorised(
    settings: SearchSettings,
    study: Study,
    space: Space | None = None,
    yardsticks: Sequence[tuple[str, Config]] | None = None,
    latency: Latency | None = None,
) -> Factorised:
    """Return the factorised strategy with the number of rungs in ``settings``."""
    space = space or proxy_space(settings)
    yardsticks = yardsticks_of(settings) if yardsticks is None else yardsticks
    lowest = settings.rungs - 1
    if not lowest:
        return Factorised(settings, study, space=space, yardsticks=yardsticks, latency=latency)
    in_full = candidates_in_full(settings, len(yardsticks))
    rung: LowestRung | HigherRung
    common = {"space": space, "latency": latency}
    rung = LowestRung(settings, study, lowest, in_full, yardsticks=_hand_made(space, lowest), **common)
    for number in reversed(range(lowest)):
        own = _hand_made(space, number) if number else yardsticks
        rung = HigherRung(settings, study, number, rung, yardsticks=own, **common)
    return rung


def _hand_made(space: Space, rung: int) -> list[tuple[str, Config]]:
    """Return the only yardstick of a lower rung: the ensemble of all first candidates, which needs no further training."""
    return [("hand-made", space.base.with_(training={"steps": steps_at(rung, space.base.training.steps)}))]


class LowestRung(Factorised):
    """Rung at which candidates enter. Their number leaves enough budget to train the better ones further."""

    unit = "training steps"

    def __init__(self, settings: SearchSettings, study: Study, rung: int, in_full: int, **replaced):
        """Spend the budget of ``in_full`` candidates of each expert at proxy length."""
        super().__init__(settings, study, rung, **replaced)
        self._in_full = in_full
        self._round *= KEPT**rung  # so rounds of the highest rung have the size that they have without lower rungs

    @cached_property
    def affordable(self) -> int:
        """Number of candidates of each expert that the budget pays for, including the further training of promoted ones."""
        proxy_steps = self.space.base.training.steps
        count = self._in_full
        while _steps_for(count + 1, self.rung, proxy_steps) <= self._in_full * proxy_steps:
            count += 1
        return count

    @property
    def spent(self) -> tuple[int, int]:
        """Training steps done and planned."""
        done, planned = self._candidates_spent
        return done * self.steps, planned * self.steps


class HigherRung(Factorised):
    """Rung that trains the better half of the candidates of the rung ``below`` further."""

    unit = "training steps"

    def __init__(self, settings: SearchSettings, study: Study, rung: int, below: "LowestRung | HigherRung", **replaced):
        super().__init__(settings, study, rung, **replaced)
        self.below = below

    def next_task(self) -> Task | None:
        """Return a task of this rung if it has one, else of the rung below, so that scores at proxy length come early."""
        task = super().next_task() or self.below.next_task()
        self.repeats = self.below.repeats  # only the lowest rung proposes
        return task

    def record(self, outcome: Outcome) -> TrialRecord:
        return super().record(outcome) if outcome.rung == self.rung else self.below.record(outcome)

    @property
    def candidates(self) -> int:
        return max(1, self.below.candidates // KEPT)

    @property
    def every_trial(self) -> list[TrialRecord]:
        return [*super().every_trial, *self.below.every_trial]

    @property
    def exhausted(self) -> bool:
        return self.below.exhausted

    @property
    def rounds(self) -> list[int]:
        return [end for end, _ in self._promotions]

    @property
    def spent(self) -> tuple[int, int]:
        """Training steps done and planned, including those of the rungs below."""
        (trained, planned), (extra, all_extra), below = self._candidates_spent, self._yardsticks_spent, self.below.spent
        further = self.steps - self.below.steps
        done = further * trained + self.steps * extra + below[0]
        return done, further * planned + self.steps * all_extra + below[1]

    @property
    def done(self) -> bool:
        return super().done and self.below.done

    @cached_property
    def _promotions(self) -> list[tuple[int, int]]:
        """For every round: the number of candidates of each expert at its end, and the round of the rung below that it is
        promoted from."""
        found: list[tuple[int, int]] = []
        for place, end in enumerate(self.below.rounds):
            if not found or end // KEPT > found[-1][0]:
                found.append((max(1, end // KEPT), place))
        return found

    def _next_yardstick(self) -> TrialRecord | None:
        """Start the next yardstick, if the rung below has trained the hand-made pattern, from which training resumes."""
        return super()._next_yardstick() if self.below._trained(0) else None

    def _informed(self, place: int) -> bool:
        return self.below._scored(self._promotions[place][1])

    def _candidate(self, number: int, index: int, place: int) -> Choices:
        """Return the choices of the best candidate of the rung below that is not at this rung yet.

        The first candidate is the hand-made one. It is also returned if none is left, which costs no training.
        """
        start = self.rounds[place - 1] if place else 0
        here = [trial.choices for trial in self._log(number)[:start]]
        hand_made = self._part(number, self.space.choices(self.space.base))
        best = self.below.ranked(number, self._promotions[place][1])
        new = [choices for choices in [hand_made, *(c for c in best if c != hand_made)] if choices not in here]
        return new[index - start] if index - start < len(new) else hand_made


def _steps_for(candidates: int, lowest: int, proxy_steps: int) -> int:
    """Return the training steps of each expert over all rungs if ``candidates`` enter at the rung ``lowest``."""
    steps = [steps_at(rung, proxy_steps) for rung in range(lowest, -1, -1)]
    further = [steps[0], *(after - before for before, after in itertools.pairwise(steps))]
    return sum(max(1, candidates // KEPT**height) * each for height, each in enumerate(further))
