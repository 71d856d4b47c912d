"""Prior covariance of the experts' contributions to a score, and the choice of its hyperparameters by marginal likelihood.

The model of a cascade s, in which expert n is candidate m_n(s)::

    y_s                   = sum_n c_n(m_n(s)) + e_s
    cov[c_n(m), c_n(m')]  = a v_n (w_x exp(-1/2 sum_d q_nd (x_md - x_m'd)^2) + w_l l_m l_m' + w_o (m = m'))
    var[e_s]              = a N r

============  ========================  =====================================================================================
y_s           ``Scale.standardised``    The score or its logarithm, less its mean, over its standard deviation
c_n                                     Contribution of a candidate of expert n, independent of the other experts'
x_md          ``Candidates.choices``    Choice d of candidate m, scaled to [0, 1]
l_m           ``standardised_losses``   Interval loss of candidate m, standardised over the expert's candidates
w_x w_l w_o   ``Kernel.shares``         Shares of the variance: smooth in the choices, linear in the loss, the candidate's own
q_nd          ``Kernel.precisions``     Inverse squared length scale of choice d of expert n
v_n           ``Kernel.variances``      Variance of the contributions of expert n, relative to the other experts
r             ``Kernel.noise``          Variance of the residual e_s, divided by N a
a             ``Fit.amplitude``         Factor of all variances; its maximum-likelihood value has a closed form
============  ========================  =====================================================================================

Every expert has its own variance, and every choice its own length scale in every expert, because a choice that matters to one
expert may not matter to another. The hyperparameters maximise the marginal likelihood. They are found on a coarse grid, and then
by coordinate ascent from its best point.

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
# Further values that the coordinate ascent tries.
_SMOOTHER = ((0.8, 0.1, 0.1), (0.8, 0.0, 0.2), (0.95, 0.0, 0.05))
_STRETCHES = (0.1, 0.33, 3.0)  # factors of an inverse squared length, or of an expert's variance
_SHORTEST, _LONGEST = 0.13, 2.2  # length scales; longer ones give nearly straight lines, which extrapolate too far
_PASSES = 2
_JITTER = 1e-9

LEAST_TO_CLIMB = 8  # scores; fewer hardly distinguish one length scale from another
MOST_TO_CLIMB = 256  # scores; with more, the choice of the kernel takes seconds and changes little


@dataclass(frozen=True, eq=False)
class Candidates:
    """Choices and interval losses of one expert's candidates."""

    choices: Array
    """(M, D), each choice scaled to [0, 1]."""
    losses: Array
    """(M,) interval losses. A missing one is NaN and counts as the mean of the others."""

    @property
    def standardised_losses(self) -> Array:
        """Interval losses (M,) with mean 0 and variance 1; zeros if all are equal."""
        known = self.losses[np.isfinite(self.losses)]
        if not len(known) or known.std() == 0:
            return np.zeros(len(self.losses))
        return np.where(np.isfinite(self.losses), (self.losses - known.mean()) / known.std(), 0.0)


@dataclass(frozen=True, eq=False)
class Kernel:
    """Prior covariance of the candidates' contributions. Experts are independent of each other."""

    shares: tuple[float, float, float]
    """Shares of a contribution's variance: smooth in the choices, linear in the interval loss, the candidate's own."""
    noise: float
    """Variance of the residual that the additive model cannot explain, divided by N, as a multiple of the amplitude."""
    precisions: tuple[Array, ...]
    """Inverse squared length scales (D,) of the choices, for each expert."""
    variances: tuple[float, ...]
    """Variance of each expert's contributions, relative to the other experts."""

    def smooth(self, expert: int, a: Array, b: Array) -> Array:
        """Return the similarity (A, B), from 0 to 1, of choices ``a`` (A, D) and ``b`` (B, D) of ``expert`` (from 0)."""
        scale = np.sqrt(self.precisions[expert])
        return np.asarray(np.exp(-0.5 * cdist(a * scale, b * scale, "sqeuclidean")))

    def between(self, expert: int, a: Candidates, chosen_a: Indices, b: Candidates, chosen_b: Indices) -> Array:
        """Return the covariance (len(chosen_a), len(chosen_b)) of two sets of contributions of ``expert`` (from 0).

        ``chosen_a`` are indices into the candidates ``a``, ``chosen_b`` into ``b``.
        """
        smooth, linear, own = self.shares
        alike = self.smooth(expert, a.choices[chosen_a], b.choices[chosen_b])
        loss = np.outer(a.standardised_losses[chosen_a], b.standardised_losses[chosen_b])
        return self.variances[expert] * (smooth * alike + linear * loss + own * (chosen_a[:, None] == chosen_b[None]))

    def diagonal(self, expert: int, own: Candidates, chosen: Indices) -> Array:
        """Return the prior variances (len(chosen),) of the contributions of candidates ``chosen`` of ``own``."""
        smooth, linear, alone = self.shares
        return self.variances[expert] * (smooth + linear * own.standardised_losses[chosen] ** 2 + alone)


