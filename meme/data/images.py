"""Images to batches, each batch a function of (seed, step).

A data set is one uint8 array in memory, or mapped from a cache on disk that all worker processes share. Reading the
sources themselves is left to `meme.data.sources`. Shapes: ``N`` images, ``B`` batch, ``C`` channels, ``H W`` space.
"""

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image
from sklearn.datasets import load_digits

from meme.data.decoding import FULL_WHITE, Origin, square
from meme.data.sources import ALLOWED, Layout, Skipped, decode_all, is_passed_over, open_layout
from meme.errors import UserError, printable
from meme.support.files import cache_folder, expanded, write_text, written_whole
from meme.support.seeding import generator

__all__ = ["Images", "Skipped", "TrainingData", "batch_indices", "open_images"]

_FORMAT = 3  # of the cache and of how pixels are made: raise it when either changes
LARGEST_ENLARGEMENT = 2  # of a data set's images; more would teach blur
_NAMED = 5  # skipped files named in a message


class TrainingData(Protocol):
    """The data that experts are trained on: `Images`, or the latents of a first stage."""

    @property
    def content_id(self) -> str: ...

    @property
    def labels(self) -> np.ndarray | None: ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def tensor(self, indices: ArrayLike) -> torch.Tensor: ...

    def mirrored(self, indices: ArrayLike) -> torch.Tensor: ...


@dataclass(frozen=True, eq=False)
class Images:
    """A data set in memory.

    Do not send it to another process, which would copy it: let that call `open_images`, and the pages are shared.
    """

    name: str  # "digits", or the name of the folder or zip
    pixels: np.ndarray  # uint8 (N, C, H, W), may be a read-only memory map
    labels: np.ndarray | None  # int64 (N,), or None where the source has no class folders
    classes: tuple[str, ...]  # class names, label 0 first; empty without labels
    content_id: str  # 16 hex digits of a SHA-256: the same images, labels and classes have the same id wherever they lie
    skipped: tuple[Skipped, ...]  # files that could not be read
    source_side: int | None = None  # median of the shorter sides in pixels, before anything was resized
    colour_share: float | None = None  # of the source's images, those with a pixel in colour
    white: int = FULL_WHITE  # value of white in the source's grey images of more than 8 bits

    @property
    def known_labels(self) -> np.ndarray:
        """Return ``labels``. Raises ``ValueError`` for images without labels."""
        if self.labels is None:
            raise ValueError(f"{self.name}: these images have no labels")
        return self.labels

    def __len__(self) -> int:
        return len(self.pixels)

    def tensor(self, indices: ArrayLike) -> torch.Tensor:
        """Return the images at ``indices`` (B,) as float32 (B, C, H, W) in [-1, 1]."""
        chosen = np.asarray(self.pixels[np.asarray(indices, dtype=np.int64)])
        return torch.from_numpy(chosen).float().div_(127.5).sub_(1)

    def mirrored(self, indices: ArrayLike) -> torch.Tensor:
        """Return the same as ``tensor``, with left and right exchanged."""
        return self.tensor(indices).flip(-1)


def _silent(message: str) -> None:
    del message


def open_images(
    source: str | Path,
    *,
    size: int,
    channels: int,
    strict: bool = False,
    follow_links: bool = False,
    fresh: bool = False,
    on_message: Callable[[str], None] = _silent,
) -> Images:
    """Read a data set as ``size`` x ``size`` images with 1 (grey) or 3 (RGB) channels.

    ``source`` is the string "digits" (scikit-learn's 1,797 handwritten digits, nothing to download), a folder or zip of images,
    the folder of CIFAR-10's binary version, or a dataset of Hugging Face on this disk, which names its own classes (see
    `meme.data.huggingface`). Where every image lies in a sub-folder, the first level of sub-folders names the classes, after
    folders common to all are stripped. A folder called digits is "./digits".

    Decoded images are stored under the cache folder, so that opening them again is quick. A changed file is detected, and with
    ``fresh`` all files are read again. Unreadable files are skipped with one line to ``on_message``, or refused if ``strict``.
    Links that lead out of a folder are followed if ``follow_links``, with one line that names their targets.

    Raises UserError naming the field, if the source cannot be read or holds no readable image.
    """
    if size < 1:
        raise UserError(f"size: {size} pixels a side is impossible, must be at least 1")
    if channels not in (1, 3):
        raise UserError(f"channels: {channels} is not allowed, must be 1 (grey) or 3 (RGB)")
    if source == "digits":
        return _digits(size, channels)
    path = existing(source)
    check_outside(path, cache_folder(), "MEME_CACHE")
    with open_layout(path, follow_links=follow_links) as layout:
        entry = cache_folder() / "data" / _key(path, layout, size, channels)
        if fresh:
            shutil.rmtree(entry, ignore_errors=True)
        images = _cached(path, entry, layout, size, channels)
        _report(images, layout, strict, on_message)
    return images


