"""Which cascades to score next, out of the candidates that are trained."""

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meme_nas.kernel import Indices
from meme_nas.pick import best_sum
from meme_nas.surrogate import Surrogate

Array = NDArray[np.float64]
Cascade = tuple[int, ...]
"""Which candidate each expert is, from 0; expert 1, nearest to the data, first."""

FRONT_SHARE = 0.25  # of the cascades, which look for the front and not for the winner
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

    def choose(
        self, count: int, known: Collection[Cascade], model: Surrogate | None, source: np.random.Generator
    ) -> list[Cascade]:
        """At most ``count`` cascades that are not ``known`` and keep the limits: the most promising under ``model``, or without
        one at random. Neighbours share most of their way from noise to data, but those that run at the same time do not, as
        they would wait for each other."""
        chosen: dict[Cascade, None] = {}
        for attempt in range(ATTEMPTS):
            missing = min(count, self.size - len(known)) - len(chosen)
            if missing <= 0:
                break
            if model is None or attempt:  # the model found no more that is new
                drawn = self._at_random(missing, source)
            else:
                drawn = self._hopeful(model, missing, {*known}, source)
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

    def _hopeful(self, model: Surrogate, count: int, taken: set[Cascade], source: np.random.Generator) -> list[Cascade]:
        """The best under draws from the model (Thompson sampling), or if that one is taken, the best that differs from it in one
        expert: most within the winner's limits, the last ones at a price of costs that is drawn at random."""
        draws = model.draws(count, source, self.ready)
        costs = [cost[kept] for cost, (kept, _) in zip(self.costs, draws, strict=True)]
        found = []
        for turn in range(count):
            values, limits = [drawn[turn] for _, drawn in draws], self.winner_limits
            if turn >= (1 - FRONT_SHARE) * count:
                prices = random_prices(values, costs, source)
                values, limits = [value + cost @ prices for value, cost in zip(values, costs, strict=True)], self.limits
            for places in _best_first(values, best_sum(values, costs, limits)):
                cascade = tuple(int(kept[place]) for (kept, _), place in zip(draws, places, strict=True))
                if cascade not in taken and self._allowed(cascade, limits):
                    taken.add(cascade)
                    found.append(cascade)
                    break
        return found


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


def random_prices(values: Sequence[Array], costs: Sequence[Array], source: np.random.Generator) -> Array:
    """(K,) such that each kind of cost weighs between a hundredth of what the values do and ten times as much."""
    spread = sum(np.ptp(value) for value in values)
    ranges = np.maximum(sum(np.ptp(cost, axis=0) for cost in costs), 1e-12)
    return 10 ** source.uniform(-2, 1, len(ranges)) * spread / ranges
