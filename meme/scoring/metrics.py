"""The distance of drawn images from data in a feature space: all metrics of papers, from one pass over streaming images.

Shapes: ``B`` batch, ``C`` channels, ``H W`` space.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from torch import Tensor

from meme.data.images import Images
from meme.errors import UserError
from meme.scoring.features.space import FeatureSpace, Views
from meme.scoring.frechet import RunningStatistics, Statistics, frechet_distance, statistics
from meme.scoring.neighbours import (
    INCEPTION_SPLITS,
    KID_SUBSETS,
    NEIGHBOURS,
    inception_scores,
    kernel_distances,
    precision_and_recall,
)
from meme.scoring.reference import FEATURES_KEPT, Part, Reference, reference, reference_statistics
from meme.support.seeding import derive_seed

__all__ = [
    "METRICS",
    "Measured",
    "Metric",
    "Statistics",
    "frechet_distance",
    "measure",
    "offered_metrics",
    "protocol",
    "reference_statistics",
    "require_metrics",
    "statistics",
]

Metric = Literal["fid", "sfid", "kid", "inception_score", "precision", "recall"]
METRICS: tuple[Metric, ...] = get_args(Metric)
NAMES: dict[Metric, str] = {
    "fid": "FID",
    "sfid": "sFID",
    "kid": "KID",
    "inception_score": "inception score",
    "precision": "precision",
    "recall": "recall",
}

_FEWEST = {"precision": NEIGHBOURS + 1, "recall": NEIGHBOURS + 1, "inception_score": 1}  # of each set; the others need 2
_REFERENCE_PARTS: dict[Metric, Part] = {
    "fid": "pooled",
    "sfid": "spatial",
    "kid": "features",
    "precision": "features",
    "recall": "features",
}


@dataclass(frozen=True)
class Measured:
    """One metric of one set of samples."""

    value: float
    spread: float | None = None
    """Standard deviation over KID's subsets or the inception score's splits, as papers print it; None for the others."""


def offered_metrics(space: FeatureSpace) -> tuple[Metric, ...]:
    """Return the metrics that this space has the features for, in the order of ``METRICS``."""
    missing = {"sfid": space.spatial_dim is None, "inception_score": space.classes is None}
    return tuple(metric for metric in METRICS if not missing.get(metric))


def fewest_images(metric: Metric) -> int:
    """Return the number of images, of the data and of the samples each, that ``metric`` needs."""
    return _FEWEST.get(metric, 2)


def require_images(metrics: Sequence[Metric], count: int, name: str) -> None:
    """Raise UserError where the data called ``name`` have fewer images than one of ``metrics`` needs."""
    for metric in metrics:
        if count < (fewest := fewest_images(metric)):
            raise UserError(f"data: {metric} needs at least {fewest} images, and {name} has {count}")


def require_metrics(metrics: Sequence[str], space: FeatureSpace) -> None:
    """Raise UserError for no metric, an unknown one, or one that this space does not offer."""
    if not metrics:
        raise UserError(f"metrics: name at least one of {', '.join(METRICS)}")
    for metric in metrics:
        if metric not in METRICS:
            raise UserError(f"metrics: {metric!r} is not one of {', '.join(METRICS)}")
        if metric not in offered_metrics(space):
            raise UserError(f"metrics: {_refusal(metric)}, not {space.name}, which offers {', '.join(offered_metrics(space))}")


def _refusal(metric: Metric) -> str:
    if metric == "inception_score":
        return "inception_score needs class probabilities, which the spaces inception and classifier have"
    return "sfid needs spatial features, which clean-fid's Inception file and the spaces classifier and random have"


def measure(
    batches: Iterable[Tensor],
    images: Images,
    space: FeatureSpace,
    metrics: Sequence[Metric] = ("fid",),
    seed: int = 0,
    inception_split: int | None = None,
) -> dict[Metric, Measured]:
    """Compare images, uint8 (B, C, H, W) a batch, with the data ``images`` in ``space``, by ``metrics``, in their order.

    ``batches`` is consumed once and no image is kept; of KID, precision and recall the features of all samples are held, of
    the inception score the class probabilities. ``seed`` is of KID's random subsets, ``inception_split`` the
    images of a split of the inception score (None: ten equal splits).

    fid: Heusel et al. 2017 (1706.08500), as clean-fid. sfid: the same on spatial features, Nash et al. 2021 (2103.03841).
    kid: Binkowski et al. 2018 (1801.01401), mean over subsets. precision, recall: Kynkaanniemi et al. 2019 (1904.06991).
    inception_score: Salimans et al. 2016 (1606.03498), mean over splits; it does not look at the data.

    Raises UserError for a metric this space does not offer, or that needs more samples than came.
    """
    require_metrics(metrics, space)
    require_images(metrics, len(images), images.name)
    drawn = _Drawn(metrics)
    for batch in batches:
        drawn.add(space.views(batch) if drawn.needs_views else Views(space(batch), None, None))
    for metric in metrics:
        if drawn.count < (fewest := fewest_images(metric)):
            raise UserError(f"samples: {metric} needs at least {fewest}, not {drawn.count}")
    known = reference(images, space, {_REFERENCE_PARTS[metric] for metric in metrics if metric in _REFERENCE_PARTS})
    computed = _computed(drawn, known, space, seed, inception_split)
    return {metric: computed[metric] for metric in metrics}


class _Drawn:
    """The features and statistics of the samples that the metrics need, gathered batch by batch."""

    def __init__(self, metrics: Sequence[Metric]):
        self.metrics = frozenset(metrics)
        self.needs_views = not self.metrics.isdisjoint({"sfid", "inception_score"})
        self.count = 0
        self.pooled, self.spatial = RunningStatistics(), RunningStatistics()
        self._features: list[np.ndarray] = []
        self._probabilities: list[np.ndarray] = []

    def add(self, views: Views) -> None:
        self.count += len(views.pooled)
        if "fid" in self.metrics:
            self.pooled.add(views.pooled)
        if "sfid" in self.metrics:
            self.spatial.add(views.known_spatial)
        if not self.metrics.isdisjoint({"kid", "precision", "recall"}):
            self._features.append(views.pooled.cpu().numpy())
        if "inception_score" in self.metrics:
            self._probabilities.append(views.known_probabilities.cpu().numpy())

    @property
    def features(self) -> np.ndarray:
        return np.concatenate(self._features)

    @property
    def probabilities(self) -> np.ndarray:
        return np.concatenate(self._probabilities)


def _computed(
    drawn: _Drawn, known: Reference, space: FeatureSpace, seed: int, inception_split: int | None
) -> dict[Metric, Measured]:
    results: dict[Metric, Measured] = {}
    if "fid" in drawn.metrics:
        results["fid"] = Measured(frechet_distance(drawn.pooled.result(), known.pooled))
    if "sfid" in drawn.metrics:
        results["sfid"] = Measured(frechet_distance(drawn.spatial.result(), known.spatial))
    if "inception_score" in drawn.metrics:
        results["inception_score"] = _mean_and_spread(inception_scores(drawn.probabilities, split_images=inception_split))
    if known.features is not None:
        features = drawn.features
        if "kid" in drawn.metrics:
            draw = np.random.RandomState(derive_seed(seed, "kid subsets") % 2**32)
            results["kid"] = _mean_and_spread(kernel_distances(known.features, features, draw, space.device))
        if not drawn.metrics.isdisjoint({"precision", "recall"}):
            both = precision_and_recall(known.features, features, space.device)
            results |= {"precision": Measured(both[0]), "recall": Measured(both[1])}
    return results


def _mean_and_spread(values: np.ndarray) -> Measured:
    return Measured(float(values.mean()), float(values.std()))


def protocol(
    images: Images,
    space: FeatureSpace,
    samples: int,
    metrics: Sequence[Metric] = ("fid",),
    inception_split: int | None = None,
) -> str:
    """Return, on one line, what a score must be quoted with. The caller adds sampler and steps."""
    text = f"{space.name} features, {samples:,} samples against all {len(images):,} images of {images.name}"
    if len(images) > FEATURES_KEPT and not {"kid", "precision", "recall"}.isdisjoint(metrics):
        text += f" (KID, precision and recall: against {FEATURES_KEPT:,} of them)"
    if "precision" in metrics or "recall" in metrics:
        text += f", {NEIGHBOURS} nearest neighbours"
    if "kid" in metrics:
        text += f", KID over {KID_SUBSETS} subsets"
    if "inception_score" in metrics:
        splits = f"splits of {inception_split:,} images" if inception_split else f"{INCEPTION_SPLITS} splits"
        text += f", inception score over {splits}"
    return text
