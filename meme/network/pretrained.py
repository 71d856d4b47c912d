"""Start experts from existing weights: a published U-Net of latent diffusion (CompVis) or ADM (guided-diffusion), or experts of
this program.

Published checkpoints share one naming: ``input_blocks.N.M``, ``middle_block.M``, ``output_blocks.N.M``, ``out.M``. A whole
checkpoint of latent diffusion has them behind ``model.diffusion_model.``. Where it also has averaged weights, these are used.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from meme.config.schema import Config, NetworkConfig
from meme.errors import UserError, in_one_line
from meme.network.blocks import AttentionBlock, Downsample, ResidualBlock, Upsample
from meme.network.transformer import SpatialTransformer
from meme.network.unet import Denoiser, build_expert
from meme.support.files import expanded
from meme.support.tensor_files import read_header

_PREFIXES = ("", "model.diffusion_model.")
_AVERAGED = "model_ema.diffusion_model"  # followed by a name without its dots

_BLOCK = "transformer_blocks.0"
# What each kind of layer calls its parts, here and there.
_PARTS: dict[type[nn.Module], dict[str, str]] = {
    ResidualBlock: {
        "norm_in": "in_layers.0",
        "conv_in": "in_layers.2",
        "time": "emb_layers.1",
        "norm_out": "out_layers.0",
        "conv_out": "out_layers.3",
        "skip": "skip_connection",
    },
    AttentionBlock: {"norm": "norm", "qkv": "qkv", "out": "proj_out"},
    SpatialTransformer: {
        "norm": "norm",
        "project_in": "proj_in",
        "norm_self": f"{_BLOCK}.norm1",
        "norm_cross": f"{_BLOCK}.norm2",
        "norm_mlp": f"{_BLOCK}.norm3",
        **{
            f"attend_{kind}.{ours}": f"{_BLOCK}.{theirs}"
            for kind, attention in (("self", "attn1"), ("cross", "attn2"))
            for ours, theirs in (
                ("query", f"{attention}.to_q"),
                ("key", f"{attention}.to_k"),
                ("value", f"{attention}.to_v"),
                ("out", f"{attention}.to_out.0"),
            )
        },
        "mlp.wide": f"{_BLOCK}.ff.net.0.proj",
        "mlp.out": f"{_BLOCK}.ff.net.2",
        "project_out": "proj_out",
    },
    Downsample: {"": "op"},
    Upsample: {"": "conv"},
}
_ENDS = {
    "time.0": "time_embed.0",
    "time.2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "norm_out": "out.0",
    "conv_out": "out.2",
    "classes": "cond_stage_model.embedding",  # the one that lies outside the U-Net
}


class Pair(NamedTuple):
    """A tensor of an expert and its name in published checkpoints."""

    ours: str
    theirs: str
    attention: AttentionBlock | None = None
    """The layer, if the tensor is its packed queries, keys and values."""


@dataclass(frozen=True)
class Taken:
    """The weights that an expert takes over, and their share of the expert."""

    tensors: dict[str, Tensor]
    """Tensors by our names, in our shapes, float32."""
    total_tensors: int
    total_params: int

    def __str__(self) -> str:
        params = sum(tensor.numel() for tensor in self.tensors.values())
        fresh = self.total_tensors - len(self.tensors)
        rest = f"; {fresh} start fresh" if fresh else ""
        return f"{len(self.tensors)} of {self.total_tensors} tensors, {params:,} of {self.total_params:,} parameters{rest}"


def take_over(network: NetworkConfig, expert: Denoiser, path: Path) -> Taken:
    """Return the tensors of the checkpoint at ``path`` that fit ``expert``.

    All of a latent-diffusion or ADM U-Net of the same size fit, and of an expert of this program those whose names and shapes
    agree. An iU-Net takes from a published U-Net the decoder, the middle, the time embedding and the first convolution, where
    shapes agree, since its encoder is another one. The number of attention heads is that of the expert's config; the file does
    not hold it. Raises ``UserError`` for a file that cannot be read, holds more than tensors, or has nothing that fits.
    """
    found, own, tensors = read_weights(path), dict(expert.named_parameters()), {}
    for pair in _own_pairs(expert) if _is_own(path) else pairs(network, expert):
        tensor = _find(found, pair.theirs)
        if tensor is not None and (fitted := _fitted(tensor, pair, own[pair.ours])) is not None:
            tensors[pair.ours] = fitted
    if not tensors:
        raise UserError(
            f"initial_weights: nothing in {path} fits; it must hold a U-Net of latent diffusion or ADM by the names they were "
            "published under (input_blocks.0.0.weight), or an expert of this program (expert-1.safetensors), of that width"
        )
    return Taken(tensors, len(own), sum(weight.numel() for weight in own.values()))


@torch.no_grad()
def start_from(network: NetworkConfig, expert: Denoiser, path: Path) -> None:
    """Overwrite the weights of ``expert`` that the checkpoint at ``path`` has. Raises ``UserError`` as ``take_over`` does."""
    own = dict(expert.named_parameters())
    for name, tensor in take_over(network, expert, path).tensors.items():
        own[name].copy_(tensor)


def summary(config: Config, source: Path) -> str:
    """Describe what the experts of ``config`` take over from ``source``, on one line where it is the same for all of them."""
    taken = []
    for number in range(1, len(config.experts) + 1):
        with torch.device("meta"):
            expert = build_expert(config, number)
        taken.append(str(take_over(config.network, expert, weights_file(source, number))))
    if len(set(taken)) == 1:
        return f"from {source.name}, every expert takes {taken[0]}"
    return "\n".join(f"from {source.name}, expert {number} takes {each}" for number, each in enumerate(taken, start=1))


def weights_file(source: Path, number: int) -> Path:
    """Return the file that expert ``number`` starts from: ``source``, or the file of that expert in the folder ``source``."""
    return source / f"expert-{number}.safetensors" if source.is_dir() else source


def identified(config: Config) -> Config:
    """Return ``config`` with the digest of its initial weights, if it has any.

    Raises ``UserError`` where the weights are missing and their digest is not known, or where their digest is another one.
    """
    source, known = config.training.initial_weights, config.training.initial_digest
    if source is None or (known and not Path(source).exists()):
        return config
    found = digest(Path(source))
    if known and found != known:
        raise UserError(f"initial_weights: {source} holds other weights than training.initial_digest says")
    return config if known else config.with_(training={"initial_digest": found})


def digest(source: Path) -> str:
    """Return the SHA-256 of a file, or of all experts' files in a folder, as hex digits. Raises ``UserError`` where there is
    none."""
    files = [source]
    if source.is_dir():  # states of unfinished trainings lie there as well
        files = sorted(path for path in source.iterdir() if re.fullmatch(r"expert-\d+\.safetensors", path.name))
    try:
        stamps = [(path, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        digests = {path.name: _file_digest(*stamp) for path, stamp in zip(files, stamps, strict=True)}
    except OSError as error:
        raise UserError(f"initial_weights: {source} cannot be read ({error.strerror})") from None
    if not digests:
        raise UserError(f"initial_weights: {source} holds no expert-1.safetensors")
    if not source.is_dir():
        return digests[source.name]
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


@lru_cache(maxsize=100)
def _file_digest(path: Path, size: int, changed: int) -> str:
    """Return the SHA-256 of a file. It is read again only when its size or time of change differs."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_own(path: Path) -> bool:
    """Return whether a file was written by this program."""
    try:
        read_header(path)
    except UserError:
        return False
    return True


