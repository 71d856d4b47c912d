"""First stage of latent diffusion (Rombach et al. 2022, 2112.10752): images to latents and back, by an autoencoder of diffusers.

Latents are unscaled here. Shapes: ``B`` batch, ``C H W`` an image, ``c h w`` its latent; the down-factor is f = H / h.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from meme.config.schema import FirstStageConfig, ImageConfig
from meme.errors import UserError
from meme.support.torchvision_compat import make_torchvision_importable

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, VQModel

_FORMAT = 1  # of how latents are made and kept: raise it when either changes
_CLASSES = {"vq": "VQModel", "kl": "AutoencoderKL"}
_CONFIG, _PIPELINE, _WEIGHTS = "config.json", "model_index.json", "diffusion_pytorch_model.safetensors"  # diffusers' names
_INDEX = f"{_WEIGHTS}.index.json"  # beside weights in several files
_FETCHED = (_CONFIG, _INDEX, _WEIGHTS, "diffusion_pytorch_model-*-of-*.safetensors")  # and no variants of half precision
_ALLOWED = "give a folder written by save_pretrained of diffusers"
_PROBE = 256  # pixels a side of the image without content that f is measured with
_PIXELS_AT_ONCE = 2**20  # 16 images of 256 x 256, whose distances to 8192 codes at f = 4 take 2 GiB
# What diffusers raises over a config or weights that are not what it takes them for; OSError comes from a file.
_MALFORMED = (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)


def _published_vq(multipliers: tuple[int, ...], latent_channels: int, codes: int, *, attention: bool) -> dict[str, Any]:
    """Return the arguments of a VQModel with 128 channels at first and two residual blocks per level, with or without attention
    at the coarsest level."""
    plain = len(multipliers) - attention
    return {
        "block_out_channels": tuple(128 * multiplier for multiplier in multipliers),
        "layers_per_block": 2,
        "down_block_types": ("DownEncoderBlock2D",) * plain + ("AttnDownEncoderBlock2D",) * attention,
        "up_block_types": ("AttnUpDecoderBlock2D",) * attention + ("UpDecoderBlock2D",) * plain,
        "latent_channels": latent_channels,
        "vq_embed_dim": latent_channels,
        "num_vq_embeddings": codes,
    }


PUBLISHED = {
    "vq-f4": _published_vq((1, 2, 4), latent_channels=3, codes=8192, attention=False),
    "vq-f8": _published_vq((1, 2, 2, 4), latent_channels=4, codes=16384, attention=True),
}
"""Arguments of diffusers' ``VQModel`` for first stages of Rombach et al. 2022 (Table 8), on images of 256 x 256 x 3."""


