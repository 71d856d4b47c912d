"""The settings of training, sampling and scoring: validated, frozen, to and from YAML, with stable ids. No torch.

A wrong value is refused when the config is built, in one sentence that names the field and what is allowed.
"""

import hashlib
import itertools
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from meme.config.architecture import ExpertConfig, ImageConfig, NetworkConfig, check_expert, check_sizes
from meme.config.base import MOST_EXPERTS, Count, Positive, Probability, Settings, require
from meme.config.messages import explain
from meme.config.yaml_reader import read_yaml
from meme.errors import UserError
from meme.support.files import write_text
from meme.support.precision import Precision


def _is_none(value: Any) -> bool:
    return value is None


def _is_unused(value: Any) -> bool:
    """Return whether a field that was added later has its default value, and so is left out of ids and files."""
    return not value


def _is_off(value: Any) -> bool:
    return value is False


def _is_auto(value: Any) -> bool:
    return bool(value == "auto")


class FirstStageConfig(Settings):
    """The autoencoder between images and the latents that are denoised (Rombach et al. 2022)."""

    kind: Literal["vq", "kl"] = "vq"
    """VQModel or AutoencoderKL of diffusers."""
    source: str = ""
    """A folder as diffusers writes it, or a name on the Hugging Face hub."""
    subfolder: str = ""
    """Subfolder of the source that holds the autoencoder, if it is part of a pipeline."""
    downsample: Positive = 4
    """Pixels a side that one latent stands for (f)."""
    image_channels: Literal[1, 3] = 3
    scale_factor: Annotated[float, Field(gt=0.0)] | None = None
    """Latents are multiplied by it; None: one over their standard deviation over the data, measured once."""


class DiffusionConfig(Settings):
    """The noise schedule (Ho et al. 2020, Eq. 4)."""

    timesteps: Positive = 1000
    schedule: Literal["scaled_linear", "linear"] = "scaled_linear"
    """How beta grows: linear in sqrt(beta), as latent diffusion has it, or linear in beta."""
    beta_start: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.0015
    beta_end: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.0195

    @model_validator(mode="after")
    def _grows(self) -> Self:
        require(self.beta_start <= self.beta_end, f"diffusion.beta_end: must be at least beta_start {self.beta_start}")
        return self


class TrainingConfig(Settings):
    """How each expert is trained."""

    steps: Positive
    """Optimiser steps an expert, after those of the trunk."""
    trunk_steps: Annotated[Count, Field(exclude_if=_is_unused)] = 0
    """Steps of the trunk, one network on all timesteps from which every expert starts; 0: they start fresh, as in the paper."""
    batch_size: Positive
    learning_rate: Annotated[float, Field(gt=0.0)]
    """AdamW's step size after warm-up; constant from there on, so that a training can be continued."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    warmup_steps: Count = 0
    gradient_clip: Annotated[float, Field(ge=0.0)] = 0.0
    """Largest norm of the gradient; 0 means no limit."""
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9999
    """Decay of the averaged weights that are sampled from; ramped up as min(decay, (1 + step) / (10 + step))."""
    p2_gamma: Annotated[float, Field(ge=0.0)] = 0.0
    """P2 loss weights 1 / (k + SNR)^gamma (Choi et al. 2022); 0 weighs all timesteps alike, as Eq. 2."""
    p2_k: Annotated[float, Field(gt=0.0)] = 1.0
    label_dropout: Probability = 0.0
    """Share of images trained without their class, which classifier-free guidance needs (Ho and Salimans 2021)."""
    flip: Annotated[bool, Field(exclude_if=_is_off)] = False  # left out of ids and files where it is off
    """Mirror images left to right, each with probability one half each time it is drawn."""
    initial_weights: Annotated[str | None, Field(exclude_if=_is_none)] = None  # left out of ids and files where it is not used
    """File with the weights of a latent-diffusion or ADM U-Net, or an expert of this program, that every expert starts from where
    names and shapes agree; or a folder of experts of this program, each of which starts its namesake."""
    initial_digest: Annotated[str | None, Field(exclude_if=_is_none)] = None
    """SHA-256 of the initial weights, by which a training is identified, wherever they lie; None: filled in when it begins."""
    precision: Annotated[Precision, Field(exclude_if=_is_auto)] = "auto"  # left out of ids and files at its default
    """Numbers that networks calculate with in training: bf16, fp16 (the loss is scaled up, and steps that overflow are skipped)
    or fp32; auto is bf16 on a GPU and fp32 elsewhere. Weights are float32 with all of them."""
    seed: Count = 0
    """Seed of initial weights, order of the data, timesteps and noise."""


class SamplingConfig(Settings):
    """How images are drawn."""

    sampler: Literal["ddim", "ddpm", "dpm-solver++", "unipc"] = "ddim"
    """Song et al. 2021; Ho et al. 2020; Lu et al. 2022 and Zhao et al. 2023, multistep solvers of second order."""
    steps: Positive = 50
    eta: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """DDIM's share of fresh noise: 0 is deterministic."""
    set_alpha_to_one: Annotated[bool, Field(exclude_if=_is_unused)] = False
    """DDIM's last step ends at the image (alpha 1), which is right for pixels; else at the noise level of timestep 0, as latent
    diffusion has it. The other samplers always end at the image."""
    clip: bool = False
    """Clip each predicted image to [-1, 1]; right for pixels, wrong for latents."""
    batch_size: Positive = 256
    guidance_scale: Annotated[float, Field(ge=0.0)] = 1.0
    """Classifier-free guidance (Ho and Salimans 2021): 1 follows the class as trained, more overdoes it, 0 ignores it."""
    precision: Annotated[Precision, Field(exclude_if=_is_auto)] = "auto"
    """Numbers that networks calculate with when images are drawn: bf16, fp16 or fp32; auto is bf16 on a GPU, fp32 elsewhere."""


