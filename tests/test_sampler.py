"""Samplers against their papers' formulas in float64, against diffusers run by hand, and their independence of batches."""

import itertools
import tempfile

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from meme.config.presets import preset, preset_names
from meme.config.schema import Config, DiffusionConfig, ImageConfig, SamplingConfig
from meme.diffusion.sampler import build_scheduler, draw_images, guided, sample, sampling_timesteps, starting_noise, to_uint8
from meme.support.seeding import generator

DIFFUSION = DiffusionConfig()
ALPHAS = np.cumprod(1 - np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2)
DIFFUSERS = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}
IMAGE = ImageConfig(channels=3, size=4)
SAMPLERS = {
    "ddim": {},
    "ddim with noise": {"eta": 1.0},
    "ddpm": {"sampler": "ddpm"},
    "dpm-solver++": {"sampler": "dpm-solver++"},
    "unipc": {"sampler": "unipc"},
}


def predicted_noise(x, t, labels=None):
    """Some smooth function of x and t, for torch and numpy alike; large enough that clipping has work."""
    return 0.8 * x - 0.3 * x**3 / (1 + x**2) + t / 1500 - 0.2


def generators(count: int) -> list[torch.Generator]:
    return [generator(0, "test", index) for index in range(count)]


def sampled(sampling: SamplingConfig, denoise=predicted_noise, count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Starting noise and images."""
    x = starting_noise(IMAGE, 0, 0, count)
    sources = generators(count)
    return x, sample(denoise, x, DIFFUSION, sampling, lambda t: sources)


def fresh_noise(steps: int, count: int) -> list[np.ndarray]:
    """What each step draws: (B, C, H, W), every image from its own source."""
    sources = generators(count)
    shape = (1, IMAGE.channels, IMAGE.size, IMAGE.size)
    return [torch.cat([torch.randn(shape, generator=source) for source in sources]).double().numpy() for _ in range(steps)]


def clipped(x_0: np.ndarray, clip: bool) -> np.ndarray:
    return np.clip(x_0, -1, 1) if clip else x_0


def ddim_reference(
    x: np.ndarray, steps: int, eta: float, clip: bool, noise: list[np.ndarray], last_alpha: float = ALPHAS[0]
) -> np.ndarray:
    """Song et al. 2021, Eq. 12 and 16, on timesteps 1, 1 + T/S, ...; the last step goes to ``last_alpha``."""
    times = [1 + number * (1000 // steps) for number in range(steps)]
    for number in reversed(range(steps)):
        alpha, before = ALPHAS[times[number]], ALPHAS[times[number - 1]] if number else last_alpha
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


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_to_alpha_1_is_song_et_al_eq_12(eta):
    x, images = sampled(SamplingConfig(steps=20, eta=eta, set_alpha_to_one=True))
    noise = fresh_noise(20, 3)
    assert_follows(images, ddim_reference(x.double().numpy(), 20, eta, False, noise, last_alpha=1.0))


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("steps", [1, 20, 100])
def test_ddpm_is_the_posterior_of_ho_et_al(steps, clip):
    x, images = sampled(SamplingConfig(sampler="ddpm", steps=steps, clip=clip))
    assert_follows(images, ddpm_reference(x.double().numpy(), steps, clip, fresh_noise(steps, 3)))


@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm-solver++", "unipc"])
def test_a_denoiser_that_knows_the_answer_is_followed_to_it(name, steps):
    """Images of pixel presets have no noise left: whatever x_t is, its true noise leads to ``answer``."""
    answer = torch.linspace(-1, 1, 16).reshape(1, 1, 4, 4).expand(3, 3, 4, 4)

    def true_noise(x, t):
        return (x - ALPHAS[int(t)] ** 0.5 * answer) / (1 - ALPHAS[int(t)]) ** 0.5

    sampling = preset("tiny-meme").sampling.model_copy(update={"sampler": name, "steps": steps})
    _, images = sampled(sampling, true_noise)
    assert (images - answer).abs().max() < 1e-4
    assert torch.equal(to_uint8(images), to_uint8(answer))


def test_latents_end_at_the_noise_level_of_latent_diffusion():
    def true_noise(x, t):
        return x / (1 - ALPHAS[int(t)]) ** 0.5  # the answer is 0

    _, images = sampled(preset("ffhq-meme").sampling, true_noise)
    np.testing.assert_allclose(images.std(), (1 - ALPHAS[0]) ** 0.5, rtol=0.3)


def test_every_pixel_preset_ends_at_the_image_and_no_latent_one():
    for name in preset_names():
        assert preset(name).sampling.set_alpha_to_one == (preset(name).first_stage is None)


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


MULTISTEP = {"dpm-solver++": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}


@pytest.mark.parametrize("steps", [1, 2, 10, 25])
@pytest.mark.parametrize("name", MULTISTEP)
def test_multistep_solvers_are_the_schedulers_of_diffusers_run_by_hand(name, steps):
    scheduler = MULTISTEP[name](**DIFFUSERS, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    x, images = sampled(SamplingConfig(sampler=name, steps=steps))
    expected = x
    for t in scheduler.timesteps:
        expected = scheduler.step(predicted_noise(expected, int(t)), t, expected).prev_sample
    assert torch.equal(images, expected)


@pytest.mark.parametrize("name", MULTISTEP)
def test_multistep_solvers_predict_clipped_images(name):
    _, images = sampled(SamplingConfig(sampler=name, steps=1, clip=True), lambda x, t: torch.zeros_like(x))
    assert images.abs().max() == 1


@pytest.mark.parametrize("name", MULTISTEP)
def test_second_order_solvers_come_nearer_to_the_many_steps_of_ddim(name):
    _, exact = sampled(SamplingConfig(steps=500))
    (_, ddim), (_, solver) = (sampled(SamplingConfig(sampler=each, steps=10)) for each in ("ddim", name))
    assert (solver - exact).abs().mean() < (ddim - exact).abs().mean()


@settings(deadline=None, max_examples=50)
@given(steps=st.sampled_from([steps for steps in range(1, 1001) if 1000 % steps == 0]), name=st.sampled_from([*MULTISTEP]))
def test_timesteps_of_multistep_solvers_end_at_the_noise(steps, name):
    times = sampling_timesteps(DIFFUSION, SamplingConfig(sampler=name, steps=steps))
    assert times == [(number + 1) * (1000 // steps) - 1 for number in reversed(range(steps))]


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


def config_of(sampling: SamplingConfig) -> Config:
    """A config of which only image, diffusion and sampling matter here."""
    network = {"family": "ldm", "channels": 8, "multipliers": (1,), "head_channels": 8, "norm_groups": 8}
    training = {"steps": 1, "batch_size": 1, "learning_rate": 1e-3}
    experts = [{"interval": (0, 1000)}]
    return Config(name="", image=IMAGE, network=network, experts=experts, training=training, sampling=sampling)


def drawn(batch_size: int, count: int = 7, seed: int = 0, **fields) -> torch.Tensor:
    sampling = SamplingConfig(steps=10, batch_size=batch_size, clip=True, **fields)
    return torch.cat(list(draw_images(predicted_noise, count, config_of(sampling), seed)))


def test_starting_noise_of_an_image_is_a_function_of_seed_and_number():
    whole = starting_noise(IMAGE, 5, 0, 7)
    parts = [starting_noise(IMAGE, 5, first, count) for first, count in ((0, 1), (1, 4), (5, 2))]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, starting_noise(IMAGE, 6, 0, 7))
    assert len(whole.flatten(1).unique(dim=0)) == 7


@pytest.mark.parametrize("fields", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_images_do_not_depend_on_the_batch_size_or_on_how_many_follow(batch_size, fields):
    expected = drawn(7, **fields).int()
    assert (drawn(batch_size, **fields).int() - expected).abs().max() <= 1
    assert (drawn(batch_size, count=3, **fields).int() - expected[:3]).abs().max() <= 1
    assert (drawn(7, seed=1, **fields).int() - expected).abs().max() > 1


def test_batches_are_uint8_of_the_asked_sizes():
    sampling = SamplingConfig(steps=2, batch_size=3)
    batches = list(draw_images(predicted_noise, 7, config_of(sampling), 0))
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


# Learned variance


def with_variance(x, t, labels=None):
    """The predicted noise, and beside it where between least and largest the log-variance lies."""
    return torch.cat([predicted_noise(x, t), torch.tanh(x + t / 1000)], dim=1)


def test_ddpm_takes_the_learned_variance():
    """Nichol and Dhariwal 2021, Eq. 15, on timesteps 0, T/S, ..."""
    sources, sampling = generators(3), SamplingConfig(sampler="ddpm", steps=20)
    start = starting_noise(IMAGE, 0, 0, 3)
    images = sample(with_variance, start, DIFFUSION, sampling, lambda t: sources, learned_variance=True)
    x, times, noise = start.double().numpy(), [number * 50 for number in range(20)], fresh_noise(20, 3)
    for number in reversed(range(20)):
        alpha, before = ALPHAS[times[number]], ALPHAS[times[number - 1]] if number else 1.0
        beta = 1 - alpha / before
        x_0 = (x - np.sqrt(1 - alpha) * predicted_noise(x, times[number])) / np.sqrt(alpha)
        mean = np.sqrt(before) * beta / (1 - alpha) * x_0 + np.sqrt(1 - beta) * (1 - before) / (1 - alpha) * x
        share = (np.tanh(x + times[number] / 1000) + 1) / 2
        least = np.log(max((1 - before) / (1 - alpha) * beta, 1e-20))
        x = mean + (np.exp((share * np.log(beta) + (1 - share) * least) / 2) * noise[19 - number] if number else 0)
    assert_follows(images, x)


def test_ddim_has_its_own_variance():
    sampling = SamplingConfig(steps=20, eta=0.5)
    x = starting_noise(IMAGE, 0, 0, 2)
    learned, plain = (
        sample(
            denoise, x, DIFFUSION, sampling, lambda t: [generator(0, index, t) for index in range(2)], learned_variance=learned
        )
        for denoise, learned in ((with_variance, True), (predicted_noise, False))
    )
    assert torch.equal(learned, plain)


# Guidance


def of_class(x, t, labels):
    return predicted_noise(x, t) * (1 + labels.view(-1, 1, 1, 1))


def test_guidance_goes_from_no_class_toward_the_class_and_beyond():
    x, labels = torch.randn(2, 3, 4, 4), torch.tensor([0, 4])
    toward = guided(of_class, labels, scale=3.0, no_class=9)
    without, with_class = (of_class(x, 5, each) for each in (torch.tensor([9, 9]), labels))
    torch.testing.assert_close(toward(x, 5), without + 3.0 * (with_class - without))


@pytest.mark.parametrize(("scale", "label"), [(0.0, 9), (1.0, 4)])
def test_guidance_of_zero_ignores_the_class_and_of_one_follows_it(scale, label):
    x = torch.randn(1, 3, 4, 4)
    found = guided(of_class, torch.tensor([4]), scale, no_class=9)(x, 5)
    torch.testing.assert_close(found, of_class(x, 5, torch.tensor([label])))


def test_guidance_of_one_asks_once():
    asked = []

    def counting(x, t, labels):
        asked.append((len(x), labels.tolist()))
        return x

    guided(counting, torch.tensor([1, 2]), 1.0, no_class=9)(torch.zeros(2, 3, 4, 4), 0)
    guided(counting, torch.tensor([1, 2]), 1.5, no_class=9)(torch.zeros(2, 3, 4, 4), 0)
    assert asked == [(2, [1, 2]), (4, [1, 2, 9, 9])]


def test_image_i_is_of_class_i_modulo_their_number_whatever_the_batch():
    asked = []

    def counting(x, t, labels):
        asked.append(labels.tolist())
        return x

    config = config_of(SamplingConfig(steps=1, batch_size=4)).with_(network={"classes": 3})
    list(draw_images(counting, 7, config, 0))
    assert asked == [[0, 1, 2, 0], [1, 2, 0]]


# Segments


@pytest.mark.parametrize("fields", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("cuts", [[5], [1, 2, 9], [3, 7], range(1, 10)], ids=str)
def test_segments_give_the_same_images_bit_for_bit(cuts, fields):
    config = config_of(SamplingConfig(steps=10, batch_size=3, **fields))
    times = sampling_timesteps(config.diffusion, config.sampling)
    segments = [times[first:end] for first, end in itertools.pairwise([0, *cuts, len(times)])]
    whole, cut = (torch.cat(list(draw_images(predicted_noise, 7, config, 0, segments=each))) for each in (None, segments))
    assert torch.equal(whole, cut)
    assert len(whole.unique()) > 10


def test_all_batches_pass_a_segment_before_the_next_begins():
    asked = []
    config = config_of(SamplingConfig(steps=4, batch_size=2))
    list(draw_images(lambda x, t, labels: asked.append((t, len(x))) or x, 3, config, 0, segments=[[751, 501], [251], [1]]))
    assert asked == [(751, 2), (501, 2), (751, 1), (501, 1), (251, 2), (251, 1), (1, 2), (1, 1)]


def test_no_state_is_left_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    config = config_of(SamplingConfig(steps=2, batch_size=2))
    images = draw_images(predicted_noise, 4, config, 0, segments=[[501], [1]])
    next(images)
    states = list(tmp_path.rglob("*.npy"))
    assert len(states) == 2
    images.close()
    assert not list(tmp_path.iterdir())


def test_images_are_decoded_before_they_become_bytes():
    config = config_of(SamplingConfig(steps=2, batch_size=2))
    plain, negative = (
        torch.cat(list(draw_images(predicted_noise, 3, config, 0, decode=decode))) for decode in (lambda x: x, lambda x: -x)
    )
    assert (plain.int() + negative.int() - 255).abs().max() <= 1


def test_a_deterministic_sampler_never_asks_for_fresh_noise():
    def refuse(t):
        raise AssertionError

    sample(predicted_noise, torch.zeros(1, 3, 4, 4), DIFFUSION, SamplingConfig(steps=4), refuse)
