"""Probability that a candidate can be trained, learned from earlier candidates that were trained or failed.

The model is the surrogate's Gaussian process over one expert's choices. It is fitted to labels: 1 for a candidate that was
trained, 0 for one that failed. Its posterior mean is the probability. Far from all candidates it is the share that was trained.

Shapes: ``M`` candidates, ``D`` choices, ``P`` points.
"""

import numpy as np
from numpy.typing import NDArray

from meme_nas.surrogate.kernel import Array, Candidates
from meme_nas.surrogate.model import Surrogate

MOST_LABELS = 256  # half of them, the latest, of each kind
LEAST_CHANCE = 0.01  # above 0, so that no region is excluded for good


def chances(choices: Array, trained: NDArray[np.bool_], points: Array) -> Array:
    """Return the probabilities (P,) that candidates with choices ``points`` (P, D) can be trained.

    ``choices`` (M, D) are those of earlier candidates. ``trained`` (M,) is true for those that did not fail. All probabilities
    are 1 if no candidate failed, or if all did.
    """
    succeeded, failed = np.flatnonzero(trained), np.flatnonzero(~trained)
    if not len(succeeded) or not len(failed):
        return np.ones(len(points))
    kept = np.sort(np.concatenate([succeeded[-MOST_LABELS // 2 :], failed[-MOST_LABELS // 2 :]]))
    labels, own = trained[kept].astype(float), Candidates(choices[kept], np.full(len(kept), np.nan))
    model = Surrogate([own], [[place] for place in range(len(kept))], [*labels])
    return np.clip(labels.mean() + model.expected(1, points), LEAST_CHANCE, 1.0)