@dataclass(frozen=True, eq=False)
class FirstStage:
    """A frozen autoencoder. Both directions take any number of images and hold a few of them at once."""

    config: FirstStageConfig
    id: str  # 16 hex digits: the same weights and architecture have the same id wherever they lie
    latent_shape: tuple[int, int, int]  # (c, h, w)
    pixel_shape: tuple[int, int, int]  # (C, H, W)
    model: "VQModel | AutoencoderKL"  # float32, in evaluation mode, without gradients
    device: torch.device

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode uint8 (B, C, H, W) to unscaled float32 latents (B, c, h, w) on this stage's device.

        VQ: before quantisation, which is the decoder's first layer (Rombach et al. 2022, appendix G). KL: the posterior's
        mean. LDM draws from the posterior at every step; latents kept on disk are drawn once, and a single draw used in
        every epoch would be noise without being augmentation.

        Raises ValueError for anything but uint8 images of this stage's shape.
        """
        if pixels.dtype != torch.uint8:
            raise ValueError(f"pixels must be uint8, not {pixels.dtype}")
        return self._in_parts(lambda part: _encode(self.model, part.float().div_(127.5).sub_(1)), pixels, self.pixel_shape)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode unscaled latents (B, c, h, w) to float32 images (B, C, H, W) clipped to [-1, 1], on this stage's device.

        A VQ stage first replaces every latent by the nearest code. Raises ValueError for latents of another shape.
        """
        return self._in_parts(lambda part: self.model.decode(part.float()).sample.clamp_(-1, 1), latents, self.latent_shape)

    def _in_parts(self, compute: Callable[[Tensor], Tensor], batch: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """Apply ``compute`` to parts of ``batch`` (B, *shape) whose activations fit into memory."""
        if batch.shape[1:] != shape:
            raise ValueError(f"this first stage takes (B, {', '.join(map(str, shape))}), not {tuple(batch.shape)}")
        at_once = max(1, _PIXELS_AT_ONCE // math.prod(self.pixel_shape[1:]))
        # Without TF32 a GPU's latents equal a CPU's up to float32 rounding, so cached latents serve both.
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            return torch.cat([compute(part.to(self.device)) for part in batch.split(at_once)])


def open_first_stage(config: FirstStageConfig, image: ImageConfig, device: torch.device | str = "cpu") -> FirstStage:
    """Open the autoencoder at ``config.source``, for latents of ``image``'s channels and size. It takes about 1 s: do it
    once.

    The source is a folder, or a name on the Hugging Face hub, fetched once. Nothing but safetensors is read.

    Raises UserError naming the field, if the source cannot be read, is not of ``config.kind``, or does not lead from
    ``config.image_channels`` to ``image.channels`` by a factor of ``config.downsample``.
    """
    folder = _folder(config)
    settings = _read_json(folder / _CONFIG)
    _check_class(settings, folder, config.kind)
    _check_weights(folder)
    _check_shapes(settings, folder, config, image)
    model = _load(folder, config.kind)
    side = image.size * config.downsample
    return FirstStage(
        config=config,
        id=_identity(model),
        latent_shape=(image.channels, image.size, image.size),
        pixel_shape=(config.image_channels, side, side),
        model=model.to(device),
        device=torch.device(device),
    )


def _folder(config: FirstStageConfig) -> Path:
    """Return the folder with the autoencoder's own config and weights."""
    _require(config.source.strip(), f"first_stage.source: is empty; {_ALLOWED}, or a name on the Hugging Face hub")
    local = Path(os.path.expanduser(config.source))
    _require(not os.path.isfile(local), f"first_stage.source: {local} is a file; {_ALLOWED}")
    # diffusers takes what a subfolder lacks from the folder above it, so it is only ever told of the innermost one.
    folder = (local if os.path.isdir(local) else _fetched(config)) / config.subfolder
    if not os.path.isfile(folder / _CONFIG):
        pipeline = os.path.isfile(folder / _PIPELINE)
        field = "subfolder" if config.subfolder or pipeline else "source"
        advice = "this is a whole pipeline, so name its autoencoder, such as vae or vqvae" if pipeline else _ALLOWED
        raise UserError(f"first_stage.{field}: there is no {_CONFIG} in {folder}; {advice}")
    return folder


def _fetched(config: FirstStageConfig) -> Path:
    """Return the folder with the hub's files of this name, downloaded into its cache on this machine if need be."""
    from huggingface_hub import snapshot_download

    inner = f"{config.subfolder}/" if config.subfolder else ""
    try:
        return Path(snapshot_download(config.source, allow_patterns=[_PIPELINE, *(inner + name for name in _FETCHED)]))
    except Exception as error:  # they share no base: no network, no such name, no permission, no room on the disk
        reason = f"is no folder here, and the Hugging Face hub did not give it ({_brief(error)})"
        raise UserError(f"first_stage.source: {_brief(config.source)} {reason}; {_ALLOWED}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"first_stage.source: {path} cannot be read ({_brief(error)}); {_ALLOWED}") from error
    _require(isinstance(content, dict), f"first_stage.source: {path} is no mapping; {_ALLOWED}")
    return content


def _check_class(settings: dict[str, Any], folder: Path, kind: str) -> None:
    found = str(settings.get("_class_name"))
    for other, name in _CLASSES.items():
        _require(found != name or other == kind, f"first_stage.kind: must be {other}, as {folder} holds {found}, not {kind}")
    _require(found in _CLASSES.values(), f"first_stage.source: {folder} holds {found}, not {_CLASSES[kind]}; {_ALLOWED}")
    _require(not settings.get("quantization_config"), f"first_stage.source: {folder} holds quantised weights; give the full ones")


def _check_weights(folder: Path) -> None:
    """Require weights that are all safetensors: diffusers trusts an index, and would unpickle a file that it names."""
    index = folder / _INDEX
    names = _read_json(index).get("weight_map") if index.exists() else {"all": _WEIGHTS}
    if not isinstance(names, dict) or not names:
        raise UserError(f"first_stage.source: {index} names no weights; {_ALLOWED}")
    for name in sorted(set(map(str, names.values()))):
        safe = name.endswith(".safetensors") and (folder / name).is_file()
        _require(safe, f"first_stage.source: {folder} lacks weights as safetensors, and no others are read; {_ALLOWED}")


def _check_shapes(settings: dict[str, Any], folder: Path, config: FirstStageConfig, image: ImageConfig) -> None:
    """Require an autoencoder that leads from ``config``'s images to latents of ``image``'s channels and size."""
    try:
        taken, latent, given = _shapes(config.kind, json.dumps(settings))
    except _MALFORMED as error:
        raise UserError(f"first_stage.source: {folder / _CONFIG} describes no autoencoder ({_brief(error)})") from error
    channels, factor = taken[0], taken[1] // latent[1]
    _require(taken == given, f"first_stage.source: {folder} does not give back images of the shape it takes")
    for field, allowed, value in (
        ("first_stage.image_channels", channels, config.image_channels),
        ("first_stage.downsample", factor, config.downsample),
        ("image.channels", latent[0], image.channels),
    ):
        _require(value == allowed, f"{field}: must be {allowed}, which is what the autoencoder in {folder} has, not {value}")


@lru_cache(maxsize=8)  # opening is then mostly reading the weights
def _shapes(kind: str, settings: str) -> tuple[torch.Size, torch.Size, torch.Size]:
    """Return (C, H, W) of an image, its latent and the decoded image, from the meta device, where nothing is computed or
    stored."""
    with torch.device("meta"), torch.no_grad():
        model = _model_class(kind).from_config(json.loads(settings))
        pixels = torch.empty(1, model.config.in_channels, _PROBE, _PROBE)
        latents = _encode(model, pixels)
        return pixels.shape[1:], latents.shape[1:], model.decode(latents).sample.shape[1:]


def _load(folder: Path, kind: str) -> "VQModel | AutoencoderKL":
    """Load the autoencoder with its weights, as float32 whatever they are stored as."""
    try:
        model, report = _model_class(kind).from_pretrained(
            folder, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except _MALFORMED as error:
        raise UserError(f"first_stage.source: the weights in {folder} cannot be read ({_brief(error)})") from error
    # diffusers logs a line, leaves weights that are missing at random, and goes on.
    astray = sorted(report["missing_keys"] + report["unexpected_keys"])
    _require(not astray, f"first_stage.source: the weights in {folder} are not those of its {_CONFIG} ({', '.join(astray):.80})")
    finite = all(weight.isfinite().all() for weight in model.state_dict().values())
    _require(finite, f"first_stage.source: some weights in {folder} are infinite or not a number")
    return model.float().eval().requires_grad_(False)


def _model_class(kind: str) -> "type[VQModel] | type[AutoencoderKL]":
    make_torchvision_importable()
    import diffusers  # takes seconds, which only users of a first stage shall wait

    return getattr(diffusers, _CLASSES[kind])


def _encode(model: "VQModel | AutoencoderKL", x: Tensor) -> Tensor:
    encoded = model.encode(x)
    return encoded.latents if "latents" in encoded else encoded.latent_dist.mode()


def _identity(model: "VQModel | AutoencoderKL") -> str:
    """Return 16 hex digits that depend on the weights and every setting of the model, but not on its source."""
    settings = {name: value for name, value in model.config.items() if not name.startswith("_")}
    facts = [_FORMAT, type(model).__name__, settings]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.contiguous().numpy())
    return digest.hexdigest()[:16]


def _require(condition: Any, sentence: str) -> None:
    if not condition:
        raise UserError(sentence)


def _brief(text: object) -> str:
    """Shorten text from elsewhere for the middle of a sentence."""
    return " ".join(str(text).split())[:160]
