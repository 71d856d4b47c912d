"""The loss of one expert in its own interval, on images it was not trained on.

The draws are a function of (seed, images, interval) alone, so that two experts of one interval are compared on the same noise.
Shapes: ``N`` images, ``B`` batch, ``C H W`` image.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from meme.config.schema import Config, stable_id
from meme.data.images import TrainingData
from meme.diffusion.process import forward_process
from meme.support.devices import calculating_in
from meme.support.precision import Precision
from meme.support.seeding import generator

HELD_OUT_SHARE, MOST_HELD_OUT = 1 / 16, 1_024  # images
DRAWS, FEWEST_ROUNDS, MOST_ROUNDS = 2_048, 2, 32  # of (image, t, noise); rounds are draws of every image
BATCH = 128


@dataclass(frozen=True, eq=False)
class Part:
    """Some images of a data set, as a data set of its own."""

    whole: TrainingData
    indices: np.ndarray  # int64 (N,)
    content_id: str

    @property
    def labels(self) -> np.ndarray | None:
        return None if self.whole.labels is None else np.asarray(self.whole.labels)[self.indices]

    @property
    def classes(self) -> tuple[str, ...]:
        return self.whole.classes

    def __len__(self) -> int:
        return len(self.indices)

    def tensor(self, indices: ArrayLike) -> Tensor:
        """Return the same as ``tensor`` of the whole: float32 (B, C, H, W)."""
        return self.whole.tensor(self.indices[np.asarray(indices, dtype=np.int64)])

    def mirrored(self, indices: ArrayLike) -> Tensor:
        """Return the same as ``mirrored`` of the whole."""
        return self.whole.mirrored(self.indices[np.asarray(indices, dtype=np.int64)])


@dataclass(frozen=True)
class IntervalLoss:
    """Mean squared error of the predicted noise over an expert's interval."""

    mean: float
    error: float
    """Standard error of the mean over images; that of a difference between two experts is smaller, as the noise is common."""


def hold_out(data: TrainingData) -> tuple[Part, Part]:
    """Split ``data`` into a part to train on and one to validate on: a sixteenth, at most 1,024 images, drawn once for all
    seeds.

    A single image is in both.
    """
    held = min(MOST_HELD_OUT, max(1, round(HELD_OUT_SHARE * len(data))))
    order = torch.randperm(len(data), generator=generator(0, "held out")).numpy()
    kept = order[held:] if len(data) > 1 else order
    parts = (("train", kept), ("validate", order[:held]))
    train, validate = (Part(data, np.sort(chosen), stable_id([data.content_id, name, held])) for name, chosen in parts)
    return train, validate


@torch.inference_mode()
def interval_loss(
    expert: nn.Module, config: Config, number: int, held_out: TrainingData, device: torch.device | str = "cpu", seed: int = 0
) -> IntervalLoss:
    """Return the interval loss of expert ``number`` with its averaged weights, on ``held_out``.

    Timesteps are spread evenly over the interval and shifted from image to image. Every image has the same number of them.
    """
    process, (first, end) = forward_process(config.diffusion), config.expert(number).interval
    rounds = min(MOST_ROUNDS, max(FEWEST_ROUNDS, math.ceil(DRAWS / len(held_out))))
    per_image = torch.zeros(len(held_out), dtype=torch.float64)
    for turn in range(rounds):
        source = generator(seed, "validation", first, end, turn)
        place = (torch.rand(len(held_out), generator=source, dtype=torch.float64) + turn) / rounds
        t = first + (place * (end - first)).long()
        for indices in torch.arange(len(held_out)).split(BATCH):
            x_0 = held_out.tensor(indices.numpy())
            epsilon = torch.randn(x_0.shape, generator=source)
            x_t = process.add_noise(x_0, epsilon, t[indices])
            labels = _labels(config, held_out, indices)
            predicted = _predicted(expert, x_t, t[indices], labels, torch.device(device), config.training.precision)
            errors = (predicted.cpu()[:, : x_0.shape[1]] - epsilon).square()
            per_image[indices] += errors.mean(dim=(1, 2, 3)).double()
    per_image /= rounds
    error = per_image.std().item() / math.sqrt(len(per_image)) if len(per_image) > 1 else math.nan
    return IntervalLoss(per_image.mean().item(), error)


def _labels(config: Config, held_out: TrainingData, indices: Tensor) -> Tensor | None:
    return torch.from_numpy(np.asarray(held_out.labels)[indices.numpy()]) if config.network.classes else None


def _predicted(
    expert: nn.Module, x_t: Tensor, t: Tensor, labels: Tensor | None, device: torch.device, precision: Precision
) -> Tensor:
    x_t = x_t.to(device, memory_format=torch.channels_last)
    inputs = (x_t, t.to(device)) if labels is None else (x_t, t.to(device), labels.to(device))
    with calculating_in(device, precision):
        return expert(*inputs).float()
