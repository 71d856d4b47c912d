"""What is believed of the experts' contributions before any is seen, and which belief makes the scores likeliest.

A Gaussian process' prior covariance. Experts differ in how much they matter, and every choice of every expert has a length of
its own over which it makes a difference: what expertization does to one expert, a split may do to another, or nothing at all.
These, the shares and the noise are those under which the scores are likeliest, found by climbing from a coarse grid.

Shapes: ``N`` experts, ``S`` scored cascades, ``M`` candidates of one expert, ``D`` choices of one expert.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.spatial.distance import cdist

Array = NDArray[np.float64]
Indices = NDArray[np.integer]

# The grid. Lengths are in units of a choice's range.
_SHARES = ((0.6, 0.2, 0.2), (0.3, 0.5, 0.2), (0.3, 0.2, 0.5))
_LENGTHS = (0.3, 0.8)
_NOISES = (1e-3, 1e-2, 1e-1)
# What climbing tries beside it.
_SMOOTHER = ((0.8, 0.1, 0.1), (0.8, 0.0, 0.2), (0.95, 0.0, 0.05))
_STRETCHES = (0.1, 0.33, 3.0)  # of an inverse squared length, or an expert's variance
_SHORTEST, _LONGEST = 0.13, 2.2  # lengths; nearly straight lines would be believed far from what was seen
_PASSES = 2
_JITTER = 1e-9

LEAST_TO_CLIMB = 8  # scores; fewer tell hardly one length from another
MOST_TO_CLIMB = 256  # a choice of kernel by more would cost seconds, and differ little


@dataclass(frozen=True, eq=False)
class Candidates:
    """What is known of one expert's candidates."""

    choices: Array
    """(M, D), each choice scaled to [0, 1]."""
    losses: Array
    """(M,) interval losses; a missing one is NaN, and then counts as their mean."""

    @property
    def standardised_losses(self) -> Array:
        """(M,) with mean 0 and, where they differ at all, variance 1."""
        known = self.losses[np.isfinite(self.losses)]
        if not len(known) or known.std() == 0:
            return np.zeros(len(self.losses))
        return np.where(np.isfinite(self.losses), (self.losses - known.mean()) / known.std(), 0.0)


@dataclass(frozen=True, eq=False)
class Kernel:
    """Prior covariance of what candidates contribute; experts are independent of each other."""

    shares: tuple[float, float, float]
    """Of a contribution's variance: by its choices (smooth), by its interval loss (linear), and by what is its own alone."""
    noise: float
    """Variance of what is no sum over experts, over that of a contribution."""
    precisions: tuple[Array, ...]
    """Of each expert (D,): inverse squares of the lengths over which its choices make a difference."""
    variances: tuple[float, ...]
    """Of each expert's contributions, relative to each other."""

    def smooth(self, expert: int, a: Array, b: Array) -> Array:
        """(A, B): how alike choices (A, D) and (B, D) of ``expert`` (from 0) are."""
        scale = np.sqrt(self.precisions[expert])
        return np.asarray(np.exp(-0.5 * cdist(a * scale, b * scale, "sqeuclidean")))

    def between(self, expert: int, a: Candidates, chosen_a: Indices, b: Candidates, chosen_b: Indices) -> Array:
        """(len(chosen_a), len(chosen_b)) for candidates ``chosen_a`` of ``a``; both are candidates of ``expert``, from 0."""
        smooth, linear, own = self.shares
        alike = self.smooth(expert, a.choices[chosen_a], b.choices[chosen_b])
        loss = np.outer(a.standardised_losses[chosen_a], b.standardised_losses[chosen_b])
        return self.variances[expert] * (smooth * alike + linear * loss + own * (chosen_a[:, None] == chosen_b[None]))

    def diagonal(self, expert: int, own: Candidates, chosen: Indices) -> Array:
        """(len(chosen),): of ``between`` candidates and themselves."""
        smooth, linear, alone = self.shares
        return self.variances[expert] * (smooth + linear * own.standardised_losses[chosen] ** 2 + alone)


