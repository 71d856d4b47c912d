"""Every row of the paper as one line of one table, and small presets for a laptop."""

import difflib
import math
from dataclasses import dataclass
from typing import Any

from meme.config.architecture import Family
from meme.config.schema import (
    Config,
    DiffusionConfig,
    EvaluationConfig,
    ExpertConfig,
    FirstStageConfig,
    ImageConfig,
    NetworkConfig,
    SamplingConfig,
    TrainingConfig,
    even_intervals,
    relative_place,
)
from meme.errors import UserError

# Table 6: the best of the expertization probabilities tried, for experts 1 (least noise) to 4.
SOFT_PROBABILITIES = (0.8, 0.4, 0.2, 0.1)

# Attention share C_l / C of the paper's four experts (rows, least noise first) at its four levels (columns, finest first).
# Table 4's cells are lost; these shares are the ones that give its parameter counts.
PAPER_SHARES = (
    (1 / 4, 1 / 4, 1 / 2, 1 / 2),
    (1 / 4, 1 / 2, 2 / 3, 3 / 4),
    (1 / 4, 1 / 2, 3 / 4, 7 / 8),
    (1 / 2, 3 / 4, 5 / 6, 15 / 16),
)


_LATENT_DIFFUSION = DiffusionConfig()


@dataclass(frozen=True)
class _Setting:
    """The settings that the rows of one data set share."""

    image: ImageConfig
    sampling: SamplingConfig
    evaluation: EvaluationConfig
    diffusion: DiffusionConfig = _LATENT_DIFFUSION
    first_stage: FirstStageConfig | None = None
    data: str = ""


_LDM = {"multipliers": (1, 2, 3, 4), "attention_downsamples": (2, 4, 8), "head_channels": 32}
_IU_LDM = _LDM | {"pool_strides": (2, 2, 1, 1), "layer_scale_levels": (3, 4)}
# Table 5, except its two blocks per level in the experts: their parameter counts are those of one.
_ADM = {"multipliers": (1, 1, 2, 2, 4, 4), "depth": 1, "head_channels": 64, "dropout": 0.1, "learned_variance": True}
_IU_ADM = _ADM | {"pool_strides": (2, 2, 1, 1, 1, 1), "layer_scale_levels": (3, 4, 5, 6)}
_IU_ADM_ALONE = _IU_ADM | {"head_channels": 32}
_CIN = {"multipliers": (1, 2, 4), "attention_downsamples": (1, 2, 4), "head_channels": 32, "classes": 1000}
# The text does not say how an iU-Net takes classes, nor its arrangement on three levels. Of those tried, this comes nearest to
# the 103M parameters: the first three of Table 4's four levels, each block followed by the baseline's spatial transformer.
_IU_CIN = _CIN | {"pool_strides": (2, 1, 1), "layer_scale_levels": (2, 3), "iformer_blocks": (1, 1, 1)}
_DIGITS = {"multipliers": (1, 2), "depth": 1, "head_channels": 8, "norm_groups": 2}
_IU_DIGITS = _DIGITS | {"pool_strides": (2, 1)}
_CIFAR = {"multipliers": (1, 2, 2), "depth": 1, "attention_downsamples": (2, 4), "head_channels": 16, "norm_groups": 16}
_IU_CIFAR = _CIFAR | {"pool_strides": (2, 2, 1)}
_THUMBNAILS = {"multipliers": (1, 2), "depth": 1, "attention_downsamples": (2,), "head_channels": 8, "norm_groups": 2}
_IU_THUMBNAILS = _THUMBNAILS | {"pool_strides": (2, 1)}


def _pixels(steps: int, batch_size: int = SamplingConfig().batch_size) -> SamplingConfig:
    """Return the sampling settings for pixels: predictions are clipped to their range, and DDIM's last step leaves no noise."""
    return SamplingConfig(steps=steps, batch_size=batch_size, clip=True, set_alpha_to_one=True)


