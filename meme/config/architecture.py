"""The architecture of one network: the image, the U-Net that all experts share, and one expert's own choices. No torch."""

from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, model_serializer, model_validator

from meme.config.base import MOST_LEVELS, Count, Positive, Probability, Settings, require

LowPool = Literal["average", "max"]
Family = Literal["ldm", "adm", "iu-net", "iu-adm"]
HighPool = Literal["max", "average", "none"]
TimeConditioning = Literal["none", "additive", "adaptive-norm"]


class ImageConfig(Settings):
    """The tensor that is denoised: images, or the latents of a first stage."""

    channels: Positive = 3
    size: Positive


class NetworkConfig(Settings):
    """The U-Net around the searched blocks, which all experts of one ensemble share."""

    family: Family
    """The U-Net of latent diffusion or of ADM (Dhariwal and Nichol 2021), or the paper's iU-Net on either: the same decoder
    behind an encoder of iFormer blocks."""
    channels: Positive
    """Width of level 1; level k has channels * multipliers[k - 1]."""
    multipliers: Annotated[tuple[Positive, ...], Field(min_length=1, max_length=MOST_LEVELS)]
    depth: Positive = 2
    """Blocks a level in the encoder; the decoder has one more."""
    attention_downsamples: tuple[Positive, ...] = ()
    """Down-factors whose blocks are followed by attention; in the iU-Net those of the decoder only, unless there are classes."""
    head_channels: Positive = 32
    """Width of an attention head, and the step in which a split can move."""
    norm_groups: Positive = 32
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    pool_strides: tuple[Positive, ...] = ()
    """iU-Net: by how much each level's low-frequency mixer pools before attention (Eq. 6); empty means 1 everywhere."""
    layer_scale_levels: tuple[Positive, ...] = ()
    """iU-Net: the levels (1 = finest) whose iFormer blocks have LayerScale."""
    iformer_blocks: tuple[Positive, ...] = ()
    """iU-Net: how many of each level's blocks are iFormer blocks, residual blocks following; empty: one, and all at the deepest
    level, as in the paper's Table 4."""
    learned_variance: bool = False
    """Predict the variance of each step beside the noise (Nichol and Dhariwal 2021): twice as many output channels."""
    classes: Count = 0
    """Classes of images the network is told of, by cross-attention in the place of self-attention; 0: unconditional."""
    context_channels: Positive = 512
    """Width of a class's embedding."""

    @property
    def splits_channels(self) -> bool:
        """True if the encoder consists of iFormer blocks, whose channels are split into high and low."""
        return self.family in ("iu-net", "iu-adm")

    @property
    def is_adm(self) -> bool:
        """True if residual blocks are ADM's: scaled and shifted by the time embedding, and resampling themselves."""
        return self.family in ("adm", "iu-adm")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels C at every level, finest first."""
        return tuple(self.channels * multiplier for multiplier in self.multipliers)

    @property
    def levels(self) -> int:
        return len(self.multipliers)

    def iformers(self, level: int) -> int:
        """Blocks at ``level`` (1 = finest) of the iU-Net's encoder that are iFormer blocks."""
        if self.iformer_blocks:
            return self.iformer_blocks[level - 1]
        return self.depth if level == self.levels else 1

    def pool_stride(self, level: int) -> int:
        """Stride of the low-frequency mixer at ``level`` (1 = finest)."""
        return self.pool_strides[level - 1] if self.pool_strides else 1

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        require(self.channels % 2 == 0, f"network.channels: must be even (the time embedding halves it), not {self.channels}")
        fits = not self.splits_channels or self.head_channels % 2 == 0
        require(fits, f"network.head_channels: must be even (the iU-Net halves high channels), not {self.head_channels}")
        for width in self.widths:
            require(width % self.head_channels == 0, f"network.head_channels: must divide every level's width {self.widths}")
            require(width % self.norm_groups == 0, f"network.norm_groups: must divide every level's width {self.widths}")
        known = [2**level for level in range(self.levels)]
        require(set(self.attention_downsamples) <= set(known), f"network.attention_downsamples: allowed are {known}")
        require(
            len(self.pool_strides) in (0, self.levels),
            f"network.pool_strides: needs one stride for each of {self.levels} levels",
        )
        require(
            len(self.iformer_blocks) in (0, self.levels) and all(count <= self.depth for count in self.iformer_blocks),
            f"network.iformer_blocks: needs one number for each of {self.levels} levels, at most the depth {self.depth}",
        )
        require(
            all(level <= self.levels for level in self.layer_scale_levels),
            f"network.layer_scale_levels: levels go from 1 to {self.levels}",
        )
        require(
            not (self.classes and self.is_adm), f"network.classes: only families ldm and iu-net take classes, not {self.family}"
        )
        return self


class Mixing(NamedTuple):
    """How one expert's iFormer blocks at one level mix their channels."""

    low_channels: int
    pool_stride: int
    low_pool: LowPool
    high_pool: HighPool


