"""What is trained, sampled and scored: validated, frozen settings, to and from YAML, with stable ids. No torch.

A wrong value is refused when the config is built, in one sentence that names the field and what is allowed.
"""

import difflib
import hashlib
import itertools
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from meme.errors import UserError
from meme.files import write_text

Positive = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]


def _is_none(value: Any) -> bool:
    return value is None


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise UserError(sentence)


class Settings(BaseModel):
    """Base of all settings: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ImageConfig(Settings):
    """The tensor that is denoised: images, or the latents of a first stage."""

    channels: Positive = 3
    size: Positive


class FirstStageConfig(Settings):
    """The autoencoder between images and the latents that are denoised (Rombach et al. 2022)."""

    kind: Literal["vq", "kl"] = "vq"
    """VQModel or AutoencoderKL of diffusers."""
    source: str = ""
    """A folder as diffusers writes it, or a name on the Hugging Face hub."""
    subfolder: str = ""
    """Where in the source the autoencoder lies, if it is part of a pipeline."""
    downsample: Positive = 4
    """Pixels a side that one latent stands for (f)."""
    image_channels: Literal[1, 3] = 3
    scale_factor: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    """Latents are multiplied by it; None: one over their standard deviation over the data, measured once."""


class NetworkConfig(Settings):
    """What all experts of one ensemble share: the U-Net around the searched blocks."""

    family: Literal["ldm", "adm", "iu-net", "iu-adm"]
    """The U-Net of latent diffusion or of ADM (Dhariwal and Nichol 2021), or the paper's iU-Net on either: the same decoder
    behind an encoder of iFormer blocks."""
    channels: Positive
    """Width of level 1; level k has channels * multipliers[k - 1]."""
    multipliers: Annotated[tuple[Positive, ...], Field(min_length=1)]
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
    classes: Annotated[int, Field(ge=0)] = 0
    """Classes of images the network is told of, by cross-attention in the place of self-attention; 0: unconditional."""
    context_channels: Positive = 512
    """Width of a class's embedding."""

    @property
    def splits_channels(self) -> bool:
        """Whether the encoder consists of iFormer blocks, whose channels are split into high and low."""
        return self.family in ("iu-net", "iu-adm")

    @property
    def is_adm(self) -> bool:
        """Whether residual blocks are ADM's: scaled and shifted by the time, and resampling themselves."""
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
    def _fits_together(self):
        _require(self.channels % 2 == 0, f"network.channels: must be even (the time embedding halves it), not {self.channels}")
        fits = not self.splits_channels or self.head_channels % 2 == 0
        _require(fits, f"network.head_channels: must be even (the iU-Net halves high channels), not {self.head_channels}")
        for width in self.widths:
            _require(width % self.head_channels == 0, f"network.head_channels: must divide every level's width {self.widths}")
            _require(width % self.norm_groups == 0, f"network.norm_groups: must divide every level's width {self.widths}")
        known = [2**level for level in range(self.levels)]
        _require(set(self.attention_downsamples) <= set(known), f"network.attention_downsamples: allowed are {known}")
        _require(
            len(self.pool_strides) in (0, self.levels),
            f"network.pool_strides: needs one stride for each of {self.levels} levels",
        )
        _require(
            len(self.iformer_blocks) in (0, self.levels) and all(count <= self.depth for count in self.iformer_blocks),
            f"network.iformer_blocks: needs one number for each of {self.levels} levels, at most the depth {self.depth}",
        )
        _require(
            all(level <= self.levels for level in self.layer_scale_levels),
            f"network.layer_scale_levels: levels go from 1 to {self.levels}",
        )
        _require(
            not (self.classes and self.is_adm), f"network.classes: only families ldm and iu-net take classes, not {self.family}"
        )
        return self


class ExpertConfig(Settings):
    """One expert: its interval of timesteps, its expertization probability and, in the iU-Net, its split of channels."""

    interval: tuple[Annotated[int, Field(ge=0)], Positive]
    """Timesteps [first, end) this expert denoises; t = 0 is nearest to the data."""
    p: Probability = 1.0
    """Expertization probability p_n: share of training samples whose t comes from the interval; the rest draw from all of T."""
    low_channels: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """iU-Net: C_l at every level, finest first: 0 is all convolution, the level's width all attention."""


class DiffusionConfig(Settings):
    """The noise schedule (Ho et al. 2020, Eq. 4)."""

    timesteps: Positive = 1000
    schedule: Literal["scaled_linear", "linear"] = "scaled_linear"
    """How beta grows: linear in sqrt(beta), as latent diffusion has it, or linear in beta."""
    beta_start: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.0015
    beta_end: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.0195

    @model_validator(mode="after")
    def _grows(self):
        _require(self.beta_start <= self.beta_end, f"diffusion.beta_end: must be at least beta_start {self.beta_start}")
        return self


