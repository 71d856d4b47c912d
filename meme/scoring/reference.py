"""The reference side of scores: statistics and features of the data, computed once in each feature space and cached by the
data's content.

Shapes: ``N`` images of the data, ``D`` features, ``S`` spatial features.
"""

import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from meme.data.images import Images
from meme.scoring.features.space import FeatureSpace
from meme.scoring.frechet import RunningStatistics, Statistics
from meme.support.files import cache_folder, written_whole
from meme.support.seeding import generator

Part = Literal["pooled", "spatial", "features"]

REFERENCE_BATCH = 256
FEATURES_KEPT = 50_000  # images whose features themselves are kept; statistics are of all images


@dataclass(frozen=True)
class Reference:
    """The requested parts. Other statistics raise ``KeyError``; other features are None."""

    statistics: Mapping[Part, Statistics]
    features: np.ndarray | None = None
    """float32 (min(N, 50,000), D), a read-only memory map: of all images, or of a fixed random choice in the data's order."""

    @property
    def pooled(self) -> Statistics:
        """Statistics of the features of all images."""
        return self.statistics["pooled"]

    @property
    def spatial(self) -> Statistics:
        """Statistics of the spatial features of all images."""
        return self.statistics["spatial"]


def reference_statistics(images: Images, space: FeatureSpace) -> Statistics:
    """Return statistics of the whole data set in ``space``, computed once and cached under ``cache_folder()/"statistics"``."""
    return reference(images, space, {"pooled"}).pooled


def reference(images: Images, space: FeatureSpace, parts: Collection[Part]) -> Reference:
    """Return these parts from the cache. Missing ones are computed in a single pass over the data.

    Files are named by what determines them: the images' content and the feature space. An unreadable one is replaced.
    """
    kept = {part: values for part in parts if (values := _read(part, images, space)) is not None}
    missing = {part for part in parts if part not in kept}
    if missing:
        for part, values in _computed(images, space, missing).items():
            _write(_path(part, images, space), values)
            reread = _read(part, images, space)  # mapped from the file, where features in memory would be held twice
            kept[part] = values if reread is None else reread
    statistics = {part: values for part, values in kept.items() if isinstance(values, Statistics)}
    return Reference(statistics, next((values for values in kept.values() if isinstance(values, np.ndarray)), None))


def kept_images(count: int) -> np.ndarray:
    """Return the indices of those of ``count`` images whose features are stored, in ascending order, the same for any data of
    this size."""
    if count <= FEATURES_KEPT:
        return np.arange(count)
    return np.sort(torch.randperm(count, generator=generator(0, "reference features"))[:FEATURES_KEPT].numpy())


def _computed(images: Images, space: FeatureSpace, parts: set[Part]) -> dict[Part, Statistics | np.ndarray]:
    chosen = kept_images(len(images))
    needed = chosen if parts == {"features"} else np.arange(len(images))
    pooled, spatial = RunningStatistics(), RunningStatistics()
    features = np.empty((len(chosen), space.dim), dtype=np.float32) if "features" in parts else None
    for start in range(0, len(needed), REFERENCE_BATCH):
        batch = needed[start : start + REFERENCE_BATCH]
        pixels = torch.from_numpy(images.pixels[batch])  # indexing copies, so a read-only memory map will do
        if "spatial" in parts:
            views = space.views(pixels)
            found = views.pooled
            spatial.add(views.known_spatial)
        else:
            found = space(pixels)
        if "pooled" in parts:
            pooled.add(found)
        if features is not None:
            first, last = np.searchsorted(chosen, (batch[0], batch[-1] + 1))
            features[first:last] = found.cpu().numpy()[np.isin(batch, chosen)]
    results: dict[Part, Statistics | np.ndarray] = {} if features is None else {"features": features}
    running: dict[Part, RunningStatistics] = {"pooled": pooled, "spatial": spatial}
    return results | {part: statistics.result() for part, statistics in running.items() if part in parts}


def _path(part: Part, images: Images, space: FeatureSpace) -> Path:
    key = f"{images.content_id}-{space.feature_id}"
    if part == "features":
        return cache_folder() / "reference-features" / f"{key}.npy"
    return cache_folder() / "statistics" / (f"{key}.npz" if part == "pooled" else f"{key}-spatial.npz")


def _write(path: Path, values: Statistics | np.ndarray) -> None:
    with written_whole(path) as partial, partial.open("wb") as file:
        if isinstance(values, Statistics):
            np.savez(file, mean=values.mean, covariance=values.covariance, count=values.count)
        else:
            np.save(file, values, allow_pickle=False)


def _read(part: Part, images: Images, space: FeatureSpace) -> Statistics | np.ndarray | None:
    path = _path(part, images, space)
    if part == "features":
        return _read_features(path, (min(len(images), FEATURES_KEPT), space.dim))
    return _read_statistics(path, space.dim if part == "pooled" else space.spatial_dim)


def _read_statistics(path: Path, dim: int | None) -> Statistics | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            kept = Statistics(file["mean"], file["covariance"], int(file["count"]))
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile):
        return None
    return kept if kept.mean.shape == (dim,) and kept.covariance.shape == (dim, dim) else None


def _read_features(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    try:
        kept = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, TypeError):
        return None
    return kept if (kept.shape, kept.dtype) == (shape, np.float32) else None