class EvaluationConfig(Settings):
    """How a trained ensemble is scored."""

    samples: Annotated[int, Field(ge=2)] = 10_000
    features: Literal["auto", "inception", "classifier", "random"] = "auto"
    inception_split: Annotated[Positive | None, Field(exclude_if=_is_none)] = None
    """Images of a split of the inception score: 5,000 are those of ADM's evaluator; None: ten equal splits."""
    seed: Count = 0
    """Seed of the sampling noise, common to all candidates."""


class Config(Settings):
    """All settings for training, sampling and scoring one ensemble of experts."""

    name: str
    data: str = "digits"
    """``digits``, or the path of a folder or zip of images."""
    image: ImageConfig
    first_stage: FirstStageConfig | None = None
    """Latent diffusion's autoencoder; None: pixels are denoised."""
    network: NetworkConfig
    experts: Annotated[tuple[ExpertConfig, ...], Field(min_length=1, max_length=MOST_EXPERTS)]
    """Expert 1, nearest to the data, first."""
    diffusion: DiffusionConfig = DiffusionConfig()
    training: TrainingConfig
    sampling: SamplingConfig = SamplingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    follow_links: Annotated[bool, Field(exclude_if=_is_off)] = False
    """Follow links that lead out of the folder of images, and linked folders."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        check_sizes(self.image, self.network)
        _check_intervals(self.experts, self.diffusion.timesteps)
        for number, expert in enumerate(self.experts, start=1):
            check_expert(expert, self.image, self.network, f"experts[{number}]")
        _check_sampling(self.sampling, self.diffusion.timesteps)
        _check_guidance(self.network, self.training, self.sampling)
        return self

    def expert(self, number: int) -> ExpertConfig:
        """Return expert ``number`` of 1 to N; 1 is nearest to the data."""
        require(1 <= number <= len(self.experts), f"expert: must be 1 to {len(self.experts)}, not {number}")
        return self.experts[number - 1]

    def with_(self, **sections: Any) -> "Config":
        """Return a validated copy: ``config.with_(name="x", training={"steps": 5})`` merges into the sections named."""
        merged = self.model_dump()
        for key, value in sections.items():
            both_sections = isinstance(value, dict) and isinstance(merged.get(key), dict)
            merged[key] = {**merged[key], **value} if both_sections else value
        return Config.model_validate(merged)

    @property
    def pixels(self) -> ImageConfig:
        """Channels and size of the images themselves. With a first stage they differ from ``image``, which describes the
        latents."""
        stage = self.first_stage
        return ImageConfig(channels=stage.image_channels, size=self.image.size * stage.downsample) if stage else self.image

    @property
    def architecture_id(self) -> str:
        """Return an id that is equal for two configs unless they differ in something that can change what is trained.

        Data, name and scoring do not change it, nor does the place where a first stage or known initial weights are stored.
        """
        content = self.model_dump(mode="json", include={"image", "first_stage", "network", "experts", "diffusion", "training"})
        if self.training.initial_digest:
            content["training"].pop("initial_weights", None)
        if content["first_stage"]:
            content["first_stage"] |= {"source": None, "subfolder": None}
        content["experts"] = [self.canonical_expert(number + 1).model_dump(mode="json") for number in range(len(self.experts))]
        return stable_id(content)

    def canonical_expert(self, number: int) -> ExpertConfig:
        """Return expert ``number`` without what cannot change its training: overrides without effect, and p where the interval
        is all of T, so that both draws agree."""
        expert = self.expert(number).canonical(self.network)
        everywhere = expert.interval == (0, self.diffusion.timesteps)
        return expert.model_copy(update={"p": 1.0}) if everywhere else expert

    def to_yaml(self) -> str:
        """Return all settings as YAML, which ``load`` reads back to an equal config."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=120)

    def save(self, path: Path) -> None:
        """Write the YAML so that a reader sees all of it or nothing. Raises ``OSError`` where it cannot be written."""
        write_text(path, self.to_yaml())

    @classmethod
    def load(cls, path: Path) -> "Config":
        """Read a YAML config. Raises ``UserError``, of one sentence, for anything wrong with it."""
        content = read_yaml(path)
        if not isinstance(content, dict):
            raise UserError(f"{path}: a config is a mapping of {', '.join(cls.model_fields)}")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise UserError(f"{path}: {explain(error, cls)}") from None