class TrainingConfig(Settings):
    """How each expert is trained."""

    steps: Positive
    """Optimiser steps an expert."""
    batch_size: Positive
    learning_rate: Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
    """AdamW's step size after warm-up; constant from there on, so that a training can be continued."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    gradient_clip: Annotated[float, Field(ge=0.0)] = 0.0
    """Largest norm of the gradient; 0 means no limit."""
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9999
    """Of the averaged weights that are sampled from; ramped up as min(decay, (1 + step) / (10 + step))."""
    p2_gamma: Annotated[float, Field(ge=0.0)] = 0.0
    """P2 loss weights 1 / (k + SNR)^gamma (Choi et al. 2022); 0 weighs all timesteps alike, as Eq. 2."""
    p2_k: Annotated[float, Field(gt=0.0)] = 1.0
    label_dropout: Probability = 0.0
    """Share of images trained without their class, which classifier-free guidance needs (Ho and Salimans 2021)."""
    initial_weights: Annotated[str | None, Field(exclude_if=_is_none)] = None  # left out of ids and files where it is not used
    """File with the weights of a latent-diffusion or ADM U-Net that every expert starts from where names and shapes agree."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of initial weights, order of the data, timesteps and noise."""


class SamplingConfig(Settings):
    """How images are drawn."""

    sampler: Literal["ddim", "ddpm"] = "ddim"
    steps: Positive = 50
    eta: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """DDIM's share of fresh noise: 0 is deterministic."""
    clip: bool = False
    """Clip each predicted image to [-1, 1]; right for pixels, wrong for latents."""
    batch_size: Positive = 256
    guidance_scale: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 1.0
    """Classifier-free guidance (Ho and Salimans 2021): 1 follows the class as trained, more overdoes it, 0 ignores it."""


class EvaluationConfig(Settings):
    """How a trained ensemble is scored."""

    samples: Annotated[int, Field(ge=2)] = 10_000
    features: Literal["auto", "inception", "classifier", "random"] = "auto"
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the sampling noise, common to all candidates."""


class Config(Settings):
    """Everything that training, sampling and scoring one ensemble of experts need."""

    name: str
    data: str = "digits"
    """``digits``, or the path of a folder or zip of images."""
    image: ImageConfig
    first_stage: FirstStageConfig | None = None
    """Latent diffusion's autoencoder; None: pixels are denoised."""
    network: NetworkConfig
    experts: Annotated[tuple[ExpertConfig, ...], Field(min_length=1)]
    """Expert 1, nearest to the data, first."""
    diffusion: DiffusionConfig = DiffusionConfig()
    training: TrainingConfig
    sampling: SamplingConfig = SamplingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _fits_together(self):
        _check_sizes(self.image, self.network)
        _check_intervals(self.experts, self.diffusion.timesteps)
        for number, expert in enumerate(self.experts, start=1):
            _check_split(expert.low_channels, self.network, f"experts[{number}].low_channels")
        _check_sampling(self.sampling, self.diffusion.timesteps)
        _check_guidance(self.network, self.training, self.sampling)
        return self

    def expert(self, number: int) -> ExpertConfig:
        """Expert ``number`` of 1 to N; 1 is nearest to the data."""
        _require(1 <= number <= len(self.experts), f"expert: must be 1 to {len(self.experts)}, not {number}")
        return self.experts[number - 1]

    def with_(self, **sections: Any) -> "Config":
        """A validated copy: ``config.with_(name="x", training={"steps": 5})`` merges into the sections named."""
        merged = self.model_dump()
        for key, value in sections.items():
            both_sections = isinstance(value, dict) and isinstance(merged.get(key), dict)
            merged[key] = {**merged[key], **value} if both_sections else value
        return Config.model_validate(merged)

    @property
    def pixels(self) -> ImageConfig:
        """Channels and size of the images themselves, which with a first stage are not what is denoised."""
        stage = self.first_stage
        return ImageConfig(channels=stage.image_channels, size=self.image.size * stage.downsample) if stage else self.image

    @property
    def architecture_id(self) -> str:
        """Equal for two configs that differ in nothing that can change what is trained (data, where a first stage lies, name and
        scoring aside)."""
        content = self.model_dump(mode="json", include={"image", "first_stage", "network", "experts", "diffusion", "training"})
        if content["first_stage"]:
            content["first_stage"] |= {"source": None, "subfolder": None}
        content["experts"] = [self.canonical_expert(number + 1).model_dump(mode="json") for number in range(len(self.experts))]
        return stable_id(content)

    def canonical_expert(self, number: int) -> ExpertConfig:
        """Expert ``number`` less what cannot change its training: p where the interval is all of T, so that both draws agree."""
        expert = self.expert(number)
        everywhere = expert.interval == (0, self.diffusion.timesteps)
        return expert.model_copy(update={"p": 1.0}) if everywhere else expert

    def to_yaml(self) -> str:
        """All settings as YAML, which ``load`` reads back to an equal config."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=120)

    def save(self, path: Path) -> None:
        """Write the YAML so that a reader sees all of it or nothing. ``OSError`` where it can't be written."""
        write_text(path, self.to_yaml())

    @classmethod
    def load(cls, path: Path) -> "Config":
        """Read a YAML config; anything wrong with it is a ``UserError`` of one sentence."""
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: no UTF-8, or the 13th month
            raise UserError(f"{path}: not a readable YAML file ({_first_line(error)})") from None
        if not isinstance(content, dict):
            raise UserError(f"{path}: a config is a mapping of {', '.join(cls.model_fields)}")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise UserError(f"{path}: {explain(error, cls)}") from None