class ExpertConfig(Settings):
    """One expert: its interval of timesteps, its expertization probability and, in the iU-Net, its split of channels.

    The fields after ``low_channels`` override the paper's iFormer block. At their defaults the network is the paper's.
    """

    interval: tuple[Count, Positive]
    """Timesteps [first, end) this expert denoises; t = 0 is nearest to the data."""
    p: Probability = 1.0
    """Expertization probability p_n: share of training samples whose t comes from the interval; the rest draw from all of T."""
    low_channels: tuple[Count, ...] = ()
    """iU-Net: C_l at every level, finest first: 0 is all convolution, the level's width all attention."""
    pool_strides: tuple[Positive, ...] = ()
    """iU-Net: stride of the low-frequency mixer at every level; empty: as ``network.pool_strides`` says."""
    low_pools: tuple[LowPool, ...] = ()
    """iU-Net: what the low-frequency mixer takes of the pixels it pools, at every level; empty: the average (Eq. 6)."""
    high_pools: tuple[HighPool, ...] = ()
    """iU-Net: what the high-frequency mixer's second branch takes of 3x3 pixels, at every level; none: the branch is pointwise;
    empty: the maximum (Eq. 5)."""
    time_conditioning: TimeConditioning = "none"
    """iU-Net: what the timestep does in iFormer blocks: nothing, as in the paper; shift both norms; or scale and shift them."""

    @model_serializer(mode="wrap")
    def _without_unused_overrides(self, dump: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Leave overrides out at their defaults, so that files and ids of experts without overrides are the same as before
        overrides existed."""
        unused = {name for name in OVERRIDES if getattr(self, name) == type(self).model_fields[name].default}
        return {name: value for name, value in dump(self).items() if name not in unused}

    def mixing(self, network: NetworkConfig, level: int) -> Mixing:
        """Return how the iFormer blocks at ``level`` (1 = finest) of the iU-Net mix, with defaults filled in."""
        return Mixing(
            self.low_channels[level - 1],
            self.pool_strides[level - 1] if self.pool_strides else network.pool_stride(level),
            self.low_pools[level - 1] if self.low_pools else "average",
            self.high_pools[level - 1] if self.high_pools else "max",
        )

    def canonical(self, network: NetworkConfig) -> "ExpertConfig":
        """Return the same expert without overrides that cannot change its network, so that experts of the same network have
        equal overrides.

        Such overrides belong to a pool that no channel meets or that pools nothing, or repeat the default.
        """
        if not network.splits_channels:
            return self
        levels = range(1, network.levels + 1)
        usual, mixings = [network.pool_stride(level) for level in levels], [self.mixing(network, level) for level in levels]
        has_high = [mixing.low_channels < width for mixing, width in zip(mixings, network.widths, strict=True)]
        strides = [own.pool_stride if own.low_channels else stride for own, stride in zip(mixings, usual, strict=True)]
        low_pools = [own.low_pool if own.low_channels and own.pool_stride > 1 else "average" for own in mixings]
        high_pools = [own.high_pool if has else "max" for own, has in zip(mixings, has_high, strict=True)]
        overrides = {
            "pool_strides": _unless(strides, usual),
            "low_pools": _unless(low_pools, ["average"] * network.levels),
            "high_pools": _unless(high_pools, ["max"] * network.levels),
        }
        return self.model_copy(update=overrides)

    def network_alone(self, network: NetworkConfig) -> "ExpertConfig":
        """Return ``canonical`` with one fixed interval and p, so that experts of the same network are equal."""
        return self.canonical(network).model_copy(update={"interval": (0, 1), "p": 1.0})


PER_LEVEL = ("pool_strides", "low_pools", "high_pools")
OVERRIDES = (*PER_LEVEL, "time_conditioning")
"""Fields of an expert that change the paper's iFormer block."""


def _unless(values: list[Any], usual: list[Any]) -> tuple[Any, ...]:
    return () if values == usual else tuple(values)


def check_expert(expert: ExpertConfig, image: ImageConfig, network: NetworkConfig, field: str) -> None:
    """Raise ``ValueError`` for an expert that ``network`` cannot have; messages call the expert ``field``."""
    check_split(expert.low_channels, network, f"{field}.low_channels")
    for name in OVERRIDES:
        require(
            network.splits_channels or getattr(expert, name) == ExpertConfig.model_fields[name].default,
            f"{field}.{name}: only the iU-Net has iFormer blocks; leave it out with network.family {network.family}",
        )
    for name in PER_LEVEL:
        count = len(getattr(expert, name))
        require(count in (0, network.levels), f"{field}.{name}: needs one for each of {network.levels} levels, not {count}")
    for level, stride in enumerate(expert.pool_strides, start=1):
        side = image.size // 2 ** (level - 1)
        require(
            side % stride == 0,
            f"{field}.pool_strides[{level}]: must divide the {side} pixels a side of level {level}, not {stride}",
        )


def check_sizes(image: ImageConfig, network: NetworkConfig) -> None:
    for level in range(1, network.levels + 1):
        divisor = 2 ** (level - 1) * network.pool_stride(level)
        require(
            image.size % divisor == 0,
            f"image.size: must be a multiple of {divisor} (level {level}'s down-factor times its pool stride), not {image.size}",
        )


def check_split(low_channels: tuple[int, ...], network: NetworkConfig, field: str) -> None:
    if not network.splits_channels:
        require(
            not low_channels, f"{field}: only the iU-Net splits channels; leave it empty with network.family {network.family}"
        )
        return
    require(
        len(low_channels) == network.levels,
        f"{field}: needs one number for each of {network.levels} levels, not {len(low_channels)}",
    )
    for level, (low, width) in enumerate(zip(low_channels, network.widths, strict=True), start=1):
        require(
            low <= width and low % network.head_channels == 0,
            f"{field}[{level}]: must be a multiple of the head width {network.head_channels} from 0 to {width}, not {low}",
        )