def _own_pairs(expert: Denoiser) -> Iterator[Pair]:
    """Yield every tensor of ``expert`` under its own name."""
    return (Pair(name, name) for name, _ in expert.named_parameters())


def pairs(network: NetworkConfig, expert: Denoiser) -> Iterator[Pair]:
    """Yield every tensor of ``expert`` that a published U-Net may have, with its name there."""
    for ours, theirs, attention in _layers(network, expert):
        for kind, _ in expert.get_submodule(ours).named_parameters(recurse=False):
            yield Pair(f"{ours}.{kind}", f"{theirs}.{kind}", attention)


def _layers(network: NetworkConfig, expert: Denoiser) -> Iterator[tuple[str, str, AttentionBlock | None]]:
    """Yield the names of each layer, here and in published checkpoints, and the attention whose packed queries, keys and values
    it is, if any."""
    yield from ((ours, theirs, None) for ours, theirs in _ENDS.items() if ours != "classes" or network.classes)
    stages: dict[str, tuple[str, nn.Module]] = {"middle": ("middle_block", expert.middle)}
    stages |= {f"decoder.{place}": (f"output_blocks.{place}", stage) for place, stage in enumerate(expert.decoder)}
    if not network.splits_channels:
        stages |= {f"encoder.{place}": (f"input_blocks.{place + 1}", stage) for place, stage in enumerate(expert.encoder)}
    for ours, (theirs, stage) in stages.items():
        for position, layer in enumerate(stage.children()):
            for here, there in _PARTS[type(layer)].items():
                packed = layer if here == "qkv" and isinstance(layer, AttentionBlock) else None
                yield f"{ours}.{position}.{here}".rstrip("."), f"{theirs}.{position}.{there}", packed


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """Read the tensors of a safetensors file, or of a ``.ckpt``, ``.pt`` or ``.pth``, of which nothing but tensors is
    unpickled.

    Raises ``UserError`` for a file that is missing, damaged, or holds other objects.
    """
    path = expanded(path)
    if not path.is_file():
        raise UserError(f"initial_weights: {path} is no file; give a .safetensors, .ckpt, .pt or .pth")
    read: Callable[[Path], Mapping] = load_file if path.suffix == ".safetensors" else _read_pickled
    try:
        found = read(path)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, SafetensorError) as error:
        raise UserError(f"initial_weights: {path} cannot be read ({in_one_line(error)})") from None
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


def _read_pickled(path: Path) -> Mapping:
    from pickle import UnpicklingError  # what torch raises over anything but tensors

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:
        raise UserError(
            f"initial_weights: {path} holds more than tensors, and such files are never unpickled; convert it to safetensors"
        ) from None
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping):
        raise ValueError("it holds no mapping of names to tensors")
    return found


def _find(found: Mapping[str, Tensor], name: str) -> Tensor | None:
    averaged = found.get(_AVERAGED + name.replace(".", ""))
    return averaged if averaged is not None else next((found[each + name] for each in _PREFIXES if each + name in found), None)


def _fitted(tensor: Tensor, pair: Pair, own: Tensor) -> Tensor | None:
    """Return ``tensor`` in our layout: 1x1 convolutions as linear layers, queries, keys and values in our order. Return None if
    shapes disagree."""
    while tensor.dim() > own.dim() and tensor.shape[-1] == 1:
        tensor = tensor[..., 0]
    if tensor.shape != own.shape or not tensor.is_floating_point():
        return None
    if pair.attention is not None:
        # Theirs lie head by head, ours all queries first.
        heads = tensor.shape[0] // 3 // pair.attention.head_channels
        by_head = tensor.unflatten(0, (heads, 3, pair.attention.head_channels))
        tensor = by_head.transpose(0, 1).flatten(0, 2)
    return tensor.float()
