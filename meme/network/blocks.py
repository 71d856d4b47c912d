"""Layers of the U-Net of latent diffusion (Rombach et al. 2022; Dhariwal and Nichol 2021).

Shapes: ``B`` batch, ``C`` channels, ``H W`` space, ``N`` tokens, ``E`` width of the time embedding. Images are (B, C, H, W)
in memory order channels_last, which the convolutions of CPUs and tensor cores prefer.
"""

import math
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Resample = Literal["down", "up"]
Layer = TypeVar("Layer", bound=nn.Module)


def halved(x: Tensor) -> Tensor:
    """Average 2x2 pixels: (B, C, H, W) to (B, C, H/2, W/2)."""
    return F.avg_pool2d(x, 2)


def doubled(x: Tensor) -> Tensor:
    """Repeat each pixel 2x2 times: (B, C, H, W) to (B, C, 2H, 2W)."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def unchanged(x: Tensor) -> Tensor:
    return x


RESAMPLINGS = {"down": halved, "up": doubled, None: unchanged}


def channels_last(module: Layer) -> Layer:
    """Put the weights of ``module`` into the memory order channels_last, and return it."""
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # which torch's stubs do not know
    return module


def starts_at_zero(layer: Layer) -> Layer:
    """Mark a layer whose weights are initialised to zero, so that its residual branch starts as the identity."""
    vars(layer)["starts_at_zero"] = True
    return layer


def timestep_embedding(t: Tensor, channels: int) -> Tensor:
    """Return sinusoids of the timestep (Vaswani et al. 2017): (B,) to (B, channels)."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def self_attention(qkv: Tensor, head_channels: int) -> Tensor:
    """Apply multi-head self-attention to packed queries, keys and values: (B, N, 3C) to (B, N, C)."""
    q, k, v = rearrange(qkv, "b n (qkv heads d) -> qkv b heads n d", qkv=3, d=head_channels)
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b heads n d -> b n (heads d)")


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with the time embedding added between them, and a 1x1 skip where the width changes.

    ADM's version (Dhariwal and Nichol 2021) lets the time scale and shift the second norm instead (``scale_shift``), and may
    halve or double the resolution of both branches itself (``resample``).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding: int,
        groups: int,
        dropout: float,
        *,
        scale_shift: bool = False,
        resample: Resample | None = None,
    ):
        super().__init__()
        self.scale_shift, self.resample = scale_shift, RESAMPLINGS[resample]
        self.norm_in = nn.GroupNorm(groups, in_channels)
        self.conv_in = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(embedding, 2 * out_channels if scale_shift else out_channels)
        self.norm_out = nn.GroupNorm(groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = starts_at_zero(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map (B, C_in, H, W) and (B, E) to (B, C_out, H', W'), of the same size, half or twice."""
        hidden = self.conv_in(self.resample(F.silu(self.norm_in(x))))
        time = self.time(embedding)[:, :, None, None]
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            hidden = self.norm_out(hidden) * (1 + scale) + shift
        else:
            hidden = self.norm_out(hidden + time)
        return self.skip(self.resample(x)) + self.conv_out(self.dropout(F.silu(hidden)))


class AttentionBlock(nn.Module):
    """Self-attention over all positions, as a residual."""

    def __init__(self, channels: int, head_channels: int, groups: int):
        super().__init__()
        self.head_channels = head_channels
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = starts_at_zero(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")
        attended = self.out(self_attention(self.qkv(tokens), self.head_channels))
        return x + rearrange(attended, "b (h w) c -> b c h w", h=x.shape[2])


class Downsample(nn.Conv2d):
    """A strided 3x3 convolution to half the size: (B, C_in, H, W) to (B, C_out, H/2, W/2)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, stride=2, padding=1)


class Upsample(nn.Conv2d):
    """Nearest neighbours to twice the size, then a 3x3 convolution: (B, C, H, W) to (B, C, 2H, 2W)."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(doubled(x))
