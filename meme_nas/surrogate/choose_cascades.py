"""Which cascades to score next, out of the candidates that are trained."""

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
"""Which candidate each expert is, from 0; expert 1, nearest to the data, first."""

FRONT_TURN = 4  # one of so many cascades looks for the front, and not for the winner
ATTEMPTS = 12
STRANDS = 4  # of cascades that share nothing, so many of which can run at once without waiting


@dataclass(frozen=True, eq=False)
class Assembly:
    """What there is to choose from."""

    ready: tuple[Indices, ...]
    """For each expert the candidates that are trained."""
    costs: tuple[Array, ...]
    """(M, K) for each expert: what all its candidates add to the costs of a cascade."""
    winner_limits: Array
    """(K,) costs that a winner may have."""
    limits: Array
    """(K,) costs that any cascade may have."""
    minimised: tuple[int, ...] = ()
    """Which kinds of cost are minimised, and so span the front beside the score."""

    def choose(
        self,
        count: int,
        known: Collection[Cascade],
        model: Surrogate | None,
        source: np.random.Generator,
        scores: Mapping[Cascade, float] = MappingProxyType({}),
    ) -> list[Cascade]:
        """At most ``count`` cascades that are not ``known`` and keep the limits: the most promising under ``model``, or without
        one at random. Neighbours share most of their way from noise to data, but those that run at the same time do not, as
        they would wait for each other. ``scores`` are those of the known cascades that have one."""
        chosen: dict[Cascade, None] = {}
        for attempt in range(ATTEMPTS):
            missing = min(count, self.size - len(known)) - len(chosen)
            if missing <= 0:
                break
            if model is None or attempt:  # the model found no more that is new
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
        """Every candidate about as often as the others of its expert."""
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
        """The best under draws from the model (Thompson sampling) that are not ``taken``: most of them for the winner, one of
        every ``FRONT_TURN`` for the front, counted over all cascades of the search."""
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
        """The best cascade within the winner's limits, then those that differ from it in one expert, best first."""
        costs = [cost[kept] for cost, kept in zip(self.costs, lists, strict=True)]
        for places in _best_first(values, best_sum(values, costs, self.winner_limits)):
            cascade = _cascade(lists, places)
            if self._allowed(cascade, self.winner_limits):
                yield cascade

    def _front_first(self, lists: Sequence[Indices], values: Sequence[Array], front: Array) -> Iterator[Cascade]:
        """The cascades that no other beats under ``values``, first what adds most to the volume that ``front`` beats."""
        parts = [np.column_stack([v, cost[kept]]) for v, cost, kept in zip(values, self.costs, lists, strict=True)]
        chosen, sums = front_of_sums(parts)
        allowed = (sums[:, 1:] <= self.limits * (1 + 1e-9)).all(axis=1)
        chosen, sums = chosen[allowed], sums[allowed]
        if len(chosen):
            gained = gains(sums[:, self._spanning], front)
            yield from (_cascade(lists, chosen[place]) for place in np.argsort(-gained, kind="stable"))

    def _front(self, model: Surrogate, scores: Mapping[Cascade, float]) -> Array:
        """(F, 1 + minimised) of the cascades with ``scores``: what contributions add up to, and costs."""
        totals = model.totals(np.array([*scores.values()], dtype=float))
        columns = np.array([*scores], dtype=int).reshape(len(totals), len(self.costs)).T
        costs = sum((cost[own] for cost, own in zip(self.costs, columns, strict=True)), np.zeros((len(totals), len(self.limits))))
        points = np.column_stack([totals, costs])[:, self._spanning]
        return np.asarray(points[moocore.is_nondominated(points)] if len(points) else points)

    @property
    def _spanning(self) -> list[int]:
        """Columns of (score, all kinds of cost) that are minimised."""
        return [0, *(1 + kind for kind in self.minimised)]


def _cascade(lists: Sequence[Indices], places: Sequence[int]) -> Cascade:
    return tuple(int(kept[place]) for kept, place in zip(lists, places, strict=True))


def _best_first(values: Sequence[Array], best: Cascade) -> Iterator[Cascade]:
    """``best``, then what differs from it in one expert, best first."""
    yield best
    exchanges = [
        (value[place] - value[best[expert]], expert, place)
        for expert, value in enumerate(values)
        for place in range(len(value))
        if place != best[expert]
    ]
    for _, expert, place in sorted(exchanges):
        yield (*best[:expert], place, *best[expert + 1 :])
