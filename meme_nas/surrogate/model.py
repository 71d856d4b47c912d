"""FID of cascades that were never drawn: a Gaussian process that adds up what each expert contributes.

A cascade's FID, or rather its logarithm, is nearly the sum of one number per expert. A contribution is modelled as what the
candidate's choices say (smooth), what its interval loss says (linear), and what is its own alone, such as the luck of its
training. Because the model is a sum, the best cascade under any of its draws is found expert by expert.

Shapes: ``N`` experts, ``S`` scored cascades, ``M`` candidates of one expert, ``D`` choices of one expert.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from scipy.linalg import cho_solve

from meme_nas.surrogate.kernel import Array, Candidates, Evidence, Fit, Indices, likeliest, refitted

LONG_LIST = 8  # shortlists of candidates, beyond which not all of them are looked at closely


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
        self._fit: Fit = (
            likeliest(self.candidates, self._cascades, values)
            if like is None
            else refitted(Evidence(self.candidates, self._cascades, values), like._fit)
        )
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
        variance = self._fit.kernel.diagonal(number - 1, self.candidates[number - 1], chosen) - known
        return self._deviation * np.sqrt(np.maximum(variance, 0.0))

    def predict(self, cascades: Sequence[Sequence[int]]) -> Array:
        """(len(cascades),) expected scores."""
        parts = [self.credit(number) for number in range(1, len(self.candidates) + 1)]
        rows = np.asarray(cascades, dtype=np.int64)
        total = self._fit.scale.mean + sum((part[rows[:, place]] for place, part in enumerate(parts)), np.zeros(len(rows)))
        return np.exp(total) if self._fit.scale.is_log else total

    def totals(self, scores: Array) -> Array:
        """(len(scores),) what the contributions to ``scores`` add up to."""
        scale = self._fit.scale
        return (np.log(np.maximum(scores, np.finfo(float).tiny)) if scale.is_log else scores) - scale.mean

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

    def expected(self, number: int, choices: Array) -> Array:
        """What candidates not yet trained would contribute as expert ``number``: (P, D) choices to (P,). What would be theirs
        alone, and their interval loss, is not known and counts as nothing."""
        own = self.candidates[number - 1]
        new, nobody = Candidates(choices, np.full(len(choices), np.nan)), np.arange(len(choices)) - len(choices)
        cross = self._fit.kernel.between(number - 1, new, nobody, own, self._cascades[:, number - 1])
        return np.asarray(self._scale * (cross @ self._fit.weights))

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
        return self._fit.kernel.between(expert, own, chosen, own, chosen)

    def _cross(self, expert: int, chosen: Indices) -> Array:
        own = self.candidates[expert]
        return self._fit.kernel.between(expert, own, chosen, own, self._cascades[:, expert])
