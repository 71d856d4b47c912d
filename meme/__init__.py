"""MEME: multi-architecture multi-expert diffusion models (Lee et al., AAAI 2024)."""

from meme.config import Config
from meme.presets import preset, preset_names


def __getattr__(name: str):
    """``build_expert`` needs torch, which ``meme.config`` and the search spaces must not import."""
    if name == "build_expert":
        from meme.denoiser import build_expert

        return build_expert
    raise AttributeError(f"module 'meme' has no attribute {name!r}")


__all__ = ["Config", "build_expert", "preset", "preset_names"]
