"""Choice of the cascades to score next, from the candidates that are trained."""

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import moocore
import numpy as np
from numpy.typing import NDArray

from meme_nas.surrogate.best_cascade import best_sum
from meme_nas.surrogate.hypervolume import front_of_sums, gains
from meme_nas.surrogate.kernel import Indices
from meme_nas.surrogate.model import Surrogate

Array = NDArray[np.float64]
Cascade = tuple[int, ...]
"""Index of each expert's candidate, from 0. Expert 1, nearest to the data, is first."""

FRONT_TURN = 4  # every fourth cascade is chosen to extend the Pareto front, the others to find the winner
ATTEMPTS = 12
STRANDS = 4  # groups of cascades without shared sampler steps, so that 4 can run at a time without waiting for each other


@dataclass(frozen=True, eq=False)
class Assembly:
    """Trained candidates with their costs, from which cascades are put together."""

    ready: tuple[Indices, ...]
    """Indices of the trained candidates, for each expert."""
    costs: tuple[Array, ...]
    """Costs (M, K) that each candidate adds to a cascade, for each expert."""
    winner_limits: Array
    """Upper limits (K,) on the costs of a winner."""
    limits: Array
    """Upper limits (K,) on the costs of any cascade."""
    minimised: tuple[int, ...] = ()
    """Indices of the kinds of cost that are minimised. Together with the score they are the objectives of the front."""

    def choose(
        self,
        count: int,
        known: Collection[Cascade],
        model: Surrogate | None,
        source: np.random.Generator,
        scores: Mapping[Cascade, float] = MappingProxyType({}),
    ) -> list[Cascade]:
        """Return at most ``count`` cascades that are not in ``known`` and keep the limits.

        They are the best under draws from ``model``, or random ones without a model. ``scores`` are those of the scored cascades
        among ``known``.

        The order of the result interleaves ``STRANDS`` groups. Within a group, neighbours share most sampler steps. Cascades that
        run at the same time are of different groups, so that none waits for the shared steps of another.
        """
        chosen: dict[Cascade, None] = {}
        for attempt in range(ATTEMPTS):
            missing = min(count, self.size - len(known)) - len(chosen)
            if missing <= 0:
                break
            if model is None or attempt:  # the model found no further new cascade
                drawn = self._at_random(missing, source)
            else:
                drawn = self._hopeful(model, missing, {*known}, source, scores)
            chosen |= {cascade: None for cascade in drawn if cascade not in known and self._allowed(cascade, self.limits)}
        by_way, length = sorted(chosen, key=lambda cascade: cascade[::-1]), max(1, -(-len(chosen) // STRANDS))
        strands = [by_way[first : first + length] for first in range(0, len(by_way), length)]
        return [cascade for row in itertools.zip_longest(*strands) for cascade in row if cascade is not None]

    @property
    def size(self) -> int:
        """Number of cascades."""
        return math.prod(len(indices) for indices in self.ready)

    def _allowed(self, cascade: Cascade, limits: Array) -> bool:
        total = sum(cost[index] for cost, index in zip(self.costs, cascade, strict=True))
        return bool((total <= limits * (1 + 1e-9)).all())

    def _at_random(self, count: int, source: np.random.Generator) -> list[Cascade]:
        """Return ``count`` random cascades in which each candidate occurs about as often as the others of its expert."""
        columns = [
            np.concatenate([source.permutation(indices) for _ in range(-(-count // len(indices)))])[:count]
            for indices in self.ready
        ]
        return [tuple(map(int, row)) for row in zip(*columns, strict=True)]

    def _hopeful(
        self,
        model: Surrogate,
        count: int,
        taken: set[Cascade],
        source: np.random.Generator,
        scores: Mapping[Cascade, float],
    ) -> list[Cascade]:
        """Return the best cascades under ``count`` draws from the model (Thompson sampling) that are not in ``taken``.

        Every ``FRONT_TURN``-th draw, counted over all cascades of the search, looks for the front, the others for the winner.
        """
        draws, first = model.draws(count, source, self.ready), len(taken)
        lists = [kept for kept, _ in draws]
        front, found = self._front(model, scores), []
        for turn in range(count):
            values = [drawn[turn] for _, drawn in draws]
            for_front = bool(self.minimised) and (first + turn) % FRONT_TURN == FRONT_TURN - 1
            winners = self._winner_first(lists, values)
            ranked = itertools.chain(self._front_first(lists, values, front), winners) if for_front else winners
            cascade = next((cascade for cascade in ranked if cascade not in taken), None)
            if cascade is not None:
                taken.add(cascade)
                found.append(cascade)
        return found

    def _winner_first(self, lists: Sequence[Indices], values: Sequence[Array]) -> Iterator[Cascade]:
        """Yield the best cascade within the winner's limits, then those that differ from it in one expert, best first."""
        costs = [cost[kept] for cost, kept in zip(self.costs, lists, strict=True)]
        for places in _best_first(values, best_sum(values, costs, self.winner_limits)):
            cascade = _cascade(lists, places)
            if self._allowed(cascade, self.winner_limits):
                yield cascade

    def _front_first(self, lists: Sequence[Indices], values: Sequence[Array], front: Array) -> Iterator[Cascade]:
        """Yield the Pareto front of cascades under ``values``, first those that add most hypervolume to ``front``."""
        parts = [np.column_stack([v, cost[kept]]) for v, cost, kept in zip(values, self.costs, lists, strict=True)]
        chosen, sums = front_of_sums(parts)
        allowed = (sums[:, 1:] <= self.limits * (1 + 1e-9)).all(axis=1)
        chosen, sums = chosen[allowed], sums[allowed]
        if len(chosen):
            gained = gains(sums[:, self._spanning], front)
            yield from (_cascade(lists, chosen[place]) for place in np.argsort(-gained, kind="stable"))

    def _front(self, model: Surrogate, scores: Mapping[Cascade, float]) -> Array:
        """Return the Pareto front (F, 1 + len(minimised)) of the cascades in ``scores``: sum of contributions, then costs."""
        totals = model.totals(np.array([*scores.values()], dtype=float))
        columns = np.array([*scores], dtype=int).reshape(len(totals), len(self.costs)).T
        costs = sum((cost[own] for cost, own in zip(self.costs, columns, strict=True)), np.zeros((len(totals), len(self.limits))))
        points = np.column_stack([totals, costs])[:, self._spanning]
        return np.asarray(points[moocore.is_nondominated(points)] if len(points) else points)

    @property
    def _spanning(self) -> list[int]:
        """Indices of the minimised columns among (score, all kinds of cost)."""
        return [0, *(1 + kind for kind in self.minimised)]


def _cascade(lists: Sequence[Indices], places: Sequence[int]) -> Cascade:
    return tuple(int(kept[place]) for kept, place in zip(lists, places, strict=True))


def _best_first(values: Sequence[Array], best: Cascade) -> Iterator[Cascade]:
    """Yield ``best``, then the cascades that differ from it in one expert, best first."""
    yield best
    exchanges = [
        (value[place] - value[best[expert]], expert, place)
        for expert, value in enumerate(values)
        for place in range(len(value))
        if place != best[expert]
    ]
    for _, expert, place in sorted(exchanges):
        yield (*best[:expert], place, *best[expert + 1 :])
