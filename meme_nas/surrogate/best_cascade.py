"""Search for the best cascade within cost limits, when value and costs are sums over experts.

Shapes: ``N`` experts, ``M`` candidates of one expert, ``K`` kinds of cost.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

ROUNDS = 40  # iterations of the price search; price changes shrink from one to the next


def best_sum(values: Sequence[Array], costs: Sequence[Array], limits: Array) -> tuple[int, ...]:
    """Return one candidate of each expert with a low sum of ``values`` (M,), within the limits on costs.

    The costs of a cascade are the sum of its rows of ``costs`` (M, K) and must not exceed ``limits`` (K,).

    Lagrange relaxation: a kind of cost that exceeds its limit gets a price, which is raised until the limit is kept. Similar
    candidates change together at one price, so single candidates are then exchanged while that lowers the sum within the limits.
    The result is optimal if no limit binds, else approximate. If no cascade keeps the limits, it is the one that exceeds them
    least in proportion.
    """
    prices = np.zeros(len(limits))
    unit = _spread(values) / np.maximum(_spreads(costs), 1e-12)  # at this price cost matters as much as value
    steps, found = np.full(len(limits), 1.0), []
    for _ in range(ROUNDS):
        chosen = _cheapest(values, costs, prices * unit)
        over = _total(costs, chosen) > limits * (1 + 1e-12)
        if not over.any():
            found.append(chosen)
            if not prices.any():
                break
        prices = np.where(over, prices + steps, np.maximum(prices - steps, 0.0))
        steps *= np.where(over == (prices > 0), 0.8, 0.9)
    if found:
        return _exchanged(values, costs, limits, min(found, key=lambda chosen: _value(values, chosen)))
    return _least_over(values, costs, limits)


def _exchanged(values: Sequence[Array], costs: Sequence[Array], limits: Array, chosen: tuple[int, ...]) -> tuple[int, ...]:
    """Return ``chosen`` after exchanges of single candidates, each the one that lowers the sum most within the limits."""
    while True:
        total, best = _total(costs, chosen), (0.0, chosen)
        for expert, (value, cost) in enumerate(zip(values, costs, strict=True)):
            gain = value - value[chosen[expert]]
            fits = (total - cost[chosen[expert]] + cost <= limits * (1 + 1e-12)).all(axis=1)
            place = int(np.where(fits, gain, np.inf).argmin())
            if fits[place] and gain[place] < best[0]:
                best = float(gain[place]), (*chosen[:expert], place, *chosen[expert + 1 :])
        if best[1] == chosen:
            return chosen
        chosen = best[1]


def _cheapest(values: Sequence[Array], costs: Sequence[Array], prices: Array) -> tuple[int, ...]:
    """Return each expert's candidate with the lowest value plus priced costs; of equals, the one with the lowest relative costs.

    Without that rule a limit could exclude a best cascade although an equal one keeps it.
    """
    relative = [(cost / np.maximum(cost.max(axis=0), 1e-12)).sum(axis=1) for cost in costs]
    priced = [value + cost @ prices for value, cost in zip(values, costs, strict=True)]
    return tuple(int(np.lexsort(each)[0]) for each in zip(relative, priced, strict=True))


def _least_over(values: Sequence[Array], costs: Sequence[Array], limits: Array) -> tuple[int, ...]:
    weights = 1e6 * _spread(values) / np.maximum(np.abs(limits), 1e-12)
    return _cheapest(values, costs, weights)


def _total(costs: Sequence[Array], chosen: Sequence[int]) -> Array:
    return sum(cost[place] for cost, place in zip(costs, chosen, strict=True))


def _value(values: Sequence[Array], chosen: Sequence[int]) -> float:
    return float(sum(value[place] for value, place in zip(values, chosen, strict=True)))


def _spread(values: Sequence[Array]) -> float:
    return float(sum(np.ptp(value) for value in values)) or 1.0


def _spreads(costs: Sequence[Array]) -> Array:
    return sum(np.ptp(cost, axis=0) for cost in costs)
