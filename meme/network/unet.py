"""One network from one expert's config: the U-Net of latent diffusion or of ADM, or the paper's iU-Net on either.

Shapes: ``B`` batch, ``C`` channels, ``H W`` space, ``E`` width of the time embedding.
"""

import torch
from torch import Tensor, nn

from meme.config.schema import Config, ExpertConfig, ImageConfig, NetworkConfig
from meme.network.blocks import (
    AttentionBlock,
    Downsample,
    Resample,
    ResidualBlock,
    Upsample,
    channels_last,
    starts_at_zero,
    timestep_embedding,
)
from meme.network.iformer import IFormerBlock
from meme.network.initialization import initialize
from meme.network.transformer import SpatialTransformer


def build_expert(config: Config, number: int, *, seed: int | None = None) -> "Denoiser":
    """Build the network of expert ``number`` (1 = least noise), with the initial weights of ``seed`` (default: the training
    seed).

    On the meta device (``with torch.device("meta")``) it is built without memory and without weights.
    """
    network = Denoiser(config.image, config.network, config.expert(number))
    if not any(weight.is_meta for weight in network.parameters()):
        initialize(network, config.training.seed if seed is None else seed)
    return channels_last(network)


class Denoiser(nn.Module):
    """Predicts the noise in x_t: ``forward(x, t)`` takes (B, C, H, W) and (B,) and returns (B, C, H, W).

    With a learned variance it returns (B, 2C, H, W), the noise first. A class-conditional network also takes ``labels`` (B,),
    from 0; the number of classes itself stands for "no class". The decoder takes every block's output of the encoder, deepest
    first.
    """

    def __init__(self, image: ImageConfig, network: NetworkConfig, expert: ExpertConfig):
        super().__init__()
        self.channels = network.channels
        embedding = 4 * network.channels
        time = [nn.Linear(network.channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding)]
        self.time = nn.Sequential(*time, nn.SiLU())  # the last is that of every block's time layer, taken once for all
        self.classes = nn.Embedding(network.classes + 1, network.context_channels) if network.classes else None
        self.conv_in = nn.Conv2d(image.channels, network.channels, 3, padding=1)
        encode = _iu_encoder if network.splits_channels else _encoder
        self.encoder, skips = encode(network, expert)
        deepest, groups = network.widths[-1], network.norm_groups
        self.middle = Stage(
            [_residual(deepest, deepest, network), _attention(deepest, network), _residual(deepest, deepest, network)]
        )
        self.decoder = _decoder(network, skips)
        self.norm_out = nn.GroupNorm(groups, network.channels)
        out_channels = 2 * image.channels if network.learned_variance else image.channels
        self.conv_out = starts_at_zero(nn.Conv2d(network.channels, out_channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the noise predicted in x_t (B, C, H, W) at timesteps ``t`` (B,) from 0. The class says which shape it has."""
        embedding = self.time(timestep_embedding(t, self.channels).to(self.conv_in.weight.dtype))
        context = None if self.classes is None else self.classes(labels)[:, None]
        x = self.conv_in(x)
        skips = [x]
        for stage in self.encoder:
            x = stage(x, embedding, context)
            skips.append(x)
        x = self.middle(x, embedding, context)
        for stage in self.decoder:
            x = stage(torch.cat([x, skips.pop()], dim=1), embedding, context)
        predicted: Tensor = self.conv_out(nn.functional.silu(self.norm_out(x)))
        return predicted


class Stage(nn.ModuleList):
    """Layers applied in turn. Residual blocks, and iFormer blocks that see it, also take the time embedding; spatial
    transformers take the class."""

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor | None = None) -> Tensor:
        for layer in self:
            if isinstance(layer, ResidualBlock) or (isinstance(layer, IFormerBlock) and layer.sees_time):
                x = layer(x, embedding)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


def _encoder(network: NetworkConfig, expert: ExpertConfig) -> tuple[nn.ModuleList, list[int]]:
    """Return residual blocks with attention at some down-factors, each level then halved in size, and the width of every
    skip."""
    stages, skips, width = nn.ModuleList(), [network.channels], network.channels
    for level, level_width in enumerate(network.widths):
        for _ in range(network.depth):
            stages.append(_block(width, level_width, network, attend=2**level in network.attention_downsamples))
            width = level_width
            skips.append(width)
        if level < network.levels - 1:
            stages.append(Stage([_residual(width, width, network, "down") if network.is_adm else Downsample(width, width)]))
            skips.append(width)
    return stages, skips


def _iu_encoder(network: NetworkConfig, expert: ExpertConfig) -> tuple[nn.ModuleList, list[int]]:
    """Return the iU-Net's encoder, in which iFormer blocks open each level and residual blocks follow, and the width of every
    skip.

    A strided convolution between levels changes the width. The encoder has no attention of its own unless classes must reach
    it.
    """
    stages, skips = nn.ModuleList(), [network.channels]
    for level, width in enumerate(network.widths):
        for position in range(network.depth):
            is_iformer = position < network.iformers(level + 1)
            stage = Stage([_iformer(level, network, expert) if is_iformer else _residual(width, width, network)])
            if network.classes and 2**level in network.attention_downsamples:
                stage.append(_attention(width, network))
            stages.append(stage)
            skips.append(width)
        if level < network.levels - 1:
            stages.append(Stage([Downsample(width, network.widths[level + 1])]))
            skips.append(network.widths[level + 1])
    return stages, skips


def _decoder(network: NetworkConfig, skips: list[int]) -> nn.ModuleList:
    """Return the decoder, the same for both encoders: one more block per level, each on (its input, a skip), then twice the
    size."""
    stages, skips, width = nn.ModuleList(), list(skips), network.widths[-1]
    for level in reversed(range(network.levels)):
        for position in range(network.depth + 1):
            attend = 2**level in network.attention_downsamples
            stage = _block(width + skips.pop(), network.widths[level], network, attend)
            width = network.widths[level]
            if level and position == network.depth:
                stage.append(_residual(width, width, network, "up") if network.is_adm else Upsample(width))
            stages.append(stage)
    return stages


def _block(in_channels: int, out_channels: int, network: NetworkConfig, attend: bool) -> Stage:
    layers: list[nn.Module] = [_residual(in_channels, out_channels, network)]
    if attend:
        layers.append(_attention(out_channels, network))
    return Stage(layers)


def _residual(in_channels: int, out_channels: int, network: NetworkConfig, resample: Resample | None = None) -> ResidualBlock:
    embedding, groups = 4 * network.channels, network.norm_groups
    return ResidualBlock(
        in_channels, out_channels, embedding, groups, network.dropout, scale_shift=network.is_adm, resample=resample
    )


def _attention(channels: int, network: NetworkConfig) -> nn.Module:
    """Return self-attention, or where there are classes, self- and cross-attention to the class."""
    if network.classes:
        return SpatialTransformer(channels, network.context_channels, network.head_channels, network.norm_groups)
    return AttentionBlock(channels, network.head_channels, network.norm_groups)


def _iformer(level: int, network: NetworkConfig, expert: ExpertConfig) -> IFormerBlock:
    mixing = expert.mixing(network, level + 1)
    return IFormerBlock(
        network.widths[level],
        mixing.low_channels,
        network.head_channels,
        mixing.pool_stride,
        layer_scale=level + 1 in network.layer_scale_levels,
        low_pool=mixing.low_pool,
        high_pool=mixing.high_pool,
        time_conditioning=expert.time_conditioning,
        embedding=4 * network.channels,
    )
