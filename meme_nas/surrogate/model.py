"""Surrogate of the FID of cascades that were not scored: a Gaussian process that is a sum over experts.

The model of a cascade s, in which expert n is candidate m_n(s)::

    y_s           = sum_n c_n(m_n(s)) + e_s
    c_n           ~ GP(0, a k_n)                        prior of a contribution, see ``meme_nas.surrogate.kernel``
    E[c_n | y]    = k_n K^-1 y                          posterior mean; times the scores' deviation, the credit
    var[c_n | y]  = a (k_n(m, m) - k_n K^-1 k_n^T)      posterior variance

========  ===================================================================================================================
y (S,)    The scores or their logarithms, standardised
c_n (M,)  Contributions of the candidates of expert n: smooth in the choices, linear in the interval loss, plus an
          independent term of each candidate, such as the luck of its training
e_s       Residual: the part of the score that is no sum over experts
k_n       Prior covariance of the contributions of expert n, over a; without arguments, between candidates and cascades (M, S)
K (S, S)  Covariance of the scores, over a: the sum of k_n over experts, plus the variance of the residual
a         Factor of all variances, at its maximum-likelihood value
========  ===================================================================================================================

FID's logarithm is nearly additive over experts, which is why the model is a sum. For the same reason the best cascade under any
draw from the posterior is found expert by expert.

Shapes: ``N`` experts, ``S`` scored cascades, ``M`` candidates of one expert, ``D`` choices of one expert, ``P`` points.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from scipy.linalg import cho_solve

from meme_nas.surrogate.kernel import Array, Candidates, Evidence, Fit, Indices, likeliest, refitted

LONG_LIST = 8  # lengths of a shortlist; of more candidates, only some get a posterior deviation


class Surrogate:
    """Gaussian process fitted to scored cascades. It predicts the contribution of every expert's candidates."""

    def __init__(
        self,
        candidates: Sequence[Candidates],
        cascades: Sequence[Sequence[int]],
        scores: Sequence[float],
        like: "Surrogate | None" = None,
    ):
        """Fit to ``cascades`` (S, N), the index of each expert's candidate from 0, with ``scores`` (S,), lower is better. S >= 1.

        The kernel, and the choice between scores and their logarithms, maximise the marginal likelihood. With ``like`` both are
        taken from that surrogate, as far as the scores permit it, which needs a small part of the time.
        """
        self.candidates = list(candidates)
        self._cascades = np.asarray(cascades, dtype=np.int64).reshape(len(scores), len(candidates))
        values = np.asarray(scores, dtype=np.float64)
        self._fit: Fit = (
            likeliest(self.candidates, self._cascades, values)
            if like is None
            else refitted(Evidence(self.candidates, self._cascades, values), like._fit)
        )
        self._scale = self._fit.scale.deviation
        self._credits: dict[int, Array] = {}

    def contributions(self, number: int) -> tuple[Array, Array]:
        """Return posterior mean and standard deviation (M,) of the contributions of expert ``number`` (from 1).

        Both are in units of the score, or of its logarithm if the model is of logarithms.
        """
        everyone = np.arange(len(self.candidates[number - 1].choices))
        return self.credit(number), self._deviations(number, everyone)

    def credit(self, number: int) -> Array:
        """Return the posterior mean (M,) of the contributions of expert ``number`` (from 1), without the costly deviations."""
        if number not in self._credits:
            everyone = np.arange(len(self.candidates[number - 1].choices))
            self._credits[number] = self._scale * (self._cross(number - 1, everyone) @ self._fit.weights)
        return self._credits[number]

    def _deviations(self, number: int, chosen: Indices) -> Array:
        cross = self._cross(number - 1, chosen)
        known = np.einsum("ms,sm->m", cross, cho_solve(self._fit.factor, cross.T))
        variance = self._fit.kernel.diagonal(number - 1, self.candidates[number - 1], chosen) - known
        return self._deviation * np.sqrt(np.maximum(variance, 0.0))

    def predict(self, cascades: Sequence[Sequence[int]]) -> Array:
        """Return the expected scores (len(cascades),): posterior means, transformed back if the model is of logarithms."""
        parts = [self.credit(number) for number in range(1, len(self.candidates) + 1)]
        rows = np.asarray(cascades, dtype=np.int64)
        total = self._fit.scale.mean + sum((part[rows[:, place]] for place, part in enumerate(parts)), np.zeros(len(rows)))
        return np.exp(total) if self._fit.scale.is_log else total

    def totals(self, scores: Array) -> Array:
        """Return the sums of contributions (len(scores),) that give ``scores``: these or their logarithms, less the mean."""
        scale = self._fit.scale
        return (np.log(np.maximum(scores, np.finfo(float).tiny)) if scale.is_log else scores) - scale.mean

    def draws(
        self, count: int, source: np.random.Generator, ready: Sequence[Indices], shortlist: int = 64
    ) -> list[tuple[Indices, Array]]:
        """Return ``count`` joint draws from the posterior of all experts' contributions, as one pair for each expert.

        A pair holds the indices of at most ``shortlist`` of the expert's ``ready`` candidates, those with the lowest mean less
        deviation, and the draws (count, len(indices)).
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

    def expected(self, number: int, choices: Array) -> Array:
        """Return the posterior mean (P,) of contributions of untrained candidates of expert ``number`` with ``choices`` (P, D).

        Only the smooth part has a mean other than 0: an untrained candidate has no interval loss, and its own part is unknown.
        """
        own = self.candidates[number - 1]
        new, nobody = Candidates(choices, np.full(len(choices), np.nan)), np.arange(len(choices)) - len(choices)
        cross = self._fit.kernel.between(number - 1, new, nobody, own, self._cascades[:, number - 1])
        return np.asarray(self._scale * (cross @ self._fit.weights))

    @property
    def _deviation(self) -> float:
        """Prior standard deviation of a contribution of variance 1, in units of the score or its logarithm."""
        return self._scale * math.sqrt(self._fit.amplitude)

    def _shortlist(self, number: int, indices: Indices, most: int) -> Indices:
        """Return the ``most`` candidates of ``indices`` with the lowest mean less deviation.

        Deviations are costly. Of more than ``LONG_LIST`` shortlists of candidates they are computed only for those with the
        lowest means and for the newest.
        """
        if len(indices) > LONG_LIST * most:
            credited = indices[np.argsort(self.credit(number)[indices], kind="stable")[: (LONG_LIST - 1) * most]]
            indices = np.union1d(credited, indices[-most:])
        hope = self.credit(number)[indices] - self._deviations(number, indices)
        return np.sort(indices[np.argsort(hope, kind="stable")[:most]])

    def _prior(self, expert: int, chosen: Indices) -> Array:
        own = self.candidates[expert]
        return self._fit.kernel.between(expert, own, chosen, own, chosen)

    def _cross(self, expert: int, chosen: Indices) -> Array:
        own = self.candidates[expert]
        return self._fit.kernel.between(expert, own, chosen, own, self._cascades[:, expert])