def check_outside(data: Path, output: Path, field: str) -> None:
    """Raise ``UserError`` where ``output``, named by ``field``, lies inside the folder ``data``, since its files would be read
    as images.

    A hidden folder inside ``data`` is allowed, since hidden files are passed over.
    """
    where = Path(os.path.realpath(output))
    if data.is_dir() and where.is_relative_to(data) and not is_passed_over(where.relative_to(data).as_posix()):
        raise UserError(f"{field}: {where} lies inside the data {data}, whose images it would join; name a folder outside")


def batch_indices(count: int, batch: int, seed: int, step: int) -> np.ndarray:
    """Return the indices of the images in the batch of ``step``, out of ``count``: int64 (batch,), a function of the arguments
    alone.

    Every epoch is a permutation of all images, and batches are cut from the endless sequence of epochs. So a batch may span two
    epochs, or more if ``batch`` exceeds ``count``.
    """
    first, last = step * batch, (step + 1) * batch
    epochs = range(first // count, (last - 1) // count + 1)
    row = np.concatenate([_epoch_order(count, seed, epoch) for epoch in epochs])
    start = first - epochs[0] * count
    return row[start : start + batch]


@lru_cache(maxsize=4)  # called each step, and a batch spans two epochs at most unless it is larger than the data
def _epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    order = torch.randperm(count, generator=generator(seed, "order", epoch)).numpy()
    order.flags.writeable = False  # shared by all callers
    return order


def _digits(size: int, channels: int) -> Images:
    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # 0..16 in the source
    pixels = np.stack([square(Image.fromarray(image), size, channels) for image in grey])
    labels = digits.target.astype(np.int64)
    classes = tuple(str(name) for name in digits.target_names)
    identity = _content_id(pixels.shape, hashlib.sha256(pixels.tobytes()).digest(), labels, classes)
    return Images("digits", pixels, labels, classes, identity, (), source_side=grey.shape[-1], colour_share=0.0)


def existing(source: str | Path) -> Path:
    """Return the absolute path of a source. Raises ``UserError`` where nothing is there, or nothing that may be opened."""
    shown = printable(str(source))
    if not str(source).strip():
        raise UserError(f"data: is empty; {ALLOWED}")
    try:
        return expanded(source).resolve(strict=True)
    except FileNotFoundError as error:
        raise UserError(f"data: {shown} does not exist; {ALLOWED}") from error
    except (OSError, ValueError, RuntimeError) as error:  # no permission, a NUL in the name, a loop of links
        raise UserError(f"data: {shown} cannot be opened ({printable(str(error))}); {ALLOWED}") from error


def _report(images: Images, layout: Layout, strict: bool, on_message: Callable[[str], None]) -> None:
    if layout.linked:
        on_message(f"links lead out of {images.name} to {_first_few(layout.linked)}")
    if images.white != FULL_WHITE:
        on_message(
            f"the 16-bit grey images of {images.name} use {images.white.bit_length()} bits: {images.white:,} is taken as white"
        )
    skipped, total = images.skipped, len(layout.members) + len(layout.skipped)
    if not skipped:
        return
    named = _first_few([f"{each.name} ({each.reason})" for each in skipped])
    count = f"{len(skipped)} of {total} files could not be read"
    if strict:
        raise UserError(f"data: {count}, and strict allows none: {named}")
    on_message(f"{count} and were skipped: {named}")


def _first_few(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f", and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _content_id(shape: Sequence[int], digest: bytes, labels: np.ndarray | None, classes: Sequence[str]) -> str:
    """Return the id of a data set. ``digest`` is the SHA-256 of the pixels' bytes, passed by itself since the pixels may exceed
    the memory."""
    facts = json.dumps([list(shape), digest.hex(), None if labels is None else labels.tolist(), list(classes)])
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def _key(path: Path, layout: Layout, size: int, channels: int) -> str:
    """Return the cache key: everything that the decoded images depend on, found without opening a file."""
    files = [[member.name, member.size, member.stamp] for member in layout.members]
    facts = json.dumps([_FORMAT, str(path), files, layout.skipped, layout.classes, size, channels])
    return hashlib.sha256(facts.encode()).hexdigest()[:32]


def _cached(path: Path, entry: Path, layout: Layout, size: int, channels: int) -> Images:
    """Return the images of the cache's folder ``entry``, which is first made if it is missing or broken.

    It is built beside its place and then renamed, so that no process ever sees half of it.
    """
    name, shape = printable(path.name), (channels, size, size)
    if (images := _read_entry(entry, name, shape)) is not None:
        return images
    building = entry.with_name(f".{entry.name}.{uuid.uuid4().hex}.part")
    try:
        building.mkdir(parents=True)
        _build(building, path, layout, shape)
        if (rival := _read_entry(entry, name, shape)) is not None:  # another process was faster, with the same contents
            return rival
        _replace_folder(building, entry)
    except OSError as error:
        advice = "make room there, or name another folder in MEME_CACHE"
        raise UserError(f"data: cannot write the cache {printable(str(entry))}: {error.strerror}; {advice}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    images = _read_entry(entry, name, shape)
    if images is None:
        raise UserError(f"data: the cache {printable(str(entry))} cannot be read back; name another folder in MEME_CACHE")
    return images


def _replace_folder(building: Path, entry: Path) -> None:
    shutil.rmtree(entry, ignore_errors=True)  # a broken one
    try:
        building.rename(entry)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # these say that another process was faster just now
            raise


def _read_entry(entry: Path, name: str, shape: tuple[int, int, int]) -> Images | None:
    """Return the images of a cache entry, with their pixels mapped from disk. Return None if it is missing or broken."""
    try:
        facts = json.loads((entry / "entry.json").read_text(encoding="utf-8"))
        count, classes = facts["count"], tuple(facts["classes"])
        pixels = np.load(entry / "pixels.npy", mmap_mode="r", allow_pickle=False)
        labels = np.load(entry / "labels.npy", allow_pickle=False) if classes else None
        skipped = tuple(Skipped(*each) for each in facts["skipped"])
        identity = facts["content_id"]
        origin = {key: facts[key] for key in ("source_side", "colour_share", "white")}
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None
    if (pixels.shape, pixels.dtype) != ((count, *shape), np.uint8):
        return None
    if labels is not None and (labels.shape, labels.dtype) != ((count,), np.int64):
        return None
    return Images(name, pixels, labels, classes, identity, skipped, **origin)


def _build(folder: Path, path: Path, layout: Layout, shape: tuple[int, int, int]) -> None:
    """Decode ``layout`` into ``folder``. It is decoded a second time where its 16-bit grey images turn out to use fewer
    bits."""
    found = _decoded(folder, layout, shape, FULL_WHITE)
    if not len(found.labels):
        first = found.skipped[0]
        bad = f"none of {len(found.skipped)} files in {printable(str(path))} could be read: {first.name} ({first.reason})"
        raise UserError(f"data: {bad}; {ALLOWED}")
    white = _white(max(origin.peak for origin in found.origins))
    if white != FULL_WHITE:
        found = _decoded(folder, layout, shape, white)
    with written_whole(folder / "labels.npy") as partial, partial.open("wb") as file:
        np.save(file, found.labels, allow_pickle=False)
    labels = found.labels if layout.classes else None
    facts = {
        "count": len(found.labels),
        "content_id": _content_id((len(found.labels), *shape), found.digest, labels, layout.classes),
        "classes": layout.classes,
        "skipped": found.skipped,
        "source_side": int(np.median([origin.side for origin in found.origins])),
        "colour_share": float(np.mean([origin.in_colour for origin in found.origins])),
        "white": white,
    }
    write_text(folder / "entry.json", json.dumps(facts))


def _white(peak: int) -> int:
    """Return the value of white in 16-bit grey images whose largest value is ``peak``: that of the fewest bits which hold it,
    at least 8."""
    return FULL_WHITE if peak == 0 else 2 ** max(8, peak.bit_length()) - 1


@dataclass(frozen=True)
class _Decoded:
    labels: np.ndarray  # int64 (N,)
    digest: bytes  # SHA-256 of the pixels
    skipped: list[Skipped]
    origins: list[Origin]  # of each file


def _decoded(folder: Path, layout: Layout, shape: tuple[int, int, int], white: int) -> _Decoded:
    """Decode ``layout``. Its pixels are written straight to ``folder``, since they may exceed the memory."""
    digest, labels, skipped, origins = hashlib.sha256(), [np.empty(0, np.int64)], list(layout.skipped), []
    with written_whole(folder / "pixels.npy") as partial, partial.open("wb") as file:
        _write_header(file, (0, *shape))
        for result in decode_all(layout, size=shape[-1], channels=shape[0], white=white):
            if isinstance(result, Skipped):
                skipped.append(result)
                continue
            contents = result.pixels.tobytes()
            digest.update(contents)
            file.write(contents)
            labels.append(result.labels)
            origins.append(result.origin)
        targets = np.concatenate(labels)
        file.seek(0)
        _write_header(file, (len(targets), *shape))
    return _Decoded(targets, digest.digest(), skipped, origins)


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    """Write the header of an .npy file. numpy pads it for the first axis to grow, so that a second header fits over the
    first."""
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
