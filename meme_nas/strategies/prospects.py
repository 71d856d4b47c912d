"""Ranking of one expert's untried candidates, best first.

Most turns rank by the surrogate's posterior mean. A draw from the posterior would favour the candidates with the largest
variance. Every ``FRONT_TURN``-th turn ranks by the hypervolume that a candidate would add to the expert's own front, because
every part of a cascade on the front is on the front of its expert. Before there is a surrogate, candidates farthest from the
tried ones are first. Each worth is multiplied by the probability that the candidate can be trained.
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

POOL, PARENTS = 200, 4  # random points, and candidates whose neighbours join them
FRONT_TURN = 4  # every fourth candidate is proposed to extend the Pareto front, the others to find the winner
COSTED = 16  # random points, and points with the best mean, whose costs are counted for the front: counting takes time
MOST = 10  # points returned


@dataclass(frozen=True)
class Prospects:
    """Results from which a candidate of one expert is proposed."""

    roster: Roster
    end: int
    """Number of the roster's first candidates whose outcomes the proposal may use."""
    model: Surrogate | None
    """Surrogate of these candidates; None if no cascade is scored."""
    minimised: Sequence[int]
    """Columns of the roster's costs that are minimised and can be counted without timing."""
    costs_of: Callable[[Choices], Array]
    """Function from the expert's choices to the costs (len(minimised),) that they add to a cascade."""

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
        """Return random points and neighbours of the candidates with the best credit, without those that were tried."""
        own, trials, number = self.roster.domains, self.roster.trials, self.roster.number
        best = [trials[index].choices for index in np.argsort(self.model.credit(number))[:PARENTS]] if self.model else []
        pool = [draw(own, chance) for _ in range(POOL)] + [near for choices in best for near in neighbours(own, choices)]
        return [choices for choices in pool if self.roster.place(choices) is None]

    def _gains(self, pool: Sequence[Choices], expected: Array) -> Array:
        """Return the hypervolume (len(pool),) that each point adds to the front of this expert's trained candidates."""
        assert self.model is not None
        usable = self.roster.usable(self.end)
        costs = self.roster.costs(self.end)[usable][:, list(self.minimised)]
        tried = np.column_stack([self.model.credit(self.roster.number)[usable], costs])
        front = tried[moocore.is_nondominated(tried)] if len(tried) else tried
        return gains(np.column_stack([expected, [self.costs_of(choices) for choices in pool]]), front)


def _best_first(worth: Array, feasible: Array) -> Indices:
    """Return indices sorted by worth above the lowest worth, times the probability that the candidate can be trained."""
    return np.argsort(-(worth - worth.min()) * feasible, kind="stable")
