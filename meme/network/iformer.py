"""The iFormer block (Si et al. 2022; Eq. 4-8 of the paper): some channels pass a convolution, the others attention.

Shapes: ``B`` batch, ``C`` channels, of which the first ``C_h`` are high and the last ``C_l`` low, ``H W`` space, ``E`` width of
the time embedding; the mixers work on (B, H, W, C), the memory order that linear layers and channels_last convolutions share, so
that neither copies.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from meme.config.architecture import HighPool, LowPool, TimeConditioning
from meme.network.blocks import self_attention, starts_at_zero, unchanged

LAYER_SCALE_START = 1e-6  # as Si et al. 2022


class IFormerBlock(nn.Module):
    """Inception mixer and MLP, both residual: (B, C, H, W) to the same.

    ``low_channels`` (C_l) runs from 0, all convolution, to ``channels``, all attention, in steps of ``head_channels``. The
    paper's block does not see the timestep. A conditioned one does, and starts as if it did not.
    """

    def __init__(
        self,
        channels: int,
        low_channels: int,
        head_channels: int,
        pool_stride: int,
        layer_scale: bool,
        *,
        low_pool: LowPool = "average",
        high_pool: HighPool = "max",
        time_conditioning: TimeConditioning = "none",
        embedding: int = 0,
    ):
        super().__init__()
        self.norm_mixer = nn.LayerNorm(channels)
        self.mixer = InceptionMixer(channels, low_channels, head_channels, pool_stride, low_pool, high_pool)
        self.norm_mlp = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))
        self.scale_mixer = nn.Parameter(torch.full((channels,), LAYER_SCALE_START)) if layer_scale else None
        self.scale_mlp = nn.Parameter(torch.full((channels,), LAYER_SCALE_START)) if layer_scale else None
        self.sees_time = time_conditioning != "none"
        if self.sees_time:
            self.time_mixer = TimeModulation(channels, embedding, adaptive=time_conditioning == "adaptive-norm")
            self.time_mlp = TimeModulation(channels, embedding, adaptive=time_conditioning == "adaptive-norm")

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """Map (B, C, H, W) to the same shape. ``embedding`` (B, E) of the timestep is needed where the block sees the
        timestep."""
        x = rearrange(x, "b c h w -> b h w c")
        normed = self.norm_mixer(x)
        x = x + _scaled(self.mixer(self.time_mixer(normed, embedding) if self.sees_time else normed), self.scale_mixer)
        normed = self.norm_mlp(x)
        x = x + _scaled(self.mlp(self.time_mlp(normed, embedding) if self.sees_time else normed), self.scale_mlp)
        return rearrange(x, "b h w c -> b c h w")


class TimeModulation(nn.Module):
    """Shifts normed channels by the time embedding, as latent diffusion's residual blocks do, or scales and shifts them
    (``adaptive``: Dhariwal and Nichol 2021; Peebles and Xie 2023).

    It maps (B, H, W, C) and (B, E) to (B, H, W, C), and starts as the identity.
    """

    def __init__(self, channels: int, embedding: int, adaptive: bool):
        super().__init__()
        self.adaptive = adaptive
        self.out = starts_at_zero(nn.Linear(embedding, 2 * channels if adaptive else channels))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        time = self.out(embedding)[:, None, None]
        if not self.adaptive:
            return x + time
        scale, shift = time.chunk(2, dim=-1)
        return x * (1 + scale) + shift


class InceptionMixer(nn.Module):
    """High and low mixers side by side, then fused: (B, H, W, C) to the same."""

    def __init__(
        self, channels: int, low_channels: int, head_channels: int, pool_stride: int, low_pool: LowPool, high_pool: HighPool
    ):
        super().__init__()
        self.split = [channels - low_channels, low_channels]
        self.high = HighMixer(channels, self.split[0], high_pool) if self.split[0] else None
        self.low = LowMixer(channels, low_channels, head_channels, pool_stride, low_pool) if low_channels else None
        self.fusion = Fusion(channels, low_channels)

    def forward(self, x: Tensor) -> Tensor:
        x_high, x_low = x.split(self.split, dim=-1)
        parts = [*self.high(x_high)] if self.high is not None else []
        if self.low is not None:
            parts.append(self.low(x_low))
        return self.fusion(torch.cat(parts, dim=-1))  # Eq. 7


class HighMixer(nn.Module):
    """Convolution on one half of the high channels, max-pooling on the other: (B, H, W, C_h) to (B, H, W, 2 C_h).

    Instead of the maximum, ``pool`` may take the average of 3x3 pixels, or nothing, which leaves a pointwise branch. The
    weights are the same.
    """

    def __init__(self, channels: int, high_channels: int, pool: HighPool = "max"):
        super().__init__()
        half, largest = high_channels // 2, channels // 2
        self.pool = _HIGH_POOLS[pool]
        self.conv_in = nn.Linear(half, high_channels, bias=False)
        self.depthwise = nn.Conv2d(high_channels, high_channels, 3, padding=1, groups=high_channels, bias=False)
        self.pool_out = nn.Linear(half, high_channels)
        _slice_of(self.conv_in, weight=((channels, largest), (slice(high_channels), slice(half))))
        _slice_of(self.depthwise, weight=((channels, 1, 3, 3), (slice(high_channels),)))
        _slice_of(
            self.pool_out,
            weight=((channels, largest), (slice(high_channels), slice(half))),
            bias=((channels,), (slice(high_channels),)),
        )
        # Its inputs are the second half of the high channels: which those are depends on the split.
        _channels_of(self.pool_out, weight=((channels, channels), (slice(high_channels), slice(half, high_channels))))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x_conv, x_pool = x.chunk(2, dim=-1)
        convolved = _spatially(self.depthwise, self.conv_in(x_conv))  # Eq. 4
        pooled = self.pool_out(_spatially(self.pool, x_pool))  # Eq. 5
        return F.gelu(convolved), F.gelu(pooled)


class LowMixer(nn.Module):
    """Average-pool (or max-pool), self-attention, nearest upsampling (Eq. 6): (B, H, W, C_l) to the same."""

    def __init__(self, channels: int, low_channels: int, head_channels: int, pool_stride: int, pool: LowPool = "average"):
        super().__init__()
        self.head_channels, self.pool_stride, self.pool = head_channels, pool_stride, _LOW_POOLS[pool]
        self.qkv = nn.Linear(low_channels, 3 * low_channels)
        rows = torch.cat([part * channels + _places(channels - low_channels, channels) for part in range(3)])
        _slice_of(
            self.qkv,
            weight=((3 * channels, channels), (rows, slice(channels - low_channels, None))),
            bias=((3 * channels,), (rows,)),
        )

    def forward(self, x: Tensor) -> Tensor:
        stride = self.pool_stride
        if stride > 1:
            x = _spatially(lambda image: self.pool(image, stride), x)
        attended = self_attention(self.qkv(rearrange(x, "b h w c -> b (h w) c")), self.head_channels)
        attended = rearrange(attended, "b (h w) c -> b h w c", h=x.shape[1])
        if stride > 1:
            attended = _spatially(lambda image: F.interpolate(image, scale_factor=float(stride), mode="nearest"), attended)
        return attended


class Fusion(nn.Module):
    """Smooths the result of upsampling, then projects (Eq. 8): (B, H, W, 2 C_h + C_l) to (B, H, W, C)."""

    def __init__(self, channels: int, low_channels: int):
        super().__init__()
        high_channels = channels - low_channels
        mixed = 2 * high_channels + low_channels
        self.depthwise = nn.Conv2d(mixed, mixed, 3, padding=1, groups=mixed, bias=False)
        self.out = nn.Linear(mixed, channels)
        # In the largest version all three branches have every channel: convolution | max-pooling | attention.
        branches = [_places(0, high_channels), channels + _places(0, high_channels)]
        columns = torch.cat([*branches, _places(3 * channels - low_channels, 3 * channels)])
        _slice_of(self.depthwise, weight=((3 * channels, 1, 3, 3), (columns,)))
        _slice_of(self.out, weight=((channels, 3 * channels), (slice(None), columns)))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + _spatially(self.depthwise, x))


def _spatially(operation, x: Tensor) -> Tensor:
    """Apply an operation on (B, C, H, W) to (B, H, W, C). The two are views of the same memory, without a copy."""
    return operation(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _max_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


def _average_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)  # or the borders would darken


_HIGH_POOLS = {"max": _max_pool, "average": _average_pool, "none": unchanged}
_LOW_POOLS: dict[LowPool, Callable[[Tensor, int], Tensor]] = {"average": F.avg_pool2d, "max": F.max_pool2d}


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale


def _places(first: int, end: int) -> Tensor:
    """Return the integers from ``first`` to ``end`` - 1, on the CPU even where a network is built on the meta device."""
    return torch.arange(first, end, device="cpu")


def _slice_of(layer: nn.Module, **tensors: tuple) -> None:
    """Record, for ``meme.network.initialization``, the largest tensor (shape, index) of which each of a layer's tensors is a
    slice."""
    vars(layer)["slice_of"] = tensors


def _channels_of(layer: nn.Module, **tensors: tuple) -> None:
    """Record the same by the channels that a layer meets, for ``meme.training.trunk``, where they differ from its slice.

    Initial weights are drawn by slice, but trained ones belong to channels.
    """
    vars(layer)["channels_of"] = tensors
