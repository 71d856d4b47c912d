"""The training losses against their papers' formulas, written independently with PyTorch's own distributions."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from meme.config.presets import preset
from meme.config.schema import DiffusionConfig
from meme.diffusion.loss import DenoisingLoss, Posterior, p2_weights
from meme.diffusion.process import forward_process

LINEAR = {"schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
ALPHAS = (1 - BETAS).cumprod(0)


def loss_of(learned_variance: bool = False, **training) -> DenoisingLoss:
    config = preset("digits-ldm-s").with_(diffusion=LINEAR, network={"learned_variance": learned_variance}, training=training)
    return DenoisingLoss(config, forward_process(config.diffusion))


def step(t: list[int], channels: int = 1, seed: int = 0):
    """Images of 256 values, their noised versions, the noise and t."""
    source = torch.Generator().manual_seed(seed)
    shape = (len(t), channels, 4, 4)
    x_0 = torch.randint(0, 256, shape, generator=source) / 127.5 - 1
    epsilon, times = torch.randn(shape, generator=source), torch.tensor(t)
    alpha = ALPHAS[times].float().view(-1, 1, 1, 1)
    return x_0, alpha.sqrt() * x_0 + (1 - alpha).sqrt() * epsilon, epsilon, times


def posterior_by_bayes(x_0: torch.Tensor, x_t: torch.Tensor, t: int) -> Normal:
    """q(x_{t-1} | x_t, x_0) as the product of q(x_{t-1} | x_0) and q(x_t | x_{t-1}): precisions add. t >= 1."""
    before, beta = ALPHAS[t - 1], BETAS[t]
    precision = 1 / (1 - before) + (1 - beta) / beta
    mean = (before.sqrt() * x_0 / (1 - before) + (1 - beta).sqrt() * x_t / beta) / precision
    return Normal(mean, precision**-0.5)


def test_the_plain_loss_is_the_mean_squared_error_to_the_last_bit():
    x_0, x_t, epsilon, t = step([3, 500, 999])
    predicted = torch.randn(epsilon.shape)
    assert torch.equal(loss_of()(predicted, x_0, x_t, epsilon, t), F.mse_loss(predicted, epsilon))


@pytest.mark.parametrize(("gamma", "k"), [(1.0, 1.0), (0.5, 1.0), (1.0, 2.0)])
def test_p2_weighs_each_image_by_its_signal_to_noise_ratio(gamma, k):
    x_0, x_t, epsilon, t = step([0, 500, 999])
    predicted = torch.randn(epsilon.shape)
    errors = (predicted - epsilon).square().mean(dim=(1, 2, 3))
    snr = (ALPHAS / (1 - ALPHAS))[t]
    expected = (errors / (k + snr) ** gamma).mean()
    found = loss_of(p2_gamma=gamma, p2_k=k)(predicted, x_0, x_t, epsilon, t)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_p2_weights_grow_with_noise_and_are_one_without_gamma():
    weights = p2_weights(ALPHAS, gamma=1.0, k=1.0)
    assert (weights.diff() > 0).all()
    torch.testing.assert_close(weights, 1 - ALPHAS)  # k = gamma = 1: 1 / (1 + SNR)
    assert torch.equal(p2_weights(ALPHAS, gamma=0.0, k=1.0), torch.ones_like(ALPHAS))


@given(t=st.integers(2, 999), seed=st.integers(0, 99))
def test_the_posterior_is_bayes_rule(t, seed):
    x_0, x_t, _, times = step([t], seed=seed)
    posterior, expected = Posterior.of(forward_process(DiffusionConfig(**LINEAR))), posterior_by_bayes(x_0, x_t, t)
    torch.testing.assert_close(posterior.mean(x_0, x_t, times), expected.mean, atol=1e-3, rtol=1e-3)
    assert posterior.log_variance[t].exp().item() == pytest.approx(expected.variance.flatten()[0].item(), rel=1e-3)


@given(t=st.integers(2, 999), share=st.floats(-1, 1), seed=st.integers(0, 99))
def test_the_bound_is_the_divergence_of_the_two_steps_in_bits(t, share, seed):
    x_0, x_t, epsilon, times = step([t], seed=seed)
    predicted = epsilon + 0.1 * torch.randn(epsilon.shape, generator=torch.Generator().manual_seed(seed))
    true = posterior_by_bayes(x_0.double(), x_t.double(), t)
    predicted_x_0 = (x_t - (1 - ALPHAS[t]).sqrt() * predicted) / ALPHAS[t].sqrt()
    mean = posterior_by_bayes(predicted_x_0, x_t.double(), t).mean
    log_variance = (1 + share) / 2 * BETAS[t].log() + (1 - share) / 2 * true.variance.log()
    expected = kl_divergence(true, Normal(mean, (log_variance / 2).exp())).mean() / math.log(2)
    found = loss_of(learned_variance=True).variational_bound(predicted, torch.full_like(x_0, share), x_0, x_t, times)
    assert found.item() == pytest.approx(expected.item(), rel=1e-2, abs=1e-6)


def test_a_perfect_prediction_with_the_posteriors_variance_costs_nothing():
    x_0, x_t, epsilon, t = step([1, 400, 999])
    bound = loss_of(learned_variance=True).variational_bound(epsilon, torch.full_like(x_0, -1.0), x_0, x_t, t)
    assert bound.abs().max() < 1e-5


def test_at_t_0_the_bound_is_the_likelihood_of_the_pixels():
    x_0, x_t, epsilon, t = step([0])
    x_0[0, 0, 0, :2] = torch.tensor([-1.0, 1.0])  # the two that take the tails
    predicted = epsilon + 1.0
    mean = ((x_t - (1 - ALPHAS[0]).sqrt() * predicted) / ALPHAS[0].sqrt()).double()
    sigma = (BETAS[1] * (1 - ALPHAS[0]) / (1 - ALPHAS[1])).sqrt()
    gaussian, x = Normal(mean, sigma), x_0.double()
    upper = torch.where(x_0 > 0.999, 1.0, gaussian.cdf(x + 1 / 255))
    lower = torch.where(x_0 < -0.999, 0.0, gaussian.cdf(x - 1 / 255))
    expected = -(upper - lower).clamp(min=1e-12).log2().mean()
    found = loss_of(learned_variance=True).variational_bound(predicted, torch.full_like(x_0, -1.0), x_0, x_t, t)
    assert found.item() == pytest.approx(expected.item(), rel=1e-2)


def test_the_likelihood_of_all_pixel_values_sums_to_one():
    values = (torch.arange(256) / 127.5 - 1).view(256, 1, 1, 1)
    loss = loss_of(learned_variance=True)
    x_t, share = torch.full((256, 1, 1, 1), 0.3), torch.full((256, 1, 1, 1), 1.0)
    bits = loss.variational_bound(torch.full((256, 1, 1, 1), 0.5), share, values, x_t, torch.zeros(256, dtype=torch.long))
    assert (2.0**-bits).sum().item() == pytest.approx(1.0, abs=1e-3)


def test_the_hybrid_loss_is_the_error_plus_the_bound_of_all_timesteps_a_thousandth_each():
    x_0, x_t, epsilon, t = step([0, 7, 600], channels=2)
    predicted = torch.randn(3, 4, 4, 4)
    loss = loss_of(learned_variance=True)
    bound = loss.variational_bound(predicted[:, :2], predicted[:, 2:], x_0, x_t, t).mean()
    expected = F.mse_loss(predicted[:, :2], epsilon) + 0.001 * 1000 * bound
    assert loss(predicted, x_0, x_t, epsilon, t).item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_bound_trains_the_variance_only():
    x_0, x_t, epsilon, t = step([5, 600])
    predicted = torch.randn(2, 2, 4, 4, requires_grad=True)
    loss_of(learned_variance=True)(predicted, x_0, x_t, epsilon, t).backward()
    by_error = 2 * (predicted[:, :1] - epsilon) / epsilon.numel()
    torch.testing.assert_close(predicted.grad[:, :1], by_error.detach())
    assert predicted.grad[:, 1:].abs().min() > 0


def test_even_one_timestep_has_a_finite_bound():
    config = preset("digits-ldm-s").with_(
        diffusion={"timesteps": 1}, sampling={"sampler": "ddpm", "steps": 1}, experts=[{"interval": (0, 1)}]
    )
    config = config.with_(network={"learned_variance": True})
    x_0, x_t, epsilon, t = step([0])
    assert DenoisingLoss(config, forward_process(config.diffusion))(torch.zeros(1, 2, 4, 4), x_0, x_t, epsilon, t).isfinite()
