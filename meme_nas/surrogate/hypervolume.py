"""The Pareto front where values and costs are sums over experts, and what points would add to the volume that it beats.

Weighted sums find only those points of a front that lie on its convex hull. Here the whole front of the sums is built, expert by
expert: a part of a point on the front is itself on the front of its expert, so what is dominated is dropped at once.

Shapes: ``N`` experts, ``M`` candidates of one expert, ``K`` objectives, all minimised, ``P`` points, ``F`` points of a front.
"""

from collections.abc import Sequence

import moocore
import numpy as np
from numpy.typing import NDArray

from meme_nas.surrogate.kernel import Indices

Array = NDArray[np.float64]

MOST_SUMS = 256  # partial sums that are carried on; with one kind of cost there are seldom more
MARGIN = 0.1  # by which the reference point lies beyond the worst of each objective, as a share of its range


def front_of_sums(parts: Sequence[Array]) -> tuple[Indices, Array]:
    """Return the choices (P, N), one candidate of each expert, whose sums (P, K) of ``parts`` (M, K) no other choice beats.

    The front is whole as long as no partial front has more than ``MOST_SUMS`` points.
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
    """Return (P,) the volume that each of ``points`` (P, K) alone would add to what ``front`` (F, K) beats, as a share.

    A point that the front beats has the least share of the ranges by which it would have to be better, as a negative number, so
    that what nearly reaches the front comes before what is far from it.
    """
    everything = np.vstack([points, front])
    low, high = everything.min(axis=0), everything.max(axis=0)
    ranges = np.where(high > low, high - low, 1.0)
    points, front = (points - low) / ranges, (front - low) / ranges
    reference = np.full(points.shape[1], 1.0 + MARGIN)
    if not len(front):
        return np.asarray((reference - points).prod(axis=1))
    behind = (points[:, None] - front).min(axis=2).max(axis=1)  # (P,): over 0, or 0 of an equal, where the front beats it
    before = moocore.hypervolume(front, ref=reference)
    with_each = np.array([moocore.hypervolume(np.vstack([front, point]), ref=reference) for point in points])
    return np.where(behind >= 0, -behind, with_each - before)
