"""Images from noise: a plain function over any ``denoise(x, t)``. It does not know that experts exist.

Shapes: ``B`` batch, ``C H W`` image.
"""

from collections.abc import Callable, Iterator

import torch
from diffusers import DDIMScheduler, DDPMScheduler, SchedulerMixin
from torch import Tensor

from meme.config import DiffusionConfig, ImageConfig, SamplingConfig
from meme.diffusion import schedule_arguments
from meme.seeding import generator

Denoise = Callable[[Tensor, int], Tensor]


def build_scheduler(diffusion: DiffusionConfig, sampling: SamplingConfig) -> SchedulerMixin:
    """The scheduler of diffusers with its timesteps set: T/S apart, from 1 for DDIM (as latent diffusion has it), 0 for DDPM."""
    arguments = schedule_arguments(diffusion) | {"clip_sample": sampling.clip, "timestep_spacing": "leading"}
    if sampling.sampler == "ddim":
        scheduler = DDIMScheduler(**arguments, steps_offset=1, set_alpha_to_one=False)
    else:
        scheduler = DDPMScheduler(**arguments)
    scheduler.set_timesteps(sampling.steps)
    return scheduler


def sampling_timesteps(diffusion: DiffusionConfig, sampling: SamplingConfig) -> list[int]:
    """The timesteps a sample passes through, from noise to data."""
    return build_scheduler(diffusion, sampling).timesteps.tolist()


@torch.inference_mode()
def sample(
    denoise: Denoise, x: Tensor, diffusion: DiffusionConfig, sampling: SamplingConfig, fresh_noise: list[torch.Generator]
) -> Tensor:
    """Denoise ``x`` (B, C, H, W), standard normal, to images of the training data's range.

    ``fresh_noise``, one generator an image, is drawn from only where the sampler is stochastic (DDPM, or DDIM with eta > 0).
    """
    scheduler = build_scheduler(diffusion, sampling)
    eta = {"eta": sampling.eta} if sampling.sampler == "ddim" else {}
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(denoise(x, t), t, x, generator=fresh_noise, **eta).prev_sample
    return x


def starting_noise(image: ImageConfig, seed: int, first: int, count: int) -> Tensor:
    """Noise of images ``first`` to ``first + count - 1``: image i's is a function of (seed, i), whatever the batch size."""
    shape = (image.channels, image.size, image.size)
    return torch.stack([torch.randn(shape, generator=generator(seed, "image", index)) for index in range(first, first + count)])


def draw_images(
    denoise: Denoise,
    count: int,
    image: ImageConfig,
    diffusion: DiffusionConfig,
    sampling: SamplingConfig,
    seed: int,
    device: torch.device | str = "cpu",
) -> Iterator[Tensor]:
    """Yield ``count`` images in batches, uint8 (B, C, H, W) on ``device``; image i does not depend on the batch size."""
    for first in range(0, count, sampling.batch_size):
        indices = range(first, min(first + sampling.batch_size, count))
        x = starting_noise(image, seed, first, len(indices)).to(device).contiguous(memory_format=torch.channels_last)
        yield to_uint8(sample(denoise, x, diffusion, sampling, [generator(seed, "fresh noise", index) for index in indices]))


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] to 0..255."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
