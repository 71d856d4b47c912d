"""Pareto front of points whose values and costs are sums over experts, and the hypervolume that further points would add.

Weighted sums find only those points of a front that are on its convex hull. This module builds the whole front, expert by expert.
A part of a point on the front is itself on the front of its expert, so dominated partial sums are dropped at each step.

Shapes: ``N`` experts, ``M`` candidates of one expert, ``K`` objectives, all minimised, ``P`` points, ``F`` points of a front.
"""

from collections.abc import Sequence

import moocore
import numpy as np
from numpy.typing import NDArray

from meme_nas.surrogate.kernel import Indices

Array = NDArray[np.float64]

MOST_SUMS = 256  # partial sums that are kept after each expert; with one kind of cost there are seldom more
MARGIN = 0.1  # distance of the reference point from the worst value of each objective, as a share of its range


def front_of_sums(parts: Sequence[Array]) -> tuple[Indices, Array]:
    """Return the Pareto front of all sums of one row of each of ``parts`` (M, K): candidates (P, N) and sums (P, K).

    The front is complete if no partial front has more than ``MOST_SUMS`` points.
    """
    chosen, sums = np.empty((1, 0), dtype=np.int64), np.zeros((1, parts[0].shape[1]))
    for part in parts:
        own = np.flatnonzero(moocore.is_nondominated(part))
        sums = (sums[:, None] + part[own]).reshape(-1, part.shape[1])
        chosen = np.column_stack([np.repeat(chosen, len(own), axis=0), np.tile(own, len(chosen))])
        kept = np.flatnonzero(moocore.is_nondominated(sums))
        kept = kept[np.argsort(sums[kept, 0], kind="stable")]
        if len(kept) > MOST_SUMS:
            kept = kept[np.linspace(0, len(kept) - 1, MOST_SUMS).round().astype(int)]
        chosen, sums = chosen[kept], sums[kept]
    return chosen, sums


def gains(points: Array, front: Array) -> Array:
    """Return the hypervolumes (P,) that each of ``points`` (P, K) alone would add to ``front`` (F, K).

    Objectives are scaled to [0, 1] over all points. A dominated point gets a negative number: minus the least improvement, as a
    share of each objective's range, with which it would reach the front. So points near the front rank above points far from it.
    """
    everything = np.vstack([points, front])
    low, high = everything.min(axis=0), everything.max(axis=0)
    ranges = np.where(high > low, high - low, 1.0)
    points, front = (points - low) / ranges, (front - low) / ranges
    reference = np.full(points.shape[1], 1.0 + MARGIN)
    if not len(front):
        return np.asarray((reference - points).prod(axis=1))
    behind = (points[:, None] - front).min(axis=2).max(axis=1)  # (P,): above 0 if dominated, 0 if equal to a point of the front
    before = moocore.hypervolume(front, ref=reference)
    with_each = np.array([moocore.hypervolume(np.vstack([front, point]), ref=reference) for point in points])
    return np.where(behind >= 0, -behind, with_each - before)
