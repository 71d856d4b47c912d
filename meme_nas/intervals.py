"""Confidence intervals of differences between two configurations that were trained with the same seeds.

Both sides of a difference share data order, noise and initial weights of a training seed, so the differences are paired. All
intervals are two-sided at 95 %.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean difference with its confidence interval; without a second seed the interval is infinite."""

    mean: float
    low: float
    high: float
    count: int
    """Training seeds behind it."""

    @property
    def excludes_zero(self) -> bool:
        """Return whether the two sides differ at this level."""
        return self.low > 0 or self.high < 0


def log_ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float] | None:
    """Return the logarithm of each ratio; None where a score is not above 0, as an unbiased KID can be."""
    if min(*ours, *theirs) <= 0:
        return None
    return [math.log(one / other) for one, other in zip(ours, theirs, strict=True)]


def paired(differences: Sequence[float]) -> Interval:
    """Return Student's interval of the mean of ``differences``, one for each training seed."""
    values = np.asarray(differences, dtype=float)
    if len(values) < 2:
        return Interval(float(values.mean()), -math.inf, math.inf, len(values))
    return _interval(float(values.mean()), float(values.var(ddof=1)) / len(values), len(values) - 1, len(values))


def crossed(differences: ArrayLike) -> Interval:
    """Return the interval of the mean of ``differences`` (S, T) over S search seeds and T training seeds, both random.

    Two-way analysis of variance without replication: the variance of the mean is (MS_S + MS_T - MS_residual) / (S T), with
    Satterthwaite's degrees of freedom. It is never taken to be less than either main effect's own share, since a difference of
    mean squares can be negative. With one search seed, or one training seed, the other is what is averaged over.
    """
    values = np.asarray(differences, dtype=float)
    searches, seeds = values.shape
    if searches == 1 or seeds == 1:
        return paired(values.ravel().tolist())
    mean, rows, columns = values.mean(), values.mean(axis=1), values.mean(axis=0)
    residual = values - rows[:, None] - columns[None, :] + mean
    of_searches = seeds * np.square(rows - mean).sum() / (searches - 1)
    of_seeds = searches * np.square(columns - mean).sum() / (seeds - 1)
    of_residual = np.square(residual).sum() / ((searches - 1) * (seeds - 1))
    total, largest = of_searches + of_seeds - of_residual, max(of_searches, of_seeds)
    if total <= largest:
        freedom = searches - 1 if of_searches >= of_seeds else seeds - 1
        return _interval(float(mean), largest / values.size, freedom, seeds)
    parts = (of_searches, searches - 1), (of_seeds, seeds - 1), (of_residual, (searches - 1) * (seeds - 1))
    freedom = total**2 / sum(square**2 / count for square, count in parts)
    return _interval(float(mean), total / values.size, freedom, seeds)


def _interval(mean: float, variance: float, freedom: float, count: int) -> Interval:
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * math.sqrt(variance)
    return Interval(mean, mean - half, mean + half, count)
