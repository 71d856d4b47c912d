"""A data set as the latents of a first stage: computed once, cached on disk, and scaled when read.

Shapes: ``N`` images, ``B`` batch, ``c h w`` a latent. Unscaled latents are the autoencoder's output. Scaled ones, multiplied by
the scale factor, are what networks denoise (Rombach et al. 2022, appendix G).
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from meme.config.schema import FirstStageConfig, ImageConfig
from meme.data.first_stage import FirstStage, open_first_stage
from meme.data.images import Images
from meme.errors import UserError
from meme.support.files import cache_folder, write_text, written_whole


@dataclass(frozen=True, eq=False)
class Latents:
    """A data set of latents, with the interface of `meme.data.images.Images` that a trainer uses.

    Do not send it to another process, which would copy it: let that call `latents_of`, and the pages are shared.
    """

    images: Images
    values: np.ndarray  # unscaled float32 (N, c, h, w), a read-only memory map
    scale_factor: float  # the config's, else one over the standard deviation of all values
    first_stage_id: str
    mirrored_values: np.ndarray | None = None  # those of the mirrored images, where they were asked for

    def __len__(self) -> int:
        return len(self.values)

    def tensor(self, indices: ArrayLike) -> Tensor:
        """Return the scaled latents at ``indices`` (B,) as float32 (B, c, h, w)."""
        chosen = np.asarray(self.values[np.asarray(indices, dtype=np.int64)])
        return torch.from_numpy(chosen).mul_(self.scale_factor)

    def mirrored(self, indices: ArrayLike) -> Tensor:
        """Return the same as ``tensor`` for the images with left and right exchanged. These are not the mirrored latents.

        Raises ``ValueError`` where the mirrored images were not encoded.
        """
        if self.mirrored_values is None:
            raise ValueError(f"{self.name}: the latents of the mirrored images were not asked for")
        chosen = np.asarray(self.mirrored_values[np.asarray(indices, dtype=np.int64)])
        return torch.from_numpy(chosen).mul_(self.scale_factor)

    @property
    def name(self) -> str:
        return self.images.name

    @property
    def labels(self) -> np.ndarray | None:
        return self.images.labels

    @property
    def classes(self) -> tuple[str, ...]:
        return self.images.classes

    @property
    def content_id(self) -> str:
        """Return 16 hex digits that depend on the images' content, the first stage and the scale factor."""
        facts = json.dumps([self.images.content_id, self.first_stage_id, self.scale_factor])
        return hashlib.sha256(facts.encode()).hexdigest()[:16]


def _silent(message: str) -> None:
    del message


def latents_of(
    images: Images,
    config: FirstStageConfig,
    image: ImageConfig,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    on_message: Callable[[str], None] = _silent,
    *,
    flip: bool = False,
) -> Latents:
    """Encode ``images`` once to latents of ``image``'s channels and size, cached under ``cache_folder()/"latents"``.

    The files are named by what determines them: the images' content and the first stage. At most ``batch_size`` images are in
    memory at a time. With ``flip``, latents of the mirrored images are stored beside them; the scale factor is that of the
    unmirrored ones. Two processes that encode the same data both do the work and get the same result.

    Raises UserError as `open_first_stage` does, or if the latents have no standard deviation, or the cache cannot be written.
    """
    stage = open_first_stage(config, image, device)
    values, measured = _entry(images, stage, batch_size, on_message, mirrored=False)
    mirrored = _entry(images, stage, batch_size, on_message, mirrored=True)[0] if flip else None
    return Latents(images, values, config.scale_factor or measured, stage.id, mirrored)


def _entry(
    images: Images, stage: FirstStage, batch_size: int, on_message: Callable[[str], None], *, mirrored: bool
) -> tuple[np.ndarray, float]:
    """Return latents and their measured scale factor from the cache. Missing ones are computed first."""
    path = cache_folder() / "latents" / f"{images.content_id}-{stage.id}{'-mirrored' if mirrored else ''}.npy"
    shape = (len(images), *stage.latent_shape)
    entry = _read_entry(path, shape)
    if entry is None:
        what = f"{len(images)} {'mirrored ' if mirrored else ''}images of {images.name}"
        on_message(f"Encoding {what} to latents of {' x '.join(map(str, shape[1:]))}, once")
        try:
            _write_entry(path, shape, images, stage, batch_size, mirrored=mirrored)
        except OSError as error:
            advice = "make room there, or name another folder in MEME_CACHE"
            raise UserError(f"first_stage: cannot write the cache {path}: {error.strerror}; {advice}") from error
        entry = _read_entry(path, shape)
    if entry is None:
        raise UserError(f"first_stage: the cache {path} cannot be read back; name another folder in MEME_CACHE")
    return entry


def _read_entry(path: Path, shape: tuple[int, ...]) -> tuple[np.ndarray, float] | None:
    """Return the latents, mapped from disk, and their measured scale factor. Return None if either is missing or damaged."""
    try:
        scale_factor = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["scale_factor"]
        values = np.load(path, mmap_mode="r", allow_pickle=False)
        sound = (values.shape, values.dtype) == (shape, np.float32) and 0 < scale_factor < math.inf
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None
    return (values, scale_factor) if sound else None


def _write_entry(
    path: Path, shape: tuple[int, ...], images: Images, stage: FirstStage, batch_size: int, *, mirrored: bool
) -> None:
    """Encode the images straight to disk, since their latents may exceed the memory. The scale factor is written last and marks
    the entry as complete."""
    moments = []
    with written_whole(path) as partial, partial.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for first in range(0, len(images), batch_size):
            pixels = torch.tensor(images.pixels[first : first + batch_size])
            latents = stage.encode(pixels.flip(-1) if mirrored else pixels).cpu()
            file.write(latents.numpy().astype("<f4").tobytes())
            variance, mean = torch.var_mean(latents.double(), correction=0)
            moments.append((latents.numel(), mean.item(), variance.item()))
        scale_factor = _scale_factor(moments)
    write_text(path.with_suffix(".json"), json.dumps({"scale_factor": scale_factor}))


def _scale_factor(moments: list[tuple[int, float, float]]) -> float:
    """Return one over the standard deviation of all values, from the counts, means and variances of their parts.

    Rombach et al. 2022, appendix G, take it from the first batch. Over all data it does not depend on their order.
    """
    counts, means, variances = torch.tensor(moments, dtype=torch.float64).T
    shares = counts / counts.sum()
    centred = means - shares @ means
    deviation = (shares @ (variances + centred**2)).sqrt().item()
    if not 0 < deviation < math.inf:
        raise UserError(f"first_stage.source: its latents have a standard deviation of {deviation}")
    # To six digits: rounding on another device seldom reaches these, and the content_id depends on them.
    return float(f"{1 / deviation:.6g}")