_F4_LATENTS = ImageConfig(channels=3, size=64)
# Latent diffusion's VQ-f4 with 8192 codes, of FFHQ and CelebA-HQ alike; it does not scale these latents.
_VQ_F4 = FirstStageConfig(kind="vq", source="CompVis/ldm-celebahq-256", subfolder="vqvae", downsample=4, scale_factor=1.0)
_VQ_F8 = FirstStageConfig(kind="vq", downsample=8, scale_factor=1.0)  # not on the hub as diffusers has it: name a folder

_SETTINGS = {
    "ffhq": _Setting(_F4_LATENTS, SamplingConfig(steps=200), EvaluationConfig(samples=50_000), first_stage=_VQ_F4),
    "celebahq": _Setting(_F4_LATENTS, SamplingConfig(steps=50), EvaluationConfig(samples=50_000), first_stage=_VQ_F4),
    "celeba64": _Setting(
        ImageConfig(channels=3, size=64),
        _pixels(steps=50),
        EvaluationConfig(samples=10_000),
        DiffusionConfig(schedule="linear", beta_start=1e-4, beta_end=0.02),
    ),
    # Guidance as latent diffusion's own best ImageNet rows have it; the paper does not say.
    "imagenet": _Setting(
        ImageConfig(channels=4, size=32),
        SamplingConfig(steps=200, guidance_scale=1.5),
        EvaluationConfig(samples=10_000),
        first_stage=_VQ_F8,
    ),
    "cifar10": _Setting(
        ImageConfig(channels=3, size=32),
        _pixels(steps=50, batch_size=100),
        EvaluationConfig(samples=2_000),
    ),
    # Images in colour for machines without a GPU.
    "thumbnails": _Setting(
        ImageConfig(channels=3, size=16),
        _pixels(steps=20, batch_size=250),
        EvaluationConfig(samples=1_000),
    ),
    # The least size at which natural images show the paper's order of systems, for a laptop.
    "tiny": _Setting(ImageConfig(channels=3, size=8), _pixels(steps=20, batch_size=250), EvaluationConfig(samples=1_000)),
    "digits": _Setting(
        ImageConfig(channels=1, size=8),
        _pixels(steps=20, batch_size=250),
        EvaluationConfig(samples=1_000, features="classifier"),
        data="digits",
    ),
}

# Table 3. Its learning rates of FFHQ and CelebA-HQ are those of latent diffusion's own configs the other way round: these have
# 2e-6 an image, so 8.4e-5 for FFHQ with batch 42 and 9.6e-5 for CelebA-HQ with batch 48, and the paper says that it follows them.
# They are kept as Table 3 prints them. Its iterations of the small networks are an expert's; a small network alone gets those of
# four experts.
_FFHQ_LARGE = TrainingConfig(steps=540_000, batch_size=42, learning_rate=9.6e-5)
_FFHQ_SMALL = TrainingConfig(steps=135_000, batch_size=84, learning_rate=1.92e-4)
_CELEBA_LARGE = TrainingConfig(steps=410_000, batch_size=48, learning_rate=8.4e-5)
_CELEBA_SMALL = TrainingConfig(steps=85_000, batch_size=96, learning_rate=1.68e-4)
# Table 5: 1.6M images in batches of 8. Its learning rate is lost; this is Choi et al.'s, whose settings it follows, as are
# the P2 weights and no weight decay. It gives every model the same images, so an expert as many as a network alone. Images are
# mirrored as guided-diffusion does by default.
_ADM_ANY = TrainingConfig(steps=200_000, batch_size=8, learning_rate=2e-5, weight_decay=0.0, p2_gamma=1.0, flip=True)
# Appendix D: 400K iterations of the baseline, else as latent diffusion has it. An expert gets a quarter of the iterations on
# twice the batch, as in Table 3; the paper does not say.
_CIN_LARGE = TrainingConfig(steps=400_000, batch_size=64, learning_rate=6.4e-5, label_dropout=0.1)
_CIN_SMALL = TrainingConfig(steps=100_000, batch_size=128, learning_rate=1.28e-4, label_dropout=0.1)
_CIFAR_EXPERT = TrainingConfig(
    steps=20_000, batch_size=64, learning_rate=5e-4, warmup_steps=100, gradient_clip=1.0, ema_decay=0.999
)
_THUMBNAILS_EXPERT = TrainingConfig(
    steps=4_000, batch_size=32, learning_rate=2e-3, warmup_steps=20, gradient_clip=1.0, ema_decay=0.995
)
_DIGITS_EXPERT = TrainingConfig(
    steps=2_000, batch_size=32, learning_rate=3e-3, warmup_steps=20, gradient_clip=1.0, ema_decay=0.995
)


