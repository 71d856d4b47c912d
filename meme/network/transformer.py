"""The spatial transformer of latent diffusion (Rombach et al. 2022): self-attention, cross-attention to a class, and an MLP.

Shapes: ``B`` batch, ``C`` channels, ``H W`` space, ``N`` tokens, ``M`` tokens of the context, ``K`` their width.
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from meme.network.blocks import starts_at_zero

EPSILON = 1e-6  # of the group norm here, as in latent diffusion; its other norms have PyTorch's 1e-5


class SpatialTransformer(nn.Module):
    """One transformer block over all positions, as a residual: (B, C, H, W) and (B, M, K) to (B, C, H, W)."""

    def __init__(self, channels: int, context_channels: int, head_channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=EPSILON)
        self.project_in = nn.Linear(channels, channels)
        self.norm_self = nn.LayerNorm(channels)
        self.attend_self = Attention(channels, channels, head_channels)
        self.norm_cross = nn.LayerNorm(channels)
        self.attend_cross = Attention(channels, context_channels, head_channels)
        self.norm_mlp = nn.LayerNorm(channels)
        self.mlp = GatedMLP(channels)
        self.project_out = starts_at_zero(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        tokens = self.project_in(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        normed = self.norm_self(tokens)
        tokens = tokens + self.attend_self(normed, normed)
        tokens = tokens + self.attend_cross(self.norm_cross(tokens), context)
        tokens = tokens + self.mlp(self.norm_mlp(tokens))
        return x + rearrange(self.project_out(tokens), "b (h w) c -> b c h w", h=x.shape[2])


class Attention(nn.Module):
    """Multi-head attention of tokens (B, N, C) to a context (B, M, K), to (B, N, C)."""

    def __init__(self, channels: int, context_channels: int, head_channels: int):
        super().__init__()
        self.heads = channels // head_channels
        self.query = nn.Linear(channels, channels, bias=False)
        self.key = nn.Linear(context_channels, channels, bias=False)
        self.value = nn.Linear(context_channels, channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            rearrange(tokens, "b n (heads d) -> b heads n d", heads=self.heads)
            for tokens in (self.query(x), self.key(context), self.value(context))
        )
        return self.out(rearrange(F.scaled_dot_product_attention(q, k, v), "b heads n d -> b n (heads d)"))


class GatedMLP(nn.Module):
    """An MLP four times as wide inside, with one half gating the other (GEGLU, Shazeer 2020): (B, N, C) to the same."""

    def __init__(self, channels: int):
        super().__init__()
        self.wide = nn.Linear(channels, 8 * channels)
        self.out = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.wide(x).chunk(2, dim=-1)
        return self.out(value * F.gelu(gate))
