"""Samplers against their papers' formulas in float64, against diffusers run by hand, and their independence of batches."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from meme.config import DiffusionConfig, ImageConfig, SamplingConfig
from meme.sampler import build_scheduler, draw_images, sample, sampling_timesteps, starting_noise, to_uint8
from meme.seeding import generator

DIFFUSION = DiffusionConfig()
ALPHAS = np.cumprod(1 - np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2)
DIFFUSERS = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}
IMAGE = ImageConfig(channels=3, size=4)


def predicted_noise(x, t):
    """Some smooth function of x and t, for torch and numpy alike; large enough that clipping has work."""
    return 0.8 * x - 0.3 * x**3 / (1 + x**2) + t / 1500 - 0.2


def generators(count: int) -> list[torch.Generator]:
    return [generator(0, "test", index) for index in range(count)]


def sampled(sampling: SamplingConfig, denoise=predicted_noise, count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Starting noise and images."""
    x = starting_noise(IMAGE, 0, 0, count)
    return x, sample(denoise, x, DIFFUSION, sampling, generators(count))


def fresh_noise(steps: int, count: int) -> list[np.ndarray]:
    """What each step draws: (B, C, H, W), every image from its own source."""
    sources = generators(count)
    shape = (1, IMAGE.channels, IMAGE.size, IMAGE.size)
    return [torch.cat([torch.randn(shape, generator=source) for source in sources]).double().numpy() for _ in range(steps)]


def clipped(x_0: np.ndarray, clip: bool) -> np.ndarray:
    return np.clip(x_0, -1, 1) if clip else x_0


