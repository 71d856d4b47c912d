"""Confidence intervals of differences between two configurations that were trained with the same seeds.

Both sides of a difference share data order, noise and initial weights of a training seed, so the differences are paired. All
intervals are two-sided at 95 %.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special, stats

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
    of_searches = seeds * np.square(rows - mean).sum() / (searches - 1)
    of_seeds = searches * np.square(columns - mean).sum() / (seeds - 1)
    of_residual = _residual_variance(values)
    total, largest = of_searches + of_seeds - of_residual, max(of_searches, of_seeds)
    if total <= largest:
        freedom = searches - 1 if of_searches >= of_seeds else seeds - 1
        return _interval(float(mean), largest / values.size, freedom, seeds)
    parts = (of_searches, searches - 1), (of_seeds, seeds - 1), (of_residual, (searches - 1) * (seeds - 1))
    freedom = total**2 / sum(square**2 / count for square, count in parts)
    return _interval(float(mean), total / values.size, freedom, seeds)


def pooled(values: ArrayLike, place: int, other: int) -> Interval:
    """Return the interval of row ``place`` less row ``other`` of ``values`` (K, T): K configs with the same T training seeds.

    The variance is what config and seed do not explain, pooled over all configs; with two it is the paired interval.
    """
    table = np.asarray(values, dtype=float)
    mean, (configs, seeds) = float((table[place] - table[other]).mean()), table.shape
    if seeds < 2:
        return Interval(mean, -math.inf, math.inf, seeds)
    return _interval(mean, 2 * _residual_variance(table) / seeds, (configs - 1) * (seeds - 1), seeds)


def behind_best(values: ArrayLike, place: int) -> Interval:
    """Return how far row ``place`` of ``values`` (K, T) lies above the lowest of the K true means, which is never less than 0.

    ``place`` must not be chosen by ``values``. Chance makes the lowest of the observed means too low, so the interval is that
    of multiple comparisons with the best (Hsu): the lower bound holds for all configs at once (Dunnett), and the upper one
    needs to hold for the best alone, whichever it is.
    """
    table = np.asarray(values, dtype=float)
    configs, seeds = table.shape
    means = table.mean(axis=1)
    gap = float(max(means[place] - np.delete(means, place), default=0.0))
    if configs < 2 or seeds < 2:
        return Interval(max(0.0, gap), 0.0, math.inf if configs > 1 else 0.0, seeds)
    freedom = (configs - 1) * (seeds - 1)
    error = math.sqrt(2 * _residual_variance(table) / seeds)
    low = gap - dunnett(configs - 1, freedom) * error
    high = gap + float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * error
    return Interval(max(0.0, gap), max(0.0, low), max(0.0, high), seeds)


@cache
def dunnett(comparisons: int, freedom: int) -> float:
    """Return Dunnett's one-sided critical value at (1 + LEVEL) / 2, for as many comparisons with one control.

    The comparisons share the control, so (Z_i - Z_0) / (S sqrt 2) of all i stay below it with that probability.
    """
    shared, weights = np.polynomial.hermite_e.hermegauss(64)
    weights = weights / weights.sum()
    quantiles = (np.arange(2_000) + 0.5) / 2_000
    deviations = np.sqrt(stats.chi2.ppf(quantiles, freedom) / freedom)

    def short_of_level(critical: float) -> float:
        below = special.ndtr(math.sqrt(2) * critical * deviations[:, None] + shared) ** comparisons
        return float((below @ weights).mean()) - (1 + LEVEL) / 2

    return float(optimize.brentq(short_of_level, 0.0, 1_000.0))


def _residual_variance(values: NDArray[np.float64]) -> float:
    """Return the mean square that rows and columns of ``values`` do not explain."""
    rows, columns = values.shape
    residual = values - values.mean(axis=1, keepdims=True) - values.mean(axis=0, keepdims=True) + values.mean()
    return float(np.square(residual).sum() / ((rows - 1) * (columns - 1)))


def _interval(mean: float, variance: float, freedom: float, count: int) -> Interval:
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * math.sqrt(variance)
    return Interval(mean, mean - half, mean + half, count)
