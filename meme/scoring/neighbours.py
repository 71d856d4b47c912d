"""Metrics over features themselves rather than a Gaussian fitted to them: KID, precision and recall, inception score.

Shapes: ``N`` samples, ``D`` features, ``K`` classes. All sums are float64 whatever the features are.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
NEIGHBOURS = 3
ROWS, COLUMNS = 1024, 4096  # of one block of distances: 32 MiB, and under 0.3 GiB with all that is made of it at D = 2048
SAME = 1e-12  # of the squared norms: points nearer than float32 resolves are one point
INCEPTION_SPLITS = 10


def kernel_distances(
    a: np.ndarray,
    b: np.ndarray,
    draw: np.random.RandomState,
    device: torch.device | str = "cpu",
    *,
    subsets: int = KID_SUBSETS,
    subset_size: int = KID_SUBSET_SIZE,
) -> np.ndarray:
    """Return the squared maximum mean discrepancy between features (N, D) and (M, D) for each random subset: float64
    (subsets,).

    The kernel is (x.y / D + 1)^3. The estimate is unbiased, so it may be negative. Its mean over subsets is KID (Binkowski et
    al. 2018, 1801.01401). With numpy's global state as ``draw`` it takes the subsets that clean-fid's ``kernel_distance``
    takes.

    Raises ValueError for sets of fewer than 2 samples.
    """
    size = min(len(a), len(b), subset_size)
    if size < 2:
        raise ValueError(f"the kernel distance needs at least 2 samples of each set, not {size}")
    distances = []
    for _ in range(subsets):
        y, x = (_exact(rows[draw.choice(len(rows), size, replace=False)], device) for rows in (b, a))
        within = _off_diagonal(_kernel(x, x)) + _off_diagonal(_kernel(y, y))
        distances.append((within / (size * (size - 1)) - 2 * _kernel(x, y).mean()).item())
    return np.array(distances)


def _exact(features: np.ndarray, device: torch.device | str) -> Tensor:
    return torch.tensor(features, dtype=torch.float64, device=device)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _off_diagonal(kernel: Tensor) -> Tensor:
    return kernel.sum() - kernel.trace()


def precision_and_recall(
    real: np.ndarray, drawn: np.ndarray, device: torch.device | str = "cpu", neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
    """Return precision and recall (Kynkaanniemi et al. 2019, 1904.06991) of features (N, D) and (M, D), both in [0, 1].

    A set's manifold is the union of balls around its points that reach to their k-th nearest neighbour in the set. Precision
    is the share of drawn points on the manifold of the real ones, recall the share of real points on that of the drawn ones.
    Both depend on N and M, so they compare at equal numbers only. Distances are computed in blocks on ``device``.

    Raises ValueError for sets of no more than ``neighbours`` samples.
    """
    if min(len(real), len(drawn)) <= neighbours:
        raise ValueError(f"precision and recall need more than {neighbours} samples of each set")
    real_radii, drawn_radii = (_squared_radii(features, neighbours, device) for features in (real, drawn))
    covered_drawn = torch.zeros(len(drawn), dtype=torch.bool, device=device)
    covered_real = torch.zeros(len(real), dtype=torch.bool, device=device)
    for rows, points in _blocks(real, ROWS, device):
        for columns, others in _blocks(drawn, COLUMNS, device):
            distances = _squared_distances(points, others)
            covered_drawn[columns] |= (distances <= real_radii[rows, None]).any(dim=0)
            covered_real[rows] |= (distances <= drawn_radii[columns]).any(dim=1)
    return covered_drawn.double().mean().item(), covered_real.double().mean().item()


def _squared_radii(features: np.ndarray, neighbours: int, device: torch.device | str) -> Tensor:
    """Return the squared distance of each point to its k-th nearest neighbour: (N,)."""
    radii = []
    for _, points in _blocks(features, ROWS, device):
        nearest = torch.empty(len(points), 0, dtype=torch.float64, device=device)
        for _, others in _blocks(features, COLUMNS, device):
            candidates = torch.cat([nearest, _squared_distances(points, others)], dim=1)
            # One more than k: the nearest to a point is the point itself.
            nearest = candidates.topk(min(neighbours + 1, candidates.shape[1]), dim=1, largest=False).values
        radii.append(nearest[:, -1])
    return torch.cat(radii)


def _blocks(features: np.ndarray, size: int, device: torch.device | str) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(features), size):
        rows = slice(start, min(start + size, len(features)))
        yield rows, _exact(features[rows], device)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return squared distances, (R, D), (C, D) to (R, C), by |a|^2 + |b|^2 - 2 a.b. Distances within its rounding are set to 0,
    as those of equal points are."""
    norms = (a * a).sum(dim=1)[:, None] + (b * b).sum(dim=1)
    distances = torch.addmm(norms, a, b.T, alpha=-2)
    return distances.masked_fill_(distances < norms.mul_(SAME), 0)


def inception_scores(probabilities: np.ndarray, splits: int = INCEPTION_SPLITS, split_images: int | None = None) -> np.ndarray:
    """Return exp of the mean divergence of class probabilities (N, K) from their average, for each split: float64 (splits,).

    The score (Salimans et al. 2016, 1606.03498) is 1 where all samples look alike or none is recognised, and at most K. Splits
    are consecutive and as equal as can be; fewer than N samples make as many splits. With ``split_images``, each split has that
    many samples, and the last one the remainder, as in ADM's evaluator (5,000).

    Raises ValueError for no sample.
    """
    if not len(probabilities):
        raise ValueError("the inception score needs at least 1 sample")
    if split_images is None:
        parts = np.array_split(probabilities, min(splits, len(probabilities)))
    else:
        parts = [probabilities[first : first + split_images] for first in range(0, len(probabilities), split_images)]
    return np.array([_inception_score(part) for part in parts])


def _inception_score(probabilities: np.ndarray) -> float:
    p = _exact(probabilities, "cpu")
    divergences = torch.special.xlogy(p, p) - torch.special.xlogy(p, p.mean(dim=0))  # 0 log 0 = 0
    return divergences.sum(dim=1).mean().exp().item()