def ddim_reference(x: np.ndarray, steps: int, eta: float, clip: bool, noise: list[np.ndarray]) -> np.ndarray:
    """Song et al. 2021, Eq. 12 and 16, on timesteps 1, 1 + T/S, ...; the last step goes to alpha_0, not to 1."""
    times = [1 + number * (1000 // steps) for number in range(steps)]
    for number in reversed(range(steps)):
        alpha, before = ALPHAS[times[number]], ALPHAS[times[number - 1]] if number else ALPHAS[0]
        sigma = eta * np.sqrt((1 - before) / (1 - alpha) * (1 - alpha / before))
        epsilon = predicted_noise(x, times[number])
        x_0 = clipped((x - np.sqrt(1 - alpha) * epsilon) / np.sqrt(alpha), clip)
        x = np.sqrt(before) * x_0 + np.sqrt(1 - before - sigma**2) * epsilon
        x = x + sigma * noise[steps - 1 - number]
    return x


def ddpm_reference(x: np.ndarray, steps: int, clip: bool, noise: list[np.ndarray]) -> np.ndarray:
    """Ho et al. 2020: the posterior q(x_s | x_t, x_0) of Eq. 7 with x_0 as predicted, on timesteps 0, T/S, ..."""
    times = [number * (1000 // steps) for number in range(steps)]
    for number in reversed(range(steps)):
        alpha, before = ALPHAS[times[number]], ALPHAS[times[number - 1]] if number else 1.0
        step_alpha = alpha / before
        x_0 = clipped((x - np.sqrt(1 - alpha) * predicted_noise(x, times[number])) / np.sqrt(alpha), clip)
        mean = np.sqrt(before) * (1 - step_alpha) / (1 - alpha) * x_0 + np.sqrt(step_alpha) * (1 - before) / (1 - alpha) * x
        deviation = np.sqrt((1 - before) / (1 - alpha) * (1 - step_alpha))
        x = mean + deviation * noise[steps - 1 - number]
    return x


def assert_follows(found: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 20, 50])
def test_ddim_is_song_et_al_eq_12(steps, eta, clip):
    x, images = sampled(SamplingConfig(steps=steps, eta=eta, clip=clip))
    assert_follows(images, ddim_reference(x.double().numpy(), steps, eta, clip, fresh_noise(steps, 3)))


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("steps", [1, 20, 100])
def test_ddpm_is_the_posterior_of_ho_et_al(steps, clip):
    x, images = sampled(SamplingConfig(sampler="ddpm", steps=steps, clip=clip))
    assert_follows(images, ddpm_reference(x.double().numpy(), steps, clip, fresh_noise(steps, 3)))


def run_by_hand(scheduler, x: torch.Tensor, **arguments) -> torch.Tensor:
    sources = generators(len(x))
    for t in scheduler.timesteps:
        x = scheduler.step(predicted_noise(x, int(t)), t, x, generator=sources, **arguments).prev_sample
    return x


@pytest.mark.parametrize("clip", [False, True])
def test_ddim_is_the_scheduler_of_diffusers_run_by_hand(clip):
    scheduler = DDIMScheduler(**DIFFUSERS, clip_sample=clip, set_alpha_to_one=False, steps_offset=1)
    scheduler.set_timesteps(25)
    x, images = sampled(SamplingConfig(steps=25, clip=clip))
    assert torch.equal(images, run_by_hand(scheduler, x, eta=0.0))


@pytest.mark.parametrize("clip", [False, True])
def test_ddpm_is_the_scheduler_of_diffusers_run_by_hand(clip):
    scheduler = DDPMScheduler(**DIFFUSERS, clip_sample=clip)
    scheduler.set_timesteps(25)
    x, images = sampled(SamplingConfig(sampler="ddpm", steps=25, clip=clip))
    assert torch.equal(images, run_by_hand(scheduler, x))


@settings(deadline=None, max_examples=50)
@given(steps=st.integers(1, 500), name=st.sampled_from(["ddim", "ddpm"]))
def test_timesteps_fall_evenly_within_the_schedule(steps, name):
    times = sampling_timesteps(DIFFUSION, SamplingConfig(sampler=name, steps=steps))
    first = 1 if name == "ddim" else 0
    assert times == [first + number * (1000 // steps) for number in reversed(range(steps))]
    assert times[0] < 1000


def test_the_denoiser_is_called_once_for_each_timestep_from_noise_to_data():
    called = []
    sampled(SamplingConfig(steps=20), lambda x, t: called.append(t) or x)
    assert called == sampling_timesteps(DIFFUSION, SamplingConfig(steps=20)) == sorted(called, reverse=True)


@pytest.mark.parametrize("sampling", [SamplingConfig(steps=20), SamplingConfig(sampler="ddpm", steps=100)])
def test_a_perfect_denoiser_recovers_the_image(sampling):
    x_0 = torch.linspace(-1, 1, 48).view(1, 3, 4, 4)

    def perfect(x, t):
        alpha = float(ALPHAS[t])
        return (x - alpha**0.5 * x_0) / (1 - alpha) ** 0.5

    _, images = sampled(sampling, perfect)
    left = 0.0 if sampling.sampler == "ddpm" else (1 - ALPHAS[0]) ** 0.5 * 4  # DDIM ends at alpha_0: a little noise stays
    assert (images - x_0).abs().max() <= left + 1e-3
    assert (images - x_0).std() <= 1.2 * (1 - ALPHAS[0]) ** 0.5


def drawn(batch_size: int, count: int = 7, seed: int = 0, **fields) -> torch.Tensor:
    sampling = SamplingConfig(steps=10, batch_size=batch_size, clip=True, **fields)
    return torch.cat(list(draw_images(predicted_noise, count, IMAGE, DIFFUSION, sampling, seed)))


def test_starting_noise_of_an_image_is_a_function_of_seed_and_number():
    whole = starting_noise(IMAGE, 5, 0, 7)
    parts = [starting_noise(IMAGE, 5, first, count) for first, count in ((0, 1), (1, 4), (5, 2))]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, starting_noise(IMAGE, 6, 0, 7))
    assert len(whole.flatten(1).unique(dim=0)) == 7


@pytest.mark.parametrize("fields", [{}, {"eta": 1.0}, {"sampler": "ddpm"}], ids=["ddim", "ddim with noise", "ddpm"])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_images_do_not_depend_on_the_batch_size_or_on_how_many_follow(batch_size, fields):
    expected = drawn(7, **fields).int()
    assert (drawn(batch_size, **fields).int() - expected).abs().max() <= 1
    assert (drawn(batch_size, count=3, **fields).int() - expected[:3]).abs().max() <= 1
    assert (drawn(7, seed=1, **fields).int() - expected).abs().max() > 1


def test_batches_are_uint8_of_the_asked_sizes():
    sampling = SamplingConfig(steps=2, batch_size=3)
    batches = list(draw_images(predicted_noise, 7, IMAGE, DIFFUSION, sampling, 0))
    assert [tuple(batch.shape) for batch in batches] == [(3, 3, 4, 4), (3, 3, 4, 4), (1, 3, 4, 4)]
    assert {batch.dtype for batch in batches} == {torch.uint8}


def test_a_sampler_keeps_no_state_between_samples():
    sampling = SamplingConfig(sampler="ddpm", steps=10)
    assert torch.equal(sampled(sampling)[1], sampled(sampling)[1])
    assert build_scheduler(DIFFUSION, sampling) is not build_scheduler(DIFFUSION, sampling)


def test_to_uint8_maps_the_ends_and_clips_what_lies_beyond():
    x = torch.tensor([-7.0, -1.0, -1 + 1 / 127.5, 0.0, 1 - 1 / 127.5, 1.0, 7.0])
    assert to_uint8(x).tolist() == [0, 0, 1, 128, 254, 255, 255]


def test_to_uint8_inverts_how_images_are_read():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(pixels.float() / 127.5 - 1), pixels)
