"""The forward process and the soft draw of timesteps.

Shapes: ``B`` batch, ``C H W`` image, ``T`` timesteps, t = 0 nearest to the data.
"""

from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from meme.config.schema import DiffusionConfig, ExpertConfig
from meme.support.seeding import generator


@dataclass(frozen=True)
class TrainingNoise:
    """Everything random in one training step. It is a function of (seed, step), so it is common to all candidates and
    experts."""

    soft: Tensor
    """(B,) uniform: below p_n the timestep comes from the expert's interval."""
    place: Tensor
    """(B,) uniform: where in the interval, or in all of T, the timestep lies."""
    epsilon: Tensor
    """(B, C, H, W) standard normal."""


def training_noise(shape: tuple[int, ...], seed: int, step: int) -> TrainingNoise:
    """Return the noise of one training step for a batch of ``shape`` (B, C, H, W), on the CPU."""
    source = generator(seed, "training noise", step)
    return TrainingNoise(
        soft=torch.rand(shape[0], generator=source),
        place=torch.rand(shape[0], generator=source, dtype=torch.float64),
        epsilon=torch.randn(shape, generator=source),
    )


def draw_timesteps(expert: ExpertConfig, timesteps: int, noise: TrainingNoise) -> Tensor:
    """Draw timesteps by soft assignment: with probability p_n from the expert's own interval, else from all of [0, T); (B,)
    integers."""
    first, end = expert.interval
    own = first + (noise.place * (end - first)).long()
    anywhere = (noise.place * timesteps).long()
    return torch.where(noise.soft < expert.p, own, anywhere)


def dropped_labels(count: int, share: float, seed: int, step: int) -> Tensor:
    """Return which of a batch's images are trained without their class: (B,) booleans, a function of (seed, step)."""
    return torch.rand(count, generator=generator(seed, "label dropout", step)) < share


def flipped(count: int, seed: int, step: int) -> Tensor:
    """Return which of a batch's images are mirrored: (B,) booleans, a function of (seed, step), common to all candidates."""
    return torch.rand(count, generator=generator(seed, "flip", step)) < 0.5


def forward_process(diffusion: DiffusionConfig) -> DDPMScheduler:
    """Return the noise schedule. Its ``add_noise(x_0, epsilon, t)`` is Eq. 1."""
    return DDPMScheduler(**schedule_arguments(diffusion))


def schedule_arguments(diffusion: DiffusionConfig) -> dict:
    """Return the arguments that a scheduler of diffusers needs to have this noise schedule."""
    return {
        "num_train_timesteps": diffusion.timesteps,
        "beta_schedule": diffusion.schedule,
        "beta_start": diffusion.beta_start,
        "beta_end": diffusion.beta_end,
    }
