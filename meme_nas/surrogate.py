"""FID of cascades that were never drawn: a Gaussian process that adds up what each expert contributes.

A cascade's FID, or rather its logarithm, is nearly the sum of one number per expert. A contribution is modelled as what the
candidate's choices say (smooth), what its interval loss says (linear), and what is its own alone, such as the luck of its
training. Because the model is a sum, the best cascade under any of its draws is found expert by expert.

Shapes: ``N`` experts, ``S`` scored cascades, ``M`` candidates of one expert, ``D`` choices of one expert.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.spatial.distance import cdist

Array = NDArray[np.float64]
Indices = NDArray[np.integer]

# Shares of a contribution's variance: by its choices, by its interval loss, by itself; lengths in units of a choice's range.
_SHARES = ((0.6, 0.2, 0.2), (0.3, 0.5, 0.2), (0.3, 0.2, 0.5))
_LENGTHS = (0.3, 0.8)
_NOISES = (1e-3, 1e-2, 1e-1)  # variance that is no sum over experts, relative to the variance of the scores
_JITTER = 1e-9

LONG_LIST = 8  # shortlists of candidates, beyond which not all of them are looked at closely


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


@dataclass(frozen=True)
class _Kernel:
    """Prior covariance of one expert's contributions, and of what is no sum."""

    shares: tuple[float, float, float]
    length: float
    noise: float

    def between(self, a: Candidates, chosen_a: Indices, b: Candidates, chosen_b: Indices) -> Array:
        """(len(chosen_a), len(chosen_b)) for candidates ``chosen_a`` of ``a``; both are candidates of the same expert."""
        smooth, linear, own = self.shares
        distance = cdist(a.choices[chosen_a], b.choices[chosen_b], "sqeuclidean")
        loss = np.outer(a.standardised_losses[chosen_a], b.standardised_losses[chosen_b])
        alike = chosen_a[:, None] == chosen_b[None]
        return smooth * np.exp(-0.5 * distance / self.length**2) + linear * loss + own * alike

    def variances(self, own: Candidates, chosen: Indices) -> Array:
        """(len(chosen),) of each alone: the diagonal of ``between``."""
        smooth, linear, alone = self.shares
        return smooth + linear * own.standardised_losses[chosen] ** 2 + alone


class Surrogate:
    """Fitted to scored cascades; predicts every expert's contributions."""

    def __init__(
        self,
        candidates: Sequence[Candidates],
        cascades: Sequence[Sequence[int]],
        scores: Sequence[float],
        like: "Surrogate | None" = None,
    ):
        """``cascades`` (S, N): which candidate each expert is, from 0; ``scores`` (S,), lower is better. S is at least 1.

        The kernel, and whether contributions add up to a score or to its logarithm, are what makes the scores likeliest; or,
        which takes a small part of the time, as in the surrogate ``like``, where the scores allow it.
        """
        self.candidates = list(candidates)
        self._cascades = np.asarray(cascades, dtype=np.int64).reshape(len(scores), len(candidates))
        values = np.asarray(scores, dtype=np.float64)
        logs = [is_log for is_log in (False, True) if not is_log or (values > 0).all()]
        kernels = [_Kernel(*choice) for choice in itertools.product(_SHARES, _LENGTHS, _NOISES)]
        if like is not None and like._fit.scale.is_log in logs:
            logs, kernels = [like._fit.scale.is_log], [like._fit.kernel]
        fits = _fits(kernels, self.candidates, self._cascades, [_Scale.of(values, is_log) for is_log in logs], values)
        self._fit: _Fit = max(fits, key=lambda fit: fit.likelihood)
        self._scale = self._fit.scale.deviation
        self._credits: dict[int, Array] = {}

    def contributions(self, number: int) -> tuple[Array, Array]:
        """Mean and standard deviation (M,) of what each candidate of expert ``number`` adds to the score, or its logarithm."""
        everyone = np.arange(len(self.candidates[number - 1].choices))
        return self.credit(number), self._deviations(number, everyone)

    def credit(self, number: int) -> Array:
        """The mean (M,) alone, which takes little."""
        if number not in self._credits:
            everyone = np.arange(len(self.candidates[number - 1].choices))
            self._credits[number] = self._scale * (self._cross(number - 1, everyone) @ self._fit.weights)
        return self._credits[number]

    def _deviations(self, number: int, chosen: Indices) -> Array:
        cross = self._cross(number - 1, chosen)
        known = np.einsum("ms,sm->m", cross, cho_solve(self._fit.factor, cross.T))
        variance = self._fit.kernel.variances(self.candidates[number - 1], chosen) - known
        return self._deviation * np.sqrt(np.maximum(variance, 0.0))

    def predict(self, cascades: Sequence[Sequence[int]]) -> Array:
        """(len(cascades),) expected scores."""
        parts = [self.credit(number) for number in range(1, len(self.candidates) + 1)]
        rows = np.asarray(cascades, dtype=np.int64)
        total = self._fit.scale.mean + sum((part[rows[:, place]] for place, part in enumerate(parts)), np.zeros(len(rows)))
        return np.exp(total) if self._fit.scale.is_log else total

    def draws(
        self, count: int, source: np.random.Generator, ready: Sequence[Indices], shortlist: int = 64
    ) -> list[tuple[Indices, Array]]:
        """``count`` draws from the posterior of every expert's contributions.

        For each expert: which of its ``ready`` candidates they are of (at most ``shortlist``, those that may be the best), and
        the draws (count, len(candidates)).
        """
        lists = [self._shortlist(number, indices, shortlist) for number, indices in enumerate(ready, start=1)]
        cross = np.concatenate([self._cross(expert, chosen) for expert, chosen in enumerate(lists)])
        edges = list(itertools.pairwise(np.cumsum([0, *map(len, lists)])))
        covariance = -cross @ cho_solve(self._fit.factor, cross.T)
        for expert, (first, end) in enumerate(edges):
            covariance[first:end, first:end] += self._prior(expert, lists[expert])
        values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
        root = vectors * np.sqrt(np.maximum(values, 0.0))
        away = self._deviation * source.standard_normal((count, len(cross))) @ root.T
        drawn = self._scale * (cross @ self._fit.weights) + away
        return [(kept, drawn[:, first:end]) for kept, (first, end) in zip(lists, edges, strict=True)]

    def draw_new(self, number: int, choices: Array, source: np.random.Generator) -> Array:
        """A draw from the posterior of what candidates not yet trained would contribute as expert ``number``: (P, D) choices to
        (P,). What would be theirs alone, and their interval loss, is not known and not drawn."""
        own, fit = self.candidates[number - 1], self._fit
        new = Candidates(choices, np.full(len(choices), np.nan))
        nobody = np.arange(len(choices)) - len(choices)  # alike with no candidate there is
        cross = fit.kernel.between(new, nobody, own, self._cascades[:, number - 1])
        smooth, _, _ = fit.kernel.shares
        prior = smooth * np.exp(-0.5 * cdist(choices, choices, "sqeuclidean") / fit.kernel.length**2)
        covariance = prior - cross @ cho_solve(fit.factor, cross.T)
        values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
        away = (vectors * np.sqrt(np.maximum(values, 0.0))) @ source.standard_normal(len(choices))
        return self._scale * (cross @ fit.weights) + self._deviation * away

    @property
    def _deviation(self) -> float:
        """Of a contribution under the prior, in units of the score."""
        return self._scale * math.sqrt(self._fit.amplitude)

    def _shortlist(self, number: int, indices: Indices, most: int) -> Indices:
        """Of thousands, deviations are asked only of those that are credited most, and of the newest."""
        if len(indices) > LONG_LIST * most:
            credited = indices[np.argsort(self.credit(number)[indices], kind="stable")[: (LONG_LIST - 1) * most]]
            indices = np.union1d(credited, indices[-most:])
        hope = self.credit(number)[indices] - self._deviations(number, indices)
        return np.sort(indices[np.argsort(hope, kind="stable")[:most]])

    def _prior(self, expert: int, chosen: Indices) -> Array:
        own = self.candidates[expert]
        return self._fit.kernel.between(own, chosen, own, chosen)

    def _cross(self, expert: int, chosen: Indices) -> Array:
        own = self.candidates[expert]
        return self._fit.kernel.between(own, chosen, own, self._cascades[:, expert])