@dataclass(frozen=True)
class Scale:
    """What contributions add up to: the score or its logarithm, less its mean, over its standard deviation."""

    is_log: bool
    mean: float
    deviation: float

    @classmethod
    def of(cls, scores: Array, is_log: bool) -> "Scale":
        values = np.log(scores) if is_log else scores
        return cls(is_log, float(values.mean()), float(values.std()) or 1.0)

    def standardised(self, scores: Array) -> Array:
        return ((np.log(scores) if self.is_log else scores) - self.mean) / self.deviation

    def log_jacobian(self, scores: Array) -> float:
        """Logarithm of how densely standardised values lie where scores do."""
        return -len(scores) * math.log(self.deviation) - (float(np.log(scores).sum()) if self.is_log else 0.0)


@dataclass(frozen=True, eq=False)
class Fit:
    """A kernel and the scores."""

    kernel: Kernel
    scale: Scale
    factor: tuple[Array, bool]
    """Of the covariance of the scores, amplitude 1."""
    weights: Array
    """(S,), for predictions; they do not depend on the amplitude."""
    amplitude: float
    """By which all variances are multiplied: its likeliest value."""
    likelihood: float
    """Logarithm of the scores' marginal likelihood, less a constant."""


class Evidence:
    """Scored cascades, and what of their covariance does not depend on the kernel or was needed before."""

    def __init__(self, candidates: Sequence[Candidates], cascades: Indices, scores: Array):
        self.scores, self.experts = scores, range(len(candidates))
        self.allowed = [Scale.of(scores, is_log) for is_log in (False, True) if not is_log or (scores > 0).all()]
        """What the scores can be on."""
        # Candidates stand in several cascades each: their similarities are looked at once.
        self._places = [np.unique(cascades[:, expert], return_inverse=True) for expert in self.experts]
        self._choices = [own.choices[kept] for own, (kept, _) in zip(candidates, self._places, strict=True)]
        chosen = [(own.standardised_losses[column], column) for own, column in zip(candidates, cascades.T, strict=True)]
        self._linear = [np.outer(losses, losses) for losses, _ in chosen]
        self._alone = [(column[:, None] == column[None]).astype(float) for _, column in chosen]
        self._smooth: dict[tuple[int, bytes], Array] = {}

    @property
    def choices(self) -> list[int]:
        """How many there are of every expert."""
        return [own.shape[1] for own in self._choices]

    def fits(self, kernel: Kernel, scales: Sequence[Scale]) -> list[Fit]:
        smooth, linear, own = kernel.shares
        covariance = np.zeros((len(self.scores),) * 2)
        for expert, variance in enumerate(kernel.variances):
            parts = smooth * self._alike(kernel, expert) + linear * self._linear[expert] + own * self._alone[expert]
            covariance += variance * parts
        covariance[np.diag_indices_from(covariance)] += len(self.experts) * kernel.noise + _JITTER
        factor = cho_factor(covariance, lower=True, overwrite_a=True)
        return [_fit(kernel, scale, factor, self.scores) for scale in scales]

    def _alike(self, kernel: Kernel, expert: int) -> Array:
        """(S, S) of the choices alone. The last ones are kept: a climber moves one expert at a time."""
        key = expert, kernel.precisions[expert].tobytes()
        if key not in self._smooth:
            if len(self._smooth) > 2 * len(self.experts) * len(_STRETCHES):
                self._smooth.clear()
            own, (_, places) = self._choices[expert], self._places[expert]
            self._smooth[key] = kernel.smooth(expert, own, own)[np.ix_(places, places)]
        return self._smooth[key]


