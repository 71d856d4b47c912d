"""Frechet distance between two sets of features: FID when the features are Inception's.

Shapes: ``N`` samples, ``D`` features. Statistics are float64 whatever the features are.
"""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from scipy import linalg
from threadpoolctl import ThreadpoolController

from meme.support.torchvision_compat import make_torchvision_importable


@dataclass(frozen=True)
class Statistics:
    """The Gaussian fitted to ``count`` feature vectors.

    mean: (D,) float64; covariance: (D, D) float64, with denominator count - 1, not a number where count is 1.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int


@dataclass(frozen=True)
class _Moments:
    """Moments that can be merged: count, mean (D,) and the sum of centred outer products (D, D)."""

    count: int
    mean: np.ndarray
    scatter: np.ndarray


class RunningStatistics:
    """Mean and covariance of features that arrive as batches (B, D), none of which is stored.

    Centred moments are merged pairwise (Chan, Golub, LeVeque 1983), because sums of squares lose all digits where the
    mean is large beside the spread.
    """

    def __init__(self) -> None:
        self._total: _Moments | None = None

    def add(self, batch: torch.Tensor | np.ndarray) -> None:
        """Add a batch. Raises ValueError when it is not two-dimensional."""
        if len(batch):
            part = _moments(batch)
            self._total = part if self._total is None else _merged(self._total, part)

    def result(self) -> Statistics:
        """Return the statistics of all batches. Raises ValueError when there was no row at all."""
        if (total := self._total) is None:
            raise ValueError("statistics of no samples: at least one feature vector is needed")
        covariance = total.scatter / (total.count - 1) if total.count > 1 else np.full_like(total.scatter, np.nan)
        return Statistics(total.mean, covariance, total.count)


def statistics(features: Iterable[torch.Tensor | np.ndarray]) -> Statistics:
    """Return mean and covariance of features that arrive as batches (B, D). Only one batch is in memory at a time.

    They equal ``np.mean`` and ``np.cov(rowvar=False)`` of all rows together.

    Raises ValueError when there is no row at all or a batch is not two-dimensional.
    """
    running = RunningStatistics()
    for batch in features:
        running.add(batch)
    return running.result()


def _moments(batch: torch.Tensor | np.ndarray) -> _Moments:
    if isinstance(batch, torch.Tensor):
        batch = batch.detach().cpu().numpy()
    rows = np.asarray(batch, dtype=np.float64)
    if rows.ndim != 2:
        raise ValueError(f"features must have shape (B, D), not {rows.shape}")
    mean = rows.mean(axis=0)
    centred = rows - mean
    # Between two batches a network runs in torch's threads, which wait busily for more; with as many of numpy's, images
    # took three times as long on two cores. The product is small beside the network, and the same to the last bit.
    with _thread_pools().limit(limits=1, user_api="blas"):
        return _Moments(len(rows), mean, centred.T @ centred)


@cache
def _thread_pools() -> ThreadpoolController:
    return ThreadpoolController()


def _merged(a: _Moments, b: _Moments) -> _Moments:
    count = a.count + b.count
    shift = b.mean - a.mean
    scatter = a.scatter + b.scatter + np.outer(shift, shift) * (a.count * b.count / count)
    return _Moments(count, a.mean + shift * (b.count / count), scatter)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Return ||m_a - m_b||^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)), Heusel et al. 2017 (1706.08500), as clean-fid computes it.

    Where clean-fid gives a number, this is that number, so a distance of equal statistics may be -1e-6. With as few
    samples as features, or fewer, the product of covariances is singular, and clean-fid may refuse over an imaginary
    part or find no root; the trace is then taken from the symmetric product, which is equal in exact arithmetic.

    Raises ValueError when a statistic has fewer than 2 samples, is not finite, or the two differ in D.
    """
    _check(a, "first")
    _check(b, "second")
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"the statistics have {a.mean.size} and {b.mean.size} features: not the same feature space")
    try:
        distance = float(_clean_fid_distance()(a.mean, a.covariance, b.mean, b.covariance))
    except ValueError as error:
        if "Imaginary component" not in str(error):
            raise
        return _symmetric_distance(a, b)
    return distance if np.isfinite(distance) else _symmetric_distance(a, b)


def _check(statistic: Statistics, which: str) -> None:
    if statistic.count < 2:
        raise ValueError(f"the {which} statistic has {statistic.count} sample(s): a covariance needs at least 2")
    if not (np.isfinite(statistic.mean).all() and np.isfinite(statistic.covariance).all()):
        raise ValueError(f"the {which} statistic is not finite: some features are infinite or not a number")


@cache
def _clean_fid_distance() -> Callable[..., Any]:
    """Return ``cleanfid.fid.frechet_distance``, with its code unchanged and two of the global names it uses replaced.

    ``linalg.sqrtm``: clean-fid 0.1.35 passes ``disp``, which scipy deprecates since 1.16 and removes in 1.18.
    ``print``: it prints when the product is singular. Nothing inside clean-fid itself is altered.
    """
    make_torchvision_importable()
    from cleanfid import fid

    names = {**vars(fid), "linalg": SimpleNamespace(sqrtm=_sqrtm), "print": lambda *_: None}
    original = fid.frechet_distance
    return FunctionType(original.__code__, names, original.__name__, original.__defaults__)


def _sqrtm(matrix: np.ndarray, disp: bool = True) -> Any:
    """Return scipy's square root by its old signature: with ``disp=False`` a pair, whose second part clean-fid drops."""
    with warnings.catch_warnings():
        # A singular product is the rule with few samples; what cannot be used is caught by clean-fid's own checks.
        warnings.simplefilter("ignore", linalg.LinAlgWarning)
        root = linalg.sqrtm(matrix)
    return root if disp else (root, None)


def _symmetric_distance(a: Statistics, b: Statistics) -> float:
    """Return the same distance by Tr (S_a S_b)^(1/2) = Tr (R S_b R)^(1/2), R = S_a^(1/2), which is real whatever the rank."""
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ b.covariance @ root)
    difference = a.mean - b.mean
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    return float(difference @ difference + traces - 2 * np.sqrt(product.clip(min=0)).sum())
