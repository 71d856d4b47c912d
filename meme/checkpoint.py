"""Weights as safetensors, each file with the id of what it holds in its header. Nothing is unpickled."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from meme.errors import UserError
from meme.files import written_whole


def save_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, str | int]) -> None:
    """Write ``tensors`` and ``header`` so that a reader sees all of it or nothing."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with written_whole(path) as partial:
        save_file(contiguous, partial, metadata={"meme": json.dumps(header)})


def read_header(path: Path) -> dict[str, str | int]:
    """The header of a file written by ``save_tensors``; ``UserError`` if it is not one."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["meme"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path}: not a readable checkpoint of this program ({error})") from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: not a readable checkpoint of this program (its header is not a mapping)")
    return header


def load_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors of a file written by ``save_tensors``; ``UserError`` if they can't be read."""
    try:
        return load_file(path, device=device)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable checkpoint of this program ({error})") from None