def _fit(kernel: Kernel, scale: Scale, factor: tuple[Array, bool], scores: Array) -> Fit:
    targets, count = scale.standardised(scores), len(scores)
    weights = cho_solve(factor, targets)
    amplitude = max(float(targets @ weights) / count, _JITTER)
    determinant = 2 * np.log(factor[0].diagonal()).sum() + count * np.log(amplitude)
    return Fit(kernel, scale, factor, weights, amplitude, -0.5 * determinant + scale.log_jacobian(scores))


def likeliest(candidates: Sequence[Candidates], cascades: Indices, scores: Array) -> Fit:
    """The fit under which ``scores`` (S,) of ``cascades`` (S, N) are likeliest; of many, some decide on the kernel."""
    evidence = Evidence(candidates, cascades, scores)
    if len(scores) <= MOST_TO_CLIMB:
        return _chosen(evidence)
    some = np.linspace(0, len(scores) - 1, MOST_TO_CLIMB).round().astype(int)
    fit = _chosen(Evidence(candidates, cascades[some], scores[some]))
    return refitted(evidence, fit)


def refitted(evidence: Evidence, like: Fit) -> Fit:
    """With the kernel of an earlier fit, and on its scale where the scores allow it."""
    scales = [scale for scale in evidence.allowed if scale.is_log == like.scale.is_log] or evidence.allowed
    return max(evidence.fits(like.kernel, scales), key=lambda fit: fit.likelihood)


def _chosen(evidence: Evidence) -> Fit:
    best = max((fit for kernel in _grid(evidence) for fit in evidence.fits(kernel, evidence.allowed)), key=lambda f: f.likelihood)
    return best if len(evidence.scores) < LEAST_TO_CLIMB else _climbed(evidence, best)


def _grid(evidence: Evidence) -> Iterator[Kernel]:
    for length, shares, noise in itertools.product(_LENGTHS, _SHARES, _NOISES):
        lengths = tuple(np.full(count, length**-2) for count in evidence.choices)
        yield Kernel(shares, noise, lengths, (1.0,) * len(evidence.experts))


def _climbed(evidence: Evidence, best: Fit) -> Fit:
    """One length at a time, first the same for all experts, then of each, and then the variance of each; after every pass shares
    and noise anew."""
    everyone = [(tuple(evidence.experts), choice) for choice in range(min(evidence.choices))]
    each = [((expert,), choice) for expert, count in enumerate(evidence.choices) for choice in range(count)]
    for stretched in _PASSES * [everyone] + _PASSES * [each]:
        for experts, choice in stretched:
            best = _best(evidence, best, _stretched(best.kernel, experts, choice))
        if stretched is each:
            for expert in evidence.experts:
                best = _best(evidence, best, _weighed(best.kernel, expert))
        options = itertools.product(_SHARES + _SMOOTHER, _NOISES)
        best = _best(evidence, best, [replace(best.kernel, shares=shares, noise=noise) for shares, noise in options])
    return best


def _best(evidence: Evidence, best: Fit, kernels: Sequence[Kernel]) -> Fit:
    fits = [fit for kernel in kernels for fit in evidence.fits(kernel, [best.scale])]
    return max([best, *fits], key=lambda fit: fit.likelihood)


def _weighed(kernel: Kernel, expert: int) -> list[Kernel]:
    """With another variance of ``expert``."""
    before, own, after = kernel.variances[:expert], kernel.variances[expert], kernel.variances[expert + 1 :]
    return [replace(kernel, variances=(*before, own * factor, *after)) for factor in _STRETCHES]


def _stretched(kernel: Kernel, experts: Sequence[int], choice: int) -> list[Kernel]:
    """With other lengths of ``choice`` for ``experts``, as far as they are allowed."""
    found = []
    for factor in _STRETCHES:
        precisions = [own.copy() for own in kernel.precisions]
        for expert in experts:
            precisions[expert][choice] *= factor
        if all(_LONGEST**-2 <= precisions[expert][choice] <= _SHORTEST**-2 for expert in experts):
            found.append(replace(kernel, precisions=tuple(precisions)))
    return found
