"""Random numbers as pure functions of a seed and a purpose, so that noise is common to all candidates and survives a resume."""

import hashlib

import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for one purpose, e.g. ``derive_seed(0, "noise", step)``; the same on every machine and Python."""
    text = "\x1f".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """Return a CPU generator for one purpose. Drawing on the CPU gives every device the same numbers."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))
