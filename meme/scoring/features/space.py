"""The interface of feature spaces: a frozen network that sees an image in up to three ways.

Shapes: ``B`` images, ``C`` channels, ``H W`` space, ``D`` features, ``S`` spatial features, ``K`` classes.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

FeatureKind = Literal["auto", "inception", "classifier", "random"]
OnMessage = Callable[[str], None]

SPATIAL_CHANNELS = 7  # of the intermediate level, as ADM's evaluator has it: about as many numbers as pooled features


class Views(NamedTuple):
    """One pass over a batch; None is what the space's network does not have."""

    pooled: Tensor
    """(B, D): what FID, KID, precision and recall compare."""
    spatial: Tensor | None
    """(B, S): an intermediate level before it is averaged over space, which sFID compares (Nash et al. 2021, 2103.03841)."""
    probabilities: Tensor | None
    """(B, K): of classes, rows sum to 1, for the inception score (Salimans et al. 2016, 1606.03498)."""

    @property
    def known_spatial(self) -> Tensor:
        """Return ``spatial``. Raises ``ValueError`` for a space without it."""
        return _known(self.spatial, "spatial features")

    @property
    def known_probabilities(self) -> Tensor:
        """Return ``probabilities``. Raises ``ValueError`` for a space without them."""
        return _known(self.probabilities, "class probabilities")


def _known(view: Tensor | None, name: str) -> Tensor:
    if view is None:
        raise ValueError(f"views: this feature space has no {name}")
    return view


class FeatureNetwork(Protocol):
    """The network of a feature space. It takes uint8 (B, C, H, W) on its own device."""

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return pooled features (B, D), the same numbers that ``views`` gives."""

    def views(self, pixels: Tensor) -> Views: ...


@dataclass(frozen=True)
class FeatureSpace:
    """A frozen network that turns images into features.

    kind: the chosen kind, never ``auto``; name: shown beside every score; feature_id: hash of everything that determines the
    features; dim: D; spatial_dim: S, None without spatial features; classes: K, None without class probabilities; chunk: number
    of images per pass of the network.
    """

    kind: FeatureKind
    name: str
    feature_id: str
    dim: int
    network: FeatureNetwork
    device: torch.device
    spatial_dim: int | None = None
    classes: int | None = None
    chunk: int = 32  # a CPU's caches hold the activations of this number of small images; 0.5 GiB of Inception's

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Return pooled features of uint8 (B, C, H, W): float32 (B, D) on this space's device."""
        with _exact_convolutions():
            return torch.cat([self.network(part).float() for part in pixels.to(self.device).split(self.chunk)])

    @torch.no_grad()
    def views(self, pixels: Tensor) -> Views:
        """Return all views of uint8 (B, C, H, W) in one pass, float32 on this space's device; the pooled one equals
        ``self(pixels)``."""
        with _exact_convolutions():
            parts = [self.network.views(part) for part in pixels.to(self.device).split(self.chunk)]
        return Views(
            torch.cat([part.pooled for part in parts]).float(),
            _joined([part.spatial for part in parts]),
            _joined([part.probabilities for part in parts]),
        )


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there).float() if there else None


def _exact_convolutions():
    # Without TF32 a GPU's features equal a CPU's up to float32 rounding, so cached statistics serve both.
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)


def file_sha256(path: Path) -> str:
    """Return the hex digest of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
