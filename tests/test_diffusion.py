"""The forward process against numpy, and the soft draw of timesteps."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meme.config.schema import DiffusionConfig, ExpertConfig
from meme.diffusion.process import TrainingNoise, draw_timesteps, forward_process, training_noise

T = 1000
INTERVALS = st.tuples(st.integers(0, T - 1), st.integers(1, T)).filter(lambda edges: edges[0] < edges[1])


def noise_of(count: int, seed: int = 0, step: int = 0) -> TrainingNoise:
    return training_noise((count, 1, 1, 1), seed, step)


def extremes() -> TrainingNoise:
    """The ends and the middle of both draws: the rand functions give 0, but never 1."""
    below_one = float(np.nextafter(1.0, 0.0))
    places = torch.tensor([0.0, 0.5, below_one], dtype=torch.float64).repeat(2)
    return TrainingNoise(torch.tensor([0.0] * 3 + [1 - 2**-24] * 3), places, torch.zeros(6, 1, 1, 1))


@settings(deadline=None)
@given(interval=INTERVALS, seed=st.integers(0, 100))
def test_hard_assignment_draws_from_the_interval_only(interval, seed):
    expert = ExpertConfig(interval=interval, p=1.0)
    for noise in (noise_of(64, seed), extremes()):
        t = draw_timesteps(expert, T, noise)
        assert t.dtype == torch.int64
        assert interval[0] <= t.min() and t.max() < interval[1]


@settings(deadline=None)
@given(interval=INTERVALS, p=st.floats(0, 1), seed=st.integers(0, 100))
def test_soft_assignment_stays_within_all_timesteps(interval, p, seed):
    expert = ExpertConfig(interval=interval, p=p)
    for noise in (noise_of(64, seed), extremes()):
        t = draw_timesteps(expert, T, noise)
        assert t.min() >= 0 and t.max() < T


def test_without_expertise_every_timestep_can_come_and_the_interval_is_ignored():
    t = draw_timesteps(ExpertConfig(interval=(250, 260), p=0.0), T, extremes())
    assert t.tolist() == [0, 500, 999] * 2


@pytest.mark.parametrize("interval", [(0, 250), (250, 500), (900, 1000)])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.4, 0.8, 1.0])
def test_the_share_inside_the_interval_is_p_and_its_part_of_the_rest(interval, p):
    count = 40_000
    t = draw_timesteps(ExpertConfig(interval=interval, p=p), T, noise_of(count, seed=7))
    inside = ((t >= interval[0]) & (t < interval[1])).double().mean().item()
    expected = p + (1 - p) * (interval[1] - interval[0]) / T
    assert abs(inside - expected) <= 4 * (expected * (1 - expected) / count) ** 0.5 + 1e-12


def test_every_timestep_of_an_interval_is_as_likely():
    count, (first, end) = 50_000, (250, 300)
    t = draw_timesteps(ExpertConfig(interval=(first, end), p=1.0), T, noise_of(count))
    seen = torch.bincount(t - first, minlength=end - first).double()
    expected = count / (end - first)
    statistic = ((seen - expected) ** 2 / expected).sum().item()
    degrees = end - first - 1
    assert abs(statistic - degrees) <= 4 * (2 * degrees) ** 0.5  # chi-squared


def test_two_experts_share_their_random_numbers():
    noise = noise_of(2_000)
    low, high = (draw_timesteps(ExpertConfig(interval=interval, p=0.5), T, noise) for interval in ((0, 250), (750, 1000)))
    own = noise.soft < 0.5
    assert torch.equal(high[own], low[own] + 750)
    assert torch.equal(high[~own], low[~own])


def test_more_expertise_moves_only_the_timesteps_between_the_two_probabilities():
    noise = noise_of(2_000)
    some, more = (draw_timesteps(ExpertConfig(interval=(0, 250), p=p), T, noise) for p in (0.4, 0.6))
    between = (noise.soft >= 0.4) & (noise.soft < 0.6)
    assert torch.equal(some[~between], more[~between])
    assert not torch.equal(some[between], more[between])


def same_noise(one: TrainingNoise, other: TrainingNoise) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("soft", "place", "epsilon"))


def test_training_noise_is_a_function_of_seed_and_step():
    shape = (8, 3, 4, 4)
    first = training_noise(shape, seed=1, step=5)
    torch.rand(3)  # the global source does not matter
    assert same_noise(first, training_noise(shape, seed=1, step=5))
    others = [(2, 5), (1, 6), (6, 0), (0, 6), (5, 1)]  # also of equal sum, or swapped
    assert not any(same_noise(first, training_noise(shape, seed, step)) for seed, step in others)


def test_training_noise_is_standard_normal_and_uniform():
    noise = training_noise((4_000, 1, 4, 4), seed=0, step=0)
    count = noise.epsilon.numel()
    assert abs(noise.epsilon.mean().item()) <= 4 / count**0.5
    assert abs(noise.epsilon.var().item() - 1) <= 4 * (2 / count) ** 0.5
    for uniform in (noise.soft, noise.place):
        assert abs(uniform.double().mean().item() - 0.5) <= 4 * (1 / 12 / 4_000) ** 0.5
    correlation = np.corrcoef(noise.soft.numpy(), noise.place.numpy())[0, 1]
    assert abs(correlation) <= 4 / 4_000**0.5


def alphas_cumprod(diffusion: DiffusionConfig) -> np.ndarray:
    """The product of 1 - beta in float64."""
    ends = np.array([diffusion.beta_start, diffusion.beta_end])
    if diffusion.schedule == "scaled_linear":
        beta = np.linspace(*np.sqrt(ends), diffusion.timesteps) ** 2
    else:
        beta = np.linspace(*ends, diffusion.timesteps)
    return np.cumprod(1 - beta)


@pytest.mark.parametrize(
    "diffusion",
    [
        DiffusionConfig(),
        DiffusionConfig(schedule="linear", beta_start=1e-4, beta_end=0.02),
        DiffusionConfig(timesteps=50, beta_start=0.02, beta_end=0.3),
    ],
)
def test_add_noise_is_eq_1(diffusion):
    t = torch.tensor([0, 1, diffusion.timesteps // 2, diffusion.timesteps - 1])
    source = torch.Generator().manual_seed(0)
    x_0, epsilon = (torch.randn(4, 3, 4, 4, generator=source) for _ in range(2))
    alpha = alphas_cumprod(diffusion)[t.numpy()].reshape(4, 1, 1, 1)
    expected = np.sqrt(alpha) * x_0.numpy() + np.sqrt(1 - alpha) * epsilon.numpy()
    found = forward_process(diffusion).add_noise(x_0, epsilon, t).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_papers_schedule_ends_in_almost_pure_noise():
    last = forward_process(DiffusionConfig()).alphas_cumprod[-1].item()
    assert last == pytest.approx(alphas_cumprod(DiffusionConfig())[-1], rel=1e-3)
    assert last < 0.01
