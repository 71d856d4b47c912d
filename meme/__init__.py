"""MEME: multi-architecture multi-expert diffusion models (Lee et al., AAAI 2024).

The names below are the method from Python, in the order of use; ``docs/example.md`` goes through them. Whatever else a module
offers can be imported from it by its own path.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from meme.config.presets import preset, preset_names
from meme.config.schema import Config
from meme.errors import UserError

if TYPE_CHECKING:
    from meme.data.images import open_images
    from meme.export.diffusers_folder import export_diffusers, find_trained
    from meme.network.unet import build_expert
    from meme.pipeline import draw, evaluate, load_ensemble, train
    from meme.scoring.cost import ensemble_cost
    from meme.scoring.features import choose_features
    from meme.support.grids import save_grid

# Where the names come from that need torch, which ``meme.config`` and the search spaces must not import.
_LATER = {
    "build_expert": "meme.network.unet",
    "choose_features": "meme.scoring.features",
    "draw": "meme.pipeline",
    "ensemble_cost": "meme.scoring.cost",
    "evaluate": "meme.pipeline",
    "export_diffusers": "meme.export.diffusers_folder",
    "find_trained": "meme.export.diffusers_folder",
    "load_ensemble": "meme.pipeline",
    "open_images": "meme.data.images",
    "save_grid": "meme.support.grids",
    "train": "meme.pipeline",
}

__all__ = [
    "Config",
    "UserError",
    "build_expert",
    "choose_features",
    "draw",
    "ensemble_cost",
    "evaluate",
    "export_diffusers",
    "find_trained",
    "load_ensemble",
    "open_images",
    "preset",
    "preset_names",
    "save_grid",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a name that needs torch when it is first used."""
    if name not in _LATER:
        raise AttributeError(f"module 'meme' has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
