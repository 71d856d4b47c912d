"""Probability that a candidate can be trained, learned from those that could and those that failed.

The model is the surrogate's own Gaussian process over one expert's choices, fitted to 1 for each candidate that was trained and 0
for each that failed. The mean of such labels is a probability. Far from all candidates it is the share that was trained.

Shapes: ``M`` candidates, ``D`` choices, ``P`` points.
"""

import numpy as np
from numpy.typing import NDArray

from meme_nas.surrogate.kernel import Array, Candidates
from meme_nas.surrogate.model import Surrogate

MOST_LABELS = 256  # of each kind no more than half as many, the latest
LEAST_CHANCE = 0.01  # so that no place is written off


def chances(choices: Array, trained: NDArray[np.bool_], points: Array) -> Array:
    """Return (P,) the probability that each of ``points`` (P, D) can be trained.

    ``choices`` (M, D) are those of earlier candidates, ``trained`` (M,) says which of them did not fail. Where none failed, or
    all did, no place is known to be better than another.
    """
    succeeded, failed = np.flatnonzero(trained), np.flatnonzero(~trained)
    if not len(succeeded) or not len(failed):
        return np.ones(len(points))
    kept = np.sort(np.concatenate([succeeded[-MOST_LABELS // 2 :], failed[-MOST_LABELS // 2 :]]))
    labels, own = trained[kept].astype(float), Candidates(choices[kept], np.full(len(kept), np.nan))
    model = Surrogate([own], [[place] for place in range(len(kept))], [*labels])
    return np.clip(labels.mean() + model.expected(1, points), LEAST_CHANCE, 1.0)