def stable_id(content: Any) -> str:
    """Twelve hex digits that depend on the JSON content alone."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def even_intervals(experts: int, timesteps: int) -> tuple[tuple[int, int], ...]:
    """[0, T) cut into ``experts`` disjoint intervals of equal length (to one step), nearest to the data first."""
    edges = [round(timesteps * number / experts) for number in range(experts + 1)]
    return tuple(itertools.pairwise(edges))


def split_choices(width: int, head_channels: int) -> tuple[int, ...]:
    """The allowed C_l at a level: from all convolution (0) to all attention (the width) in steps of the head width."""
    return tuple(range(0, width + 1, head_channels))


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """A validation error's first complaint as one sentence: the field, what is wrong, what is allowed."""
    first = error.errors()[0]
    field = _dotted(first["loc"])
    if first["type"] == "extra_forbidden":
        known = list(_fields_at(model, first["loc"][:-1]))
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"allowed are {', '.join(known)}"
        return f"{field}: unknown key; {hint}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error" or not field:
        return message
    message = message[0].lower() + message[1:]
    return f"{field}: {message}" if first["type"] == "missing" else f"{field}: {message}, not {first['input']!r:.80}"


def _dotted(location: tuple[str | int, ...]) -> str:
    """``("experts", 0, "p")`` as ``experts[1].p``: experts and levels count from 1, as in the paper."""
    text = ""
    for part in location:
        text += f"[{part + 1}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _fields_at(model: type[BaseModel], location: tuple[str | int, ...]) -> dict[str, Any]:
    """The field names of the settings nested at ``location``."""
    for part in location:
        if isinstance(part, int):
            continue
        nested = model.model_fields[part].annotation
        candidates = [nested, *getattr(nested, "__args__", ())]
        model = next(kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel))
    return model.model_fields


def _check_sizes(image: ImageConfig, network: NetworkConfig) -> None:
    for level in range(1, network.levels + 1):
        divisor = 2 ** (level - 1) * network.pool_stride(level)
        _require(
            image.size % divisor == 0,
            f"image.size: must be a multiple of {divisor} (level {level}'s down-factor times its pool stride), not {image.size}",
        )


def _check_intervals(experts: tuple[ExpertConfig, ...], timesteps: int) -> None:
    edge = 0
    for number, expert in enumerate(experts, start=1):
        first, end = expert.interval
        _require(
            first == edge and end > first,
            f"experts[{number}].interval: must begin at {edge} and end after it, without gaps, not {expert.interval}",
        )
        edge = end
    _require(
        edge == timesteps,
        f"experts[{len(experts)}].interval: the last interval must end at {timesteps} timesteps, not {edge}",
    )


def _check_sampling(sampling: SamplingConfig, timesteps: int) -> None:
    """Steps are spaced T // S apart: where S does not divide T they would not reach the noise, and the last expert would idle."""
    limit = timesteps // 2 if sampling.sampler == "ddim" else timesteps
    _require(
        sampling.steps <= limit and timesteps % sampling.steps == 0,
        f"sampling.steps: must divide {timesteps} timesteps and be at most {limit} with {sampling.sampler}, not {sampling.steps}",
    )


def _check_guidance(network: NetworkConfig, training: TrainingConfig, sampling: SamplingConfig) -> None:
    classless = "only a class-conditional network (network.classes) "
    _require(bool(network.classes) or not training.label_dropout, f"training.label_dropout: {classless}has labels to drop")
    guided = sampling.guidance_scale != 1
    _require(bool(network.classes) or not guided, f"sampling.guidance_scale: {classless}can be guided")
    _require(
        not guided or training.label_dropout > 0,
        "sampling.guidance_scale: must be 1 unless training.label_dropout teaches the network to do without a class",
    )


def _check_split(low_channels: tuple[int, ...], network: NetworkConfig, field: str) -> None:
    if not network.splits_channels:
        _require(
            not low_channels, f"{field}: only the iU-Net splits channels; leave it empty with network.family {network.family}"
        )
        return
    _require(
        len(low_channels) == network.levels,
        f"{field}: needs one number for each of {network.levels} levels, not {len(low_channels)}",
    )
    for level, (low, width) in enumerate(zip(low_channels, network.widths, strict=True), start=1):
        _require(
            low <= width and low % network.head_channels == 0,
            f"{field}[{level}]: must be a multiple of the head width {network.head_channels} from 0 to {width}, not {low}",
        )


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
