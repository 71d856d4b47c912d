"""Weights as safetensors, each file with the id of its contents in its header. Nothing is unpickled."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from meme.errors import UserError
from meme.support.files import written_whole

TENSORS_AT_ONCE = 16


def save_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, str | int]) -> None:
    """Write ``tensors`` and ``header`` so that a reader sees all of it or nothing. Raises ``OSError`` where the disk is
    full."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        with written_whole(path) as partial:
            save_file(contiguous, partial, metadata={"meme": json.dumps(header)})
    except SafetensorError as error:
        if found := re.search(r"os error (\d+)", str(error)):  # the library's way to say that the disk is full
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from None
        raise


def read_header(path: Path) -> dict[str, Any]:
    """Return the header of a file written by ``save_tensors``, without checking its values. Raises ``UserError`` if it is no
    such file."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["meme"])
    # RuntimeError: nested too deeply, or gone since safetensors found it: another process has put a new state in its place.
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise _unreadable(path, error) from None
    if not isinstance(header, dict):
        raise _unreadable(path, "its header is not a mapping")
    return header


def load_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Load the tensors of a file written by ``save_tensors``, those of four dimensions as channels_last. Raises ``UserError``
    if it cannot be read.

    The tensors are copies, made a few at a time. A mapped file counts all pages that were read as memory of this process, as
    long as it is open or one view of it exists.
    """
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        for first in range(0, len(names), TENSORS_AT_ONCE):
            with safe_open(path, framework="pt", device=device) as file:
                for name in names[first : first + TENSORS_AT_ONCE]:
                    tensors[name] = _copied(file.get_tensor(name))
    except (OSError, SafetensorError, RuntimeError, AttributeError) as error:  # the latter two: a dtype torch has not
        raise _unreadable(path, error) from None
    return tensors


def check_tensors(path: Path, found: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise ``UserError`` unless ``found`` has the names, shapes and dtypes of ``wanted``, whatever the file's header
    claims."""
    for name in sorted(found.keys() | wanted.keys()):
        if name not in found or name not in wanted:
            raise _unreadable(path, f"{name} is {'missing' if name in wanted else 'not of this network'}")
        if (found[name].shape, found[name].dtype) != (wanted[name].shape, wanted[name].dtype):
            raise _unreadable(path, f"{name} must be {tuple(wanted[name].shape)} {wanted[name].dtype}")


def _unreadable(path: Path, reason: object) -> UserError:
    return UserError(f"{path}: not a readable checkpoint of this program ({str(reason)[:200]})")


def _copied(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.channels_last if tensor.dim() == 4 else torch.contiguous_format)