@dataclass(frozen=True)
class Scale:
    """The sum of contributions as a function of the score: the score or its logarithm, less its mean, over its deviation."""

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
        """Return the log determinant of the derivative of ``standardised``, so that both kinds of scale can be compared."""
        return -len(scores) * math.log(self.deviation) - (float(np.log(scores).sum()) if self.is_log else 0.0)


@dataclass(frozen=True, eq=False)
class Fit:
    """A kernel with the posterior that the scores give it."""

    kernel: Kernel
    scale: Scale
    factor: tuple[Array, bool]
    """Cholesky factor (S, S) of the covariance of the scores at amplitude 1."""
    weights: Array
    """Inverse covariance times standardised scores (S,). The posterior mean is linear in them, whatever the amplitude."""
    amplitude: float
    """Factor of all variances, at its maximum-likelihood value."""
    likelihood: float
    """Log marginal likelihood of the scores, less a constant."""


class Evidence:
    """Scored cascades, with the parts of their covariance that are independent of the kernel or were computed before."""

    def __init__(self, candidates: Sequence[Candidates], cascades: Indices, scores: Array):
        self.scores, self.experts = scores, range(len(candidates))
        self.allowed = [Scale.of(scores, is_log) for is_log in (False, True) if not is_log or (scores > 0).all()]
        """Scales that the scores permit: the logarithm only if all scores are above 0."""
        # A candidate is part of several cascades. Its similarity to others is computed once.
        self._places = [np.unique(cascades[:, expert], return_inverse=True) for expert in self.experts]
        self._choices = [own.choices[kept] for own, (kept, _) in zip(candidates, self._places, strict=True)]
        chosen = [(own.standardised_losses[column], column) for own, column in zip(candidates, cascades.T, strict=True)]
        self._linear = [np.outer(losses, losses) for losses, _ in chosen]
        self._alone = [(column[:, None] == column[None]).astype(float) for _, column in chosen]
        self._smooth: dict[tuple[int, bytes], Array] = {}

    @property
    def choices(self) -> list[int]:
        """Number of choices of every expert."""
        return [own.shape[1] for own in self._choices]

    def fits(self, kernel: Kernel, scales: Sequence[Scale]) -> list[Fit]:
        """Return the fit of ``kernel`` on each of ``scales``, from one Cholesky decomposition."""
        smooth, linear, own = kernel.shares
        covariance = np.zeros((len(self.scores),) * 2)
        for expert, variance in enumerate(kernel.variances):
            parts = smooth * self._alike(kernel, expert) + linear * self._linear[expert] + own * self._alone[expert]
            covariance += variance * parts
        covariance[np.diag_indices_from(covariance)] += len(self.experts) * kernel.noise + _JITTER
        factor = cho_factor(covariance, lower=True, overwrite_a=True)
        return [_fit(kernel, scale, factor, self.scores) for scale in scales]

    def _alike(self, kernel: Kernel, expert: int) -> Array:
        """Return the similarity (S, S) of the cascades' choices of ``expert``. Recent results are cached: the coordinate ascent
        changes one expert at a time."""
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
    """Return the fit that maximises the marginal likelihood of ``scores`` (S,) of ``cascades`` (S, N).

    Of more than ``MOST_TO_CLIMB`` scores, that many, evenly spaced, choose the hyperparameters; all give the posterior.
    """
    evidence = Evidence(candidates, cascades, scores)
    if len(scores) <= MOST_TO_CLIMB:
        return _chosen(evidence)
    some = np.linspace(0, len(scores) - 1, MOST_TO_CLIMB).round().astype(int)
    fit = _chosen(Evidence(candidates, cascades[some], scores[some]))
    return refitted(evidence, fit)


def refitted(evidence: Evidence, like: Fit) -> Fit:
    """Return the fit of ``evidence`` with the kernel of an earlier fit, and on its scale if the scores permit that."""
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
    """Return the fit that coordinate ascent reaches from ``best``.

    The first passes change one length scale at a time for all experts together, the later ones each expert's own length scales
    and variances. Every pass ends with a new choice of shares and noise.
    """
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
    """Return copies of ``kernel`` with other variances of ``expert``."""
    before, own, after = kernel.variances[:expert], kernel.variances[expert], kernel.variances[expert + 1 :]
    return [replace(kernel, variances=(*before, own * factor, *after)) for factor in _STRETCHES]


def _stretched(kernel: Kernel, experts: Sequence[int], choice: int) -> list[Kernel]:
    """Return copies of ``kernel`` with other length scales of ``choice`` for ``experts``, within the bounds on length scales."""
    found = []
    for factor in _STRETCHES:
        precisions = [own.copy() for own in kernel.precisions]
        for expert in experts:
            precisions[expert][choice] *= factor
        if all(_LONGEST**-2 <= precisions[expert][choice] <= _SHORTEST**-2 for expert in experts):
            found.append(replace(kernel, precisions=tuple(precisions)))
    return found