def _alone(training: TrainingConfig) -> TrainingConfig:
    """Return the training of one model for as many steps as four experts have together."""
    return training.model_copy(update={"steps": 4 * training.steps})


_SOFT = SOFT_PROBABILITIES
_HARD = (1.0, 1.0, 1.0, 1.0)
_ONE = (1.0,)

# name:                      family, channels, network, p of every expert, training
_ROWS: dict[str, tuple[Family, int, dict[str, Any], tuple[float, ...], TrainingConfig]] = {
    "ffhq-ldm-l":                   ("ldm",     224, _LDM,           _ONE,  _FFHQ_LARGE),
    "ffhq-ldm-s":                   ("ldm",     128, _LDM,           _ONE,  _alone(_FFHQ_SMALL)),
    "ffhq-iu-ldm-s":                ("iu-net",  128, _IU_LDM,        _ONE,  _alone(_FFHQ_SMALL)),
    "ffhq-multi-expert-hard":       ("ldm",     128, _LDM,           _HARD, _FFHQ_SMALL),
    "ffhq-multi-expert":            ("ldm",     128, _LDM,           _SOFT, _FFHQ_SMALL),
    "ffhq-meme-hard":               ("iu-net",  128, _IU_LDM,        _HARD, _FFHQ_SMALL),
    "ffhq-meme":                    ("iu-net",  128, _IU_LDM,        _SOFT, _FFHQ_SMALL),
    "ffhq-lite-ldm":                ("ldm",      64, _LDM,           _ONE,  _alone(_FFHQ_SMALL)),
    "celebahq-ldm-l":               ("ldm",     224, _LDM,           _ONE,  _CELEBA_LARGE),
    "celebahq-ldm-s":               ("ldm",     128, _LDM,           _ONE,  _alone(_CELEBA_SMALL)),
    "celebahq-iu-ldm-s":            ("iu-net",  128, _IU_LDM,        _ONE,  _alone(_CELEBA_SMALL)),
    "celebahq-multi-expert-hard":   ("ldm",     128, _LDM,           _HARD, _CELEBA_SMALL),
    "celebahq-multi-expert":        ("ldm",     128, _LDM,           _SOFT, _CELEBA_SMALL),
    "celebahq-meme-hard":           ("iu-net",  128, _IU_LDM,        _HARD, _CELEBA_SMALL),
    "celebahq-meme":                ("iu-net",  128, _IU_LDM,        _SOFT, _CELEBA_SMALL),
    "celebahq-lite-ldm":            ("ldm",      64, _LDM,           _ONE,  _alone(_CELEBA_SMALL)),
    "celeba64-adm-s":               ("adm",     128, _ADM,           _ONE,  _ADM_ANY),
    "celeba64-iu-adm-s":            ("iu-adm",  128, _IU_ADM_ALONE,  _ONE,  _ADM_ANY),
    "celeba64-multi-expert":        ("adm",     128, _ADM,           _SOFT, _ADM_ANY),
    "celeba64-meme":                ("iu-adm",  128, _IU_ADM,        _SOFT, _ADM_ANY),
    "imagenet-ldm-l":               ("ldm",     256, _CIN,           _ONE,  _CIN_LARGE),
    "imagenet-meme":                ("iu-net",  128, _IU_CIN,        _SOFT, _CIN_SMALL),
    "cifar10-ldm-l":                ("ldm",      64, _CIFAR,         _ONE,  _alone(_CIFAR_EXPERT)),
    "cifar10-ldm-s":                ("ldm",      32, _CIFAR,         _ONE,  _alone(_CIFAR_EXPERT)),
    "cifar10-iu-ldm-s":             ("iu-net",   32, _IU_CIFAR,      _ONE,  _alone(_CIFAR_EXPERT)),
    "cifar10-multi-expert-hard":    ("ldm",      32, _CIFAR,         _HARD, _CIFAR_EXPERT),
    "cifar10-multi-expert":         ("ldm",      32, _CIFAR,         _SOFT, _CIFAR_EXPERT),
    "cifar10-meme-hard":            ("iu-net",   32, _IU_CIFAR,      _HARD, _CIFAR_EXPERT),
    "cifar10-meme":                 ("iu-net",   32, _IU_CIFAR,      _SOFT, _CIFAR_EXPERT),
    "cifar10-lite-ldm":             ("ldm",      16, _CIFAR,         _ONE,  _alone(_CIFAR_EXPERT)),
    "thumbnails-ldm-l":             ("ldm",      32, _THUMBNAILS,    _ONE,  _alone(_THUMBNAILS_EXPERT)),
    "thumbnails-ldm-s":             ("ldm",      16, _THUMBNAILS,    _ONE,  _alone(_THUMBNAILS_EXPERT)),
    "thumbnails-iu-ldm-s":          ("iu-net",   16, _IU_THUMBNAILS, _ONE,  _alone(_THUMBNAILS_EXPERT)),
    "thumbnails-multi-expert-hard": ("ldm",      16, _THUMBNAILS,    _HARD, _THUMBNAILS_EXPERT),
    "thumbnails-multi-expert":      ("ldm",      16, _THUMBNAILS,    _SOFT, _THUMBNAILS_EXPERT),
    "thumbnails-meme-hard":         ("iu-net",   16, _IU_THUMBNAILS, _HARD, _THUMBNAILS_EXPERT),
    "thumbnails-meme":              ("iu-net",   16, _IU_THUMBNAILS, _SOFT, _THUMBNAILS_EXPERT),
    "thumbnails-lite-ldm":          ("ldm",       8, _THUMBNAILS,    _ONE,  _alone(_THUMBNAILS_EXPERT)),
    "tiny-ldm-l":                   ("ldm",      32, _THUMBNAILS,    _ONE,  _alone(_THUMBNAILS_EXPERT)),
    "tiny-ldm-s":                   ("ldm",      16, _THUMBNAILS,    _ONE,  _alone(_THUMBNAILS_EXPERT)),
    "tiny-iu-ldm-s":                ("iu-net",   16, _IU_THUMBNAILS, _ONE,  _alone(_THUMBNAILS_EXPERT)),
    "tiny-multi-expert-hard":       ("ldm",      16, _THUMBNAILS,    _HARD, _THUMBNAILS_EXPERT),
    "tiny-multi-expert":            ("ldm",      16, _THUMBNAILS,    _SOFT, _THUMBNAILS_EXPERT),
    "tiny-meme-hard":               ("iu-net",   16, _IU_THUMBNAILS, _HARD, _THUMBNAILS_EXPERT),
    "tiny-meme":                    ("iu-net",   16, _IU_THUMBNAILS, _SOFT, _THUMBNAILS_EXPERT),
    "tiny-lite-ldm":                ("ldm",       8, _THUMBNAILS,    _ONE,  _alone(_THUMBNAILS_EXPERT)),
    "digits-ldm-l":                 ("ldm",      32, _DIGITS,        _ONE,  _alone(_DIGITS_EXPERT)),
    "digits-ldm-s":                 ("ldm",      16, _DIGITS,        _ONE,  _alone(_DIGITS_EXPERT)),
    "digits-iu-ldm-s":              ("iu-net",   16, _IU_DIGITS,     _ONE,  _alone(_DIGITS_EXPERT)),
    "digits-multi-expert-hard":     ("ldm",      16, _DIGITS,        _HARD, _DIGITS_EXPERT),
    "digits-multi-expert":          ("ldm",      16, _DIGITS,        _SOFT, _DIGITS_EXPERT),
    "digits-meme-hard":             ("iu-net",   16, _IU_DIGITS,     _HARD, _DIGITS_EXPERT),
    "digits-meme":                  ("iu-net",   16, _IU_DIGITS,     _SOFT, _DIGITS_EXPERT),
    "digits-lite-ldm":              ("ldm",       8, _DIGITS,        _ONE,  _alone(_DIGITS_EXPERT)),
}  # fmt: skip