def stable_id(content: Any) -> str:
    """Return twelve hex digits that depend on the JSON content alone."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def even_intervals(experts: int, timesteps: int) -> tuple[tuple[int, int], ...]:
    """Cut [0, T) into ``experts`` disjoint intervals of equal length (to one step), nearest to the data first."""
    edges = [round(timesteps * number / experts) for number in range(experts + 1)]
    return tuple(itertools.pairwise(edges))


def relative_place(position: int, count: int, places: int) -> int:
    """Return the index among ``places`` at the relative place that ``position`` (from 1) has among ``count``."""
    return 0 if count == 1 else round((position - 1) * (places - 1) / (count - 1))


def split_choices(width: int, head_channels: int) -> tuple[int, ...]:
    """Return the allowed C_l at a level: from all convolution (0) to all attention (the width) in steps of the head width."""
    return tuple(range(0, width + 1, head_channels))


def _check_intervals(experts: tuple[ExpertConfig, ...], timesteps: int) -> None:
    edge = 0
    for number, expert in enumerate(experts, start=1):
        first, end = expert.interval
        require(
            first == edge and end > first,
            f"experts[{number}].interval: must begin at {edge} and end after it, without gaps, not {expert.interval}",
        )
        edge = end
    require(
        edge == timesteps,
        f"experts[{len(experts)}].interval: the last interval must end at {timesteps} timesteps, not {edge}",
    )


def _check_sampling(sampling: SamplingConfig, timesteps: int) -> None:
    """Raise ``ValueError`` where the number of sampling steps S does not divide T: steps are T // S apart, so they would not
    reach pure noise, and the last expert would be idle."""
    limit = timesteps // 2 if sampling.sampler == "ddim" else timesteps
    require(
        sampling.steps <= limit and timesteps % sampling.steps == 0,
        f"sampling.steps: must divide {timesteps} timesteps and be at most {limit} with {sampling.sampler}, not {sampling.steps}",
    )


def _check_guidance(network: NetworkConfig, training: TrainingConfig, sampling: SamplingConfig) -> None:
    classless = "only a class-conditional network (network.classes) "
    require(bool(network.classes) or not training.label_dropout, f"training.label_dropout: {classless}has labels to drop")
    guided = sampling.guidance_scale != 1
    require(bool(network.classes) or not guided, f"sampling.guidance_scale: {classless}can be guided")
    require(
        not guided or training.label_dropout > 0,
        "sampling.guidance_scale: must be 1 unless training.label_dropout teaches the network to do without a class",
    )
