"""Candidates of one expert that were not tried yet, the most promising first.

In most turns they are ranked by the surrogate's posterior mean (a draw from it would pick what is least known), in every
``FRONT_TURN``-th by what they would add to the volume that the expert's own front beats: a cascade on the front of all cascades
has parts that are on the fronts of their experts. Before there is a surrogate, those come first that are farthest from what was
tried. Each worth is multiplied by the probability that the candidate can be trained at all.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import moocore
import numpy as np
from scipy.spatial.distance import cdist

from meme_nas.strategies.candidates import Roster
from meme_nas.surrogate.feasibility import chances
from meme_nas.surrogate.hypervolume import gains
from meme_nas.surrogate.kernel import Array, Indices
from meme_nas.surrogate.model import Surrogate
from search_spaces.domain import Choices, draw, encoded, neighbours

POOL, PARENTS = 200, 4  # points drawn by chance, and candidates whose neighbours join them
FRONT_TURN = 4  # one of so many candidates is proposed for the front, and not for the winner
COSTED = 16  # points drawn by chance, and as many of the most expected, that are looked at for it: to count costs takes time
MOST = 10  # that are returned


@dataclass(frozen=True)
class Prospects:
    """What is known when a candidate of one expert is proposed."""

    roster: Roster
    end: int
    """How many of its first candidates have an outcome that the proposal may use."""
    model: Surrogate | None
    """Of these candidates; None where no cascade is scored."""
    minimised: Sequence[int]
    """Which columns of the roster's costs are minimised and can be counted without timing."""
    costs_of: Callable[[Choices], Array]
    """(len(minimised),) what these choices of the expert add to the costs of a cascade."""

    def ranked(self, chance: random.Random) -> list[Choices]:
        """Return at most ``MOST`` untried candidates, best first."""
        pool = self._untried(chance)
        if not pool:
            return []
        points = np.array([encoded(self.roster.domains, choices) for choices in pool])
        known = self.roster.trials[: self.end]
        tried = np.array([encoded(self.roster.domains, trial.choices) for trial in self.roster.trials])
        feasible = chances(tried[: self.end], np.array([trial.state != "failed" for trial in known], dtype=bool), points)
        if self.model is None:
            farthest = np.argsort(-cdist(points, tried).min(axis=1) * feasible, kind="stable")
            return [pool[index] for index in farthest[:MOST]]
        worth = -self.model.expected(self.roster.number, points)
        order = _best_first(worth, feasible)
        if self.minimised and (len(self.roster.trials) + self.roster.number) % FRONT_TURN == 0:
            some = np.union1d(np.arange(len(pool))[:COSTED], order[:COSTED])
            order = some[_best_first(self._gains([pool[index] for index in some], -worth[some]), feasible[some])]
        return [pool[index] for index in order[:MOST]]

    def _untried(self, chance: random.Random) -> list[Choices]:
        """Return points drawn by chance, and neighbours of the candidates that are credited most."""
        own, trials, number = self.roster.domains, self.roster.trials, self.roster.number
        best = [trials[index].choices for index in np.argsort(self.model.credit(number))[:PARENTS]] if self.model else []
        pool = [draw(own, chance) for _ in range(POOL)] + [near for choices in best for near in neighbours(own, choices)]
        return [choices for choices in pool if self.roster.place(choices) is None]

    def _gains(self, pool: Sequence[Choices], expected: Array) -> Array:
        """(len(pool),) what each adds to the volume that the front of this expert's trained candidates beats."""
        assert self.model is not None
        usable = self.roster.usable(self.end)
        costs = self.roster.costs(self.end)[usable][:, list(self.minimised)]
        tried = np.column_stack([self.model.credit(self.roster.number)[usable], costs])
        front = tried[moocore.is_nondominated(tried)] if len(tried) else tried
        return gains(np.column_stack([expected, [self.costs_of(choices) for choices in pool]]), front)


def _best_first(worth: Array, feasible: Array) -> Indices:
    """Return places by worth, over the least of all, times the probability that it comes to anything."""
    return np.argsort(-(worth - worth.min()) * feasible, kind="stable")