def preset_names() -> tuple[str, ...]:
    """Return the names of all rows of the paper and of the small presets: data set first, then the system (``ffhq-meme``)."""
    return tuple(_ROWS)


def preset(name: str) -> Config:
    """Return the config of one row. Raises ``UserError`` for an unknown name, with the nearest known one."""
    if name not in _ROWS:
        near = difflib.get_close_matches(name, _ROWS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"allowed are {', '.join(_ROWS)}"
        raise UserError(f"preset: there is no {name!r}; {hint}")
    family, channels, details, probabilities, training = _ROWS[name]
    setting = _SETTINGS[name.split("-")[0]]
    network = NetworkConfig(family=family, channels=channels, **details)
    return Config(
        name=name,
        data=setting.data,
        image=setting.image,
        first_stage=setting.first_stage,
        network=network,
        experts=experts_of(network, probabilities, setting.diffusion.timesteps),
        diffusion=setting.diffusion,
        training=training,
        sampling=setting.sampling,
        evaluation=setting.evaluation,
    )


def yardsticks(name: str) -> dict[str, Config]:
    """Return the yardsticks of a search around preset ``name``: its hand-made pattern, one architecture for all experts, and a
    single model trained as long as all experts together."""
    family = name.split("-")[0]
    found = {"hand-made": preset(name)}
    for kind, row in (
        ("multi-expert", f"{family}-multi-expert"),
        ("single-model", f"{family}-ldm-s"),
        ("single-model", f"{family}-adm-s"),
    ):
        if row in _ROWS:
            found[kind] = preset(row)
    return found


def experts_of(network: NetworkConfig, probabilities: tuple[float, ...], timesteps: int) -> tuple[ExpertConfig, ...]:
    """Return one expert for each p_n, on even intervals. In the iU-Net each has the paper's hand-made split."""
    count = len(probabilities)
    splits = [hand_made_split(network, number, count) if network.splits_channels else () for number in range(1, count + 1)]
    intervals = even_intervals(count, timesteps)
    return tuple(
        ExpertConfig(interval=interval, p=p, low_channels=split)
        for interval, p, split in zip(intervals, probabilities, splits, strict=True)
    )


def hand_made_split(network: NetworkConfig, number: int, count: int) -> tuple[int, ...]:
    """Return C_l at every level of expert ``number`` of ``count``, by the paper's attention shares.

    Other numbers of experts and levels take the shares at the same relative place, rounded to whole heads. The paper's own
    sizes give the paper's own splits.
    """
    row = PAPER_SHARES[relative_place(number, count, len(PAPER_SHARES))]
    shares = [row[relative_place(level, network.levels, len(row))] for level in range(1, network.levels + 1)]
    heads = [math.floor(share * width / network.head_channels + 0.5) for share, width in zip(shares, network.widths, strict=True)]
    return tuple(number_of_heads * network.head_channels for number_of_heads in heads)
