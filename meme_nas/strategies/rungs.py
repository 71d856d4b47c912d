"""Successive halving of experts' candidates: all are trained briefly, the better half goes on from where its training stopped.

Rungs are lengths of training, each twice the one below; the highest is the proxy length. Every rung is a factorised search of its
own: its candidates are put together into cascades, which are scored and give every candidate its credit at that length. So
cascades are compared with others of their rung only. New candidates enter at the lowest rung; the others take the better half of
the rung below, by non-dominated rank over credit and whatever costs are minimised. What round i of a rung brings follows from the
rounds up to i of the one below, so neither waits for the other's end, and what is promoted does not depend on who runs it or when
it ends.

What an expert has been trained is not trained again: the bank goes on from its state. So the budget, counted in steps, pays for
more candidates.
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
    """The factorised strategy, with as many rungs as ``settings`` say."""
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
    """At a lower rung one ensemble is scored beside the cascades: that of all first candidates, which takes no more training."""
    return [("hand-made", space.base.with_(training={"steps": steps_at(rung, space.base.training.steps)}))]


class LowestRung(Factorised):
    """Where candidates enter, as many as the budget pays for with what the better ones will be trained further."""

    unit = "training steps"

    def __init__(self, settings: SearchSettings, study: Study, rung: int, in_full: int, **replaced):
        """``in_full``: candidates of each expert that the budget would pay for at proxy length."""
        super().__init__(settings, study, rung, **replaced)
        self._in_full = in_full
        self._round *= KEPT**rung  # the highest rung then gets as many a round as it would without others

    @cached_property
    def affordable(self) -> int:
        """Candidates that may enter, for what those that go on cost too."""
        proxy_steps = self.space.base.training.steps
        count = self._in_full
        while _steps_for(count + 1, self.rung, proxy_steps) <= self._in_full * proxy_steps:
            count += 1
        return count

    @property
    def spent(self) -> tuple[int, int]:
        """Training steps."""
        done, planned = self._candidates_spent
        return done * self.steps, planned * self.steps


class HigherRung(Factorised):
    """Takes the better half of the rung ``below``."""

    unit = "training steps"

    def __init__(self, settings: SearchSettings, study: Study, rung: int, below: "LowestRung | HigherRung", **replaced):
        super().__init__(settings, study, rung, **replaced)
        self.below = below

    def next_task(self) -> Task | None:
        """Of this rung if there is one, so that the first scores at proxy length come early."""
        task = super().next_task() or self.below.next_task()
        self.repeats = self.below.repeats  # only there anything is proposed
        return task

    def record(self, outcome: Outcome) -> TrialRecord:
        return super().record(outcome) if outcome.rung == self.rung else self.below.record(outcome)

    @property
    def candidates(self) -> int:
        return max(1, self.below.candidates // KEPT)

    @property
    def exhausted(self) -> bool:
        return self.below.exhausted

    @property
    def rounds(self) -> list[int]:
        return [end for end, _ in self._promotions]

    @property
    def spent(self) -> tuple[int, int]:
        """Training steps, those of the rungs below included."""
        (trained, planned), (extra, all_extra), below = self._candidates_spent, self._yardsticks_spent, self.below.spent
        further = self.steps - self.below.steps
        done = further * trained + self.steps * extra + below[0]
        return done, further * planned + self.steps * all_extra + below[1]

    @property
    def done(self) -> bool:
        return super().done and self.below.done

    @cached_property
    def _promotions(self) -> list[tuple[int, int]]:
        """Of every round: how many candidates each expert then has here, and the round of the rung below that it follows from."""
        found: list[tuple[int, int]] = []
        for place, end in enumerate(self.below.rounds):
            if not found or end // KEPT > found[-1][0]:
                found.append((max(1, end // KEPT), place))
        return found

    def _next_yardstick(self) -> TrialRecord | None:
        """Once the rung below has trained the hand-made pattern, whose training then goes on."""
        return super()._next_yardstick() if self.below._trained(0) else None

    def _informed(self, place: int) -> bool:
        return self.below._scored(self._promotions[place][1])

    def _candidate(self, number: int, index: int, place: int) -> Choices:
        """The hand-made one, then what is best below and not here yet; where nothing is left, the hand-made one, which costs
        nothing."""
        start = self.rounds[place - 1] if place else 0
        here = [trial.choices for trial in self._log(number)[:start]]
        hand_made = self._part(number, self.space.choices(self.space.base))
        best = self.below.ranked(number, self._promotions[place][1])
        new = [choices for choices in [hand_made, *(c for c in best if c != hand_made)] if choices not in here]
        return new[index - start] if index - start < len(new) else hand_made


def _steps_for(candidates: int, lowest: int, proxy_steps: int) -> int:
    """Training steps of each expert if so many candidates enter at the lowest rung."""
    steps = [steps_at(rung, proxy_steps) for rung in range(lowest, -1, -1)]
    further = [steps[0], *(after - before for before, after in itertools.pairwise(steps))]
    return sum(max(1, candidates // KEPT**height) * each for height, each in enumerate(further))
