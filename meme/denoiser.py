"""One network from one expert's config: the U-Net of latent diffusion, or the paper's iU-Net.

Shapes: ``B`` batch, ``C`` channels, ``H W`` space, ``E`` width of the time embedding.
"""

import torch
from torch import Tensor, nn

from meme.blocks import AttentionBlock, Downsample, ResidualBlock, Upsample, starts_at_zero, timestep_embedding
from meme.config import Config, ExpertConfig, ImageConfig, NetworkConfig
from meme.iformer import IFormerBlock
from meme.initialization import initialize


def build_expert(config: Config, number: int, *, seed: int | None = None) -> "Denoiser":
    """The network of expert ``number`` (1 = least noise), with the initial weights of ``seed`` (default: the training seed).

    On the meta device (``with torch.device("meta")``) it is built without memory and without weights.
    """
    network = Denoiser(config.image, config.network, config.expert(number))
    if not any(weight.is_meta for weight in network.parameters()):
        initialize(network, config.training.seed if seed is None else seed)
    return network.to(memory_format=torch.channels_last)


class Denoiser(nn.Module):
    """Predicts the noise in x_t: ``forward(x, t)`` takes (B, C, H, W) and (B,) and returns (B, C, H, W).

    The encoder remembers every block's output; the decoder takes them back, deepest first.
    """

    def __init__(self, image: ImageConfig, network: NetworkConfig, expert: ExpertConfig):
        super().__init__()
        self.channels = network.channels
        embedding = 4 * network.channels
        self.time = nn.Sequential(nn.Linear(network.channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.conv_in = nn.Conv2d(image.channels, network.channels, 3, padding=1)
        encode = _ldm_encoder if network.family == "ldm" else _iu_encoder
        self.encoder, skips = encode(network, expert)
        deepest, groups = network.widths[-1], network.norm_groups
        self.middle = Stage(
            _residual(deepest, deepest, network),
            AttentionBlock(deepest, network.head_channels, groups),
            _residual(deepest, deepest, network),
        )
        self.decoder = _decoder(network, skips)
        self.norm_out = nn.GroupNorm(groups, network.channels)
        self.conv_out = starts_at_zero(nn.Conv2d(network.channels, image.channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        embedding = self.time(timestep_embedding(t, self.channels).to(self.conv_in.weight.dtype))
        x = self.conv_in(x)
        skips = [x]
        for stage in self.encoder:
            x = stage(x, embedding)
            skips.append(x)
        x = self.middle(x, embedding)
        for stage in self.decoder:
            x = stage(torch.cat([x, skips.pop()], dim=1), embedding)
        return self.conv_out(nn.functional.silu(self.norm_out(x)))


class Stage(nn.Sequential):
    """Layers in turn, of which the residual blocks are also given the time embedding."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, embedding) if isinstance(layer, ResidualBlock) else layer(x)
        return x


def _ldm_encoder(network: NetworkConfig, expert: ExpertConfig) -> tuple[nn.ModuleList, list[int]]:
    """Latent diffusion's encoder: residual blocks with attention at some down-factors. Also every skip's width."""
    stages, skips, width = nn.ModuleList(), [network.channels], network.channels
    for level, level_width in enumerate(network.widths):
        for _ in range(network.depth):
            stages.append(_block(width, level_width, network, attend=2**level in network.attention_downsamples))
            width = level_width
            skips.append(width)
        if level < network.levels - 1:
            stages.append(Stage(Downsample(width, width)))
            skips.append(width)
    return stages, skips


def _iu_encoder(network: NetworkConfig, expert: ExpertConfig) -> tuple[nn.ModuleList, list[int]]:
    """The iU-Net's encoder: an iFormer block opens each level and residual blocks follow; the deepest level is iFormer only.

    A strided convolution between levels changes the width.
    """
    stages, skips = nn.ModuleList(), [network.channels]
    for level, width in enumerate(network.widths):
        deepest = level == network.levels - 1
        for position in range(network.depth):
            is_iformer = position == 0 or deepest
            stages.append(_iformer(level, network, expert) if is_iformer else Stage(_residual(width, width, network)))
            skips.append(width)
        if not deepest:
            stages.append(Stage(Downsample(width, network.widths[level + 1])))
            skips.append(network.widths[level + 1])
    return stages, skips


def _decoder(network: NetworkConfig, skips: list[int]) -> nn.ModuleList:
    """Latent diffusion's decoder, whatever the encoder: one more block a level, each on (what came, a skip)."""
    stages, skips, width = nn.ModuleList(), list(skips), network.widths[-1]
    for level in reversed(range(network.levels)):
        for position in range(network.depth + 1):
            attend = 2**level in network.attention_downsamples
            stage = _block(width + skips.pop(), network.widths[level], network, attend)
            width = network.widths[level]
            if level and position == network.depth:
                stage.append(Upsample(width))
            stages.append(stage)
    return stages


def _block(in_channels: int, out_channels: int, network: NetworkConfig, attend: bool) -> Stage:
    layers = [_residual(in_channels, out_channels, network)]
    if attend:
        layers.append(AttentionBlock(out_channels, network.head_channels, network.norm_groups))
    return Stage(*layers)


def _residual(in_channels: int, out_channels: int, network: NetworkConfig) -> ResidualBlock:
    return ResidualBlock(in_channels, out_channels, 4 * network.channels, network.norm_groups, network.dropout)


def _iformer(level: int, network: NetworkConfig, expert: ExpertConfig) -> Stage:
    return Stage(
        IFormerBlock(
            network.widths[level],
            expert.low_channels[level],
            network.head_channels,
            network.pool_stride(level + 1),
            layer_scale=level + 1 in network.layer_scale_levels,
        )
    )
