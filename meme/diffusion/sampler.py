"""Images from noise: a plain function over any ``denoise(x, t, labels)``, whoever implements it.

Shapes: ``B`` batch, ``C H W`` image.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, SchedulerMixin, UniPCMultistepScheduler
from torch import Tensor

from meme.config.schema import Config, DiffusionConfig, ImageConfig, SamplingConfig
from meme.diffusion.process import schedule_arguments
from meme.support.seeding import generator

Denoise = Callable[[Tensor, float], Tensor]
"""Predicted noise in x_t (B, C, H, W) at one t for the whole batch, or with a learned variance (B, 2C, H, W)."""
FreshNoise = Callable[[int], list[torch.Generator]]
"""Returns the random sources of the noise that a stochastic sampler adds at timestep t, one per image."""


def build_scheduler(diffusion: DiffusionConfig, sampling: SamplingConfig, *, learned_variance: bool = False) -> SchedulerMixin:
    """Return the scheduler of diffusers with its timesteps set.

    They are T/S apart: from 1 for DDIM (as in latent diffusion), from 0 for DDPM, and up to T - 1 for the multistep solvers,
    which are of second order. DDIM ends at alpha 1 where ``sampling.set_alpha_to_one`` says so; the others always do. DDPM
    takes a learned variance (Nichol and Dhariwal 2021, Eq. 15); the others have their own.
    """
    arguments = schedule_arguments(diffusion)
    leading = arguments | {"clip_sample": sampling.clip, "timestep_spacing": "leading"}
    # Thresholds between 1 and sample_max_value 1 (diffusers' default) clip to [-1, 1].
    trailing = arguments | {"thresholding": sampling.clip, "timestep_spacing": "trailing"}
    if sampling.sampler == "ddim":
        scheduler = DDIMScheduler(**leading, steps_offset=1, set_alpha_to_one=sampling.set_alpha_to_one)
    elif sampling.sampler == "ddpm":
        scheduler = DDPMScheduler(**leading, variance_type="learned_range" if learned_variance else "fixed_small")
    elif sampling.sampler == "dpm-solver++":
        scheduler = DPMSolverMultistepScheduler(**trailing)
    else:
        scheduler = UniPCMultistepScheduler(**trailing)
    scheduler.set_timesteps(sampling.steps)
    return scheduler


def sampling_timesteps(diffusion: DiffusionConfig, sampling: SamplingConfig) -> list[int]:
    """Return the timesteps a sample passes through, from noise to data."""
    return build_scheduler(diffusion, sampling).timesteps.tolist()


@torch.inference_mode()
def sample(
    denoise: Denoise,
    x: Tensor,
    diffusion: DiffusionConfig,
    sampling: SamplingConfig,
    fresh_noise: FreshNoise,
    timesteps: Sequence[int] | None = None,
    *,
    learned_variance: bool = False,
) -> Tensor:
    """Denoise ``x`` (B, C, H, W), standard normal, to images of the training data's range.

    With ``timesteps``, a run of those of ``sampling_timesteps``, only these steps are taken; ``x`` is then the result of the
    steps before. Until the last step, the memory of a multistep solver follows x_t along the channels. ``fresh_noise`` is
    called only where the sampler is stochastic: DDPM, or DDIM with eta > 0.
    """
    scheduler = build_scheduler(diffusion, sampling, learned_variance=learned_variance)
    every = scheduler.timesteps.tolist()
    timesteps = every if timesteps is None else timesteps
    x = _remind(scheduler, x, every.index(timesteps[0]))
    arguments: dict[str, Any] = {"eta": sampling.eta} if sampling.sampler == "ddim" else {}
    stochastic = sampling.sampler == "ddpm" or arguments.get("eta", 0.0) > 0
    for t in timesteps:
        predicted = denoise(x, t)
        if learned_variance and sampling.sampler != "ddpm":
            predicted = predicted[:, : x.shape[1]]
        if stochastic:
            arguments["generator"] = fresh_noise(t)
        x = scheduler.step(predicted, t, x, **arguments).prev_sample
    return x if t == every[-1] else torch.cat([x, *_remembered(scheduler)], dim=1)


def _remembered(scheduler: SchedulerMixin) -> list[Tensor]:
    """Return what a multistep solver keeps of earlier steps: predicted images and, for UniPC, its last x; (B, C, H, W) each."""
    if not hasattr(scheduler, "model_outputs"):
        return []
    last = scheduler.model_outputs[-1]
    predicted = [last if images is None else images for images in scheduler.model_outputs]  # none yet: nothing will read it
    return [*predicted, scheduler.last_sample] if hasattr(scheduler, "last_sample") else predicted


def _remind(scheduler: SchedulerMixin, state: Tensor, taken: int) -> Tensor:
    """Bring a new scheduler into the state after ``taken`` steps, from ``state``, and return the part of it that is x_t (B, C,
    H, W)."""
    if not taken or not hasattr(scheduler, "model_outputs"):
        return state
    order = scheduler.config.solver_order
    parts = state.chunk(1 + order + hasattr(scheduler, "last_sample"), dim=1)
    scheduler.model_outputs, scheduler.lower_order_nums = list(parts[1 : 1 + order]), min(taken, order)
    if hasattr(scheduler, "last_sample"):
        scheduler.last_sample, scheduler.this_order = parts[-1], min(order, taken, scheduler.num_inference_steps - taken + 1)
    return parts[0].contiguous(memory_format=torch.channels_last)


def guided(denoise: Callable[[Tensor, float, Tensor], Tensor], labels: Tensor, scale: float, no_class: int) -> Denoise:
    """Return a denoiser with classifier-free guidance (Ho and Salimans 2021, Eq. 6, w = scale - 1).

    Its prediction moves from that without a class toward, and beyond, that with the class. ``labels`` are (B,). With ``scale``
    1 the network runs once per step, else twice.
    """
    if scale == 1:
        return lambda x, t: denoise(x, t, labels)

    def denoise_guided(x: Tensor, t: float) -> Tensor:
        twice = denoise(torch.cat([x, x]), t, torch.cat([labels, torch.full_like(labels, no_class)]))
        with_class, without = twice.chunk(2)
        return without + scale * (with_class - without)

    return denoise_guided


def starting_noise(image: ImageConfig, seed: int, first: int, count: int) -> Tensor:
    """Return the noise of images ``first`` to ``first + count - 1``. Image i's is a function of (seed, i), whatever the batch
    size."""
    shape = (image.channels, image.size, image.size)
    return torch.stack([torch.randn(shape, generator=generator(seed, "image", index)) for index in range(first, first + count)])


def draw_images(
    denoise: Callable[[Tensor, float, Tensor], Tensor],
    count: int,
    config: Config,
    seed: int,
    device: torch.device | str = "cpu",
    *,
    decode: Callable[[Tensor], Tensor] = lambda x: x,
    segments: Sequence[Sequence[int]] | None = None,
) -> Iterator[Tensor]:
    """Yield ``count`` images in batches, uint8 (B, C, H, W) on ``device``; image i does not depend on the batch size.

    Where the network takes classes, image i is of class i modulo their number. ``decode`` turns denoised latents into images in
    [-1, 1]. ``segments`` cut ``sampling_timesteps`` into runs. All batches pass one run before the next begins, and their
    states are stored on disk meanwhile, so that ``denoise`` loads whatever a run needs only once.
    """
    size = config.sampling.batch_size
    segments = segments or [sampling_timesteps(config.diffusion, config.sampling)]
    with tempfile.TemporaryDirectory(prefix="meme-states-") as folder:
        for position, timesteps in enumerate(segments):
            for first in range(0, count, size):
                indices = range(first, min(first + size, count))
                state = Path(folder) / f"{first}.npy"
                x = torch.from_numpy(np.load(state)) if position else starting_noise(config.image, seed, first, len(indices))
                x = pass_through(denoise, x, indices, timesteps, config, seed, device)
                if position < len(segments) - 1:
                    np.save(state, x.cpu().numpy())
                else:
                    yield to_uint8(decode(x))


def pass_through(
    denoise: Callable[[Tensor, float, Tensor], Tensor],
    x: Tensor,
    indices: range,
    timesteps: Sequence[int],
    config: Config,
    seed: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Denoise images ``indices`` from their states ``x`` (B, C, H, W) before ``timesteps`` to their states after, on
    ``device``.

    ``timesteps`` are a run of ``sampling_timesteps``. The result is a function of (denoise, x, seed, index).
    """
    classes = config.network.classes
    labels = torch.tensor([index % max(classes, 1) for index in indices], device=device)
    return sample(
        guided(denoise, labels, config.sampling.guidance_scale, classes),
        x.to(device).contiguous(memory_format=torch.channels_last),
        config.diffusion,
        config.sampling,
        _fresh_noise(seed, indices),
        timesteps,
        learned_variance=config.network.learned_variance,
    )


def _fresh_noise(seed: int, indices: range) -> FreshNoise:
    """Return sources that are functions of (seed, image, t), so that no state of theirs is kept between segments."""
    return lambda t: [generator(seed, "fresh noise", index, t) for index in indices]


def to_uint8(x: Tensor) -> Tensor:
    """Scale [-1, 1] to 0..255."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