@dataclass(frozen=True)
class _Scale:
    """What contributions add up to: the score or its logarithm, less its mean, over its standard deviation."""

    is_log: bool
    mean: float
    deviation: float

    @classmethod
    def of(cls, scores: Array, is_log: bool) -> "_Scale":
        values = np.log(scores) if is_log else scores
        return cls(is_log, float(values.mean()), float(values.std()) or 1.0)

    def standardised(self, scores: Array) -> Array:
        return ((np.log(scores) if self.is_log else scores) - self.mean) / self.deviation

    def log_jacobian(self, scores: Array) -> float:
        """Logarithm of how densely standardised values lie where scores do."""
        return -len(scores) * math.log(self.deviation) - (float(np.log(scores).sum()) if self.is_log else 0.0)


@dataclass(frozen=True, eq=False)
class _Fit:
    kernel: _Kernel
    scale: _Scale
    factor: tuple[Array, bool]
    """Of the covariance of the scores, amplitude 1."""
    weights: Array
    """(S,), for predictions; they do not depend on the amplitude."""
    amplitude: float
    """By which all variances are multiplied: its likeliest value."""
    likelihood: float
    """Logarithm of the scores' marginal likelihood, less a constant."""


def _fits(
    kernels: Sequence[_Kernel], candidates: Sequence[Candidates], cascades: Indices, scales: Sequence[_Scale], scores: Array
) -> list[_Fit]:
    """Of every scale with every kernel. Kernels are weighted sums of few matrices, which are made once."""
    columns = [(own, cascades[:, expert]) for expert, own in enumerate(candidates)]
    distances = [cdist(own.choices[chosen], own.choices[chosen], "sqeuclidean") for own, chosen in columns]
    smooth = {
        length: sum(np.exp(-0.5 * distance / length**2) for distance in distances)
        for length in {kernel.length for kernel in kernels}
    }
    linear = sum(np.outer(losses, losses) for losses in (own.standardised_losses[chosen] for own, chosen in columns))
    alone = sum((chosen[:, None] == chosen[None]).astype(float) for _, chosen in columns)
    fits = []
    for kernel in kernels:
        shares = kernel.shares
        covariance = shares[0] * smooth[kernel.length] + shares[1] * linear + shares[2] * alone
        covariance[np.diag_indices_from(covariance)] += len(candidates) * kernel.noise + _JITTER
        factor = cho_factor(covariance, lower=True, overwrite_a=True)
        fits += [_fit(kernel, scale, factor, scores) for scale in scales]
    return fits


def _fit(kernel: _Kernel, scale: _Scale, factor: tuple[Array, bool], scores: Array) -> _Fit:
    targets, count = scale.standardised(scores), len(scores)
    weights = cho_solve(factor, targets)
    amplitude = max(float(targets @ weights) / count, _JITTER)
    determinant = 2 * np.log(factor[0].diagonal()).sum() + count * np.log(amplitude)
    return _Fit(kernel, scale, factor, weights, amplitude, -0.5 * determinant + scale.log_jacobian(scores))
