"""The losses that training minimises: Eq. 2 of the paper, and for ADM the hybrid loss and P2's weights.

Shapes: ``B`` batch, ``C H W`` image, ``T`` timesteps. Every loss is a mean over pixels and images.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor

from meme.config.schema import Config

VARIATIONAL_WEIGHT = 1e-3  # lambda of L_hybrid = L_simple + lambda L_vlb (Nichol and Dhariwal 2021, Eq. 16)
HALF_PIXEL = 1 / 255  # of the 256 values of a channel in [-1, 1]


class DenoisingLoss:
    """The loss of one expert's training: ``loss(predicted, x_0, x_t, epsilon, t)``."""

    def __init__(self, config: Config, process: DDPMScheduler, device: torch.device | str = "cpu"):
        training = config.training
        self.timesteps = config.diffusion.timesteps
        self.alphas = process.alphas_cumprod.to(device)
        weights = p2_weights(process.alphas_cumprod, training.p2_gamma, training.p2_k)
        self.weights = weights.to(device) if training.p2_gamma else None
        self.learned_variance = config.network.learned_variance
        self.posterior = Posterior.of(process, device)

    def __call__(self, predicted: Tensor, x_0: Tensor, x_t: Tensor, epsilon: Tensor, t: Tensor) -> Tensor:
        """Return the loss (). ``predicted`` is (B, C, H, W), or (B, 2C, H, W) with a learned variance; images are (B, C, H, W),
        ``t`` (B,)."""
        predicted = predicted.float()
        noise = predicted[:, : epsilon.shape[1]]
        if self.weights is None:
            loss = F.mse_loss(noise, epsilon)  # Eq. 2
        else:
            loss = (_per_image(self.weights, t) * (noise - epsilon).square()).mean()
        if self.learned_variance:
            # The bound trains the variance only: its mean is held fixed (Nichol and Dhariwal 2021, Sec. 3.1).
            bound = self.variational_bound(noise.detach(), predicted[:, epsilon.shape[1] :], x_0, x_t, t)
            loss = loss + VARIATIONAL_WEIGHT * self.timesteps * bound.mean()
        return loss

    def variational_bound(self, noise: Tensor, share: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return L_t of the variational bound, in bits per dimension: (B,).

        It is KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and at t = 0 the negative log-likelihood of the data's 256 values.
        ``share`` (B, C, H, W) runs from -1, the least log-variance a step can have, to 1, the largest (Eq. 15).
        """
        alpha = _per_image(self.alphas, t)
        predicted_x_0 = (x_t - (1 - alpha).sqrt() * noise) / alpha.sqrt()
        log_least = _per_image(self.posterior.log_variance, t)
        log_variance = log_least + (share + 1) / 2 * (_per_image(self.posterior.log_beta, t) - log_least)
        mean, predicted_mean = self.posterior.mean(x_0, x_t, t), self.posterior.mean(predicted_x_0, x_t, t)
        narrowed = log_least - log_variance
        divergence = 0.5 * (narrowed.exp() - narrowed - 1 + (mean - predicted_mean).square() / log_variance.exp())
        likelihood = _discretized_log_likelihood(x_0, predicted_mean, log_variance)
        nats = torch.where(t.view(-1, 1, 1, 1) == 0, -likelihood, divergence)
        return nats.mean(dim=(1, 2, 3)) / math.log(2)


@dataclass(frozen=True)
class Posterior:
    """q(x_{t-1} | x_t, x_0), a Gaussian (Ho et al. 2020, Eq. 7), as tables over t: (T,) each."""

    log_variance: Tensor
    log_beta: Tensor
    of_x_0: Tensor
    of_x_t: Tensor

    @classmethod
    def of(cls, process: DDPMScheduler, device: torch.device | str = "cpu") -> "Posterior":
        alphas, betas = process.alphas_cumprod.double(), process.betas.double()
        before = torch.cat([torch.ones(1, dtype=torch.float64), alphas[:-1]])
        variance = betas * (1 - before) / (1 - alphas)
        variance[0] = variance[min(1, len(variance) - 1)]  # it has none at t = 0; Nichol and Dhariwal take that of t = 1
        of_x_0, of_x_t = betas * before.sqrt() / (1 - alphas), (1 - before) * (1 - betas).sqrt() / (1 - alphas)
        tables = variance.clamp(min=1e-20).log(), betas.log(), of_x_0, of_x_t
        return cls(*(table.float().to(device) for table in tables))

    def mean(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return _per_image(self.of_x_0, t) * x_0 + _per_image(self.of_x_t, t) * x_t


def p2_weights(alphas: Tensor, gamma: float, k: float) -> Tensor:
    """Return the perception prioritised weights 1 / (k + SNR)^gamma of every timestep (Choi et al. 2022, Eq. 8): (T,)."""
    return (k + alphas / (1 - alphas)) ** -gamma


def _per_image(table: Tensor, t: Tensor) -> Tensor:
    """Return the entries of a table over timesteps for each image: (B, 1, 1, 1)."""
    return table[t].view(-1, 1, 1, 1)


def _discretized_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return the log-probability of 256 pixel values in [-1, 1] under a Gaussian; the outermost values include the tails (Ho et
    al. 2020, Eq. 13)."""
    inverse = (-0.5 * log_variance).exp()
    upper = torch.special.ndtr((x - mean + HALF_PIXEL) * inverse)
    lower = torch.special.ndtr((x - mean - HALF_PIXEL) * inverse)
    upper = torch.where(x > 1 - HALF_PIXEL, 1.0, upper)
    lower = torch.where(x < -1 + HALF_PIXEL, 0.0, lower)
    return (upper - lower).clamp(min=1e-12).log()
