"""Survey a data set before anything is trained on it: sizes, modes, classes, unreadable files, and where to start."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from meme.config.presets import preset
from meme.data.images import LARGEST_ENLARGEMENT, existing, open_images
from meme.data.sources import Skipped, decode_all, open_layout
from meme.errors import printable, shell_command

_LOOK = 8  # pixels a side that images are decoded to: they are looked at, not kept
_NAMED = 20  # classes, or unreadable files, that a person is shown
_SPLITS = {"train", "test", "val", "valid", "validation", "dev"}
# Presets for images of one's own by the pixels a side they train at, largest first.
_BY_SIZE = (("ffhq-meme", 256), ("celeba64-meme", 64), ("cifar10-meme", 32))
SMALLEST = "thumbnails-meme"  # in colour: for small images, and for machines without a GPU


@dataclass(frozen=True)
class Spread:
    """The least, the median and the largest of some numbers of pixels."""

    least: int
    median: int
    largest: int

    @classmethod
    def of(cls, values: Sequence[int]) -> "Spread":
        """Return the spread of ``values``, which may not be empty."""
        return cls(int(np.min(values)), int(np.median(values)), int(np.max(values)))

    def __str__(self) -> str:
        return f"{self.least:,} / {self.median:,} / {self.largest:,} pixels (min / median / max)"


@dataclass(frozen=True)
class Survey:
    """The findings about a data set."""

    source: str
    images: int
    """Readable images."""
    shorter_side: Spread | None
    """Pixels of the shorter sides, as stored; None where no image can be read."""
    longer_side: Spread | None
    modes: dict[str, int]
    """Pillow's modes (RGB, L, RGBA, ...), most frequent first, with counts."""
    in_colour: int
    """Readable images with a pixel in colour, however they are stored."""
    classes: dict[str, int]
    """Class names in the order of their labels, with counts of readable images; empty without classes."""
    unreadable: tuple[Skipped, ...]
    linked: tuple[str, ...] = ()
    """Folders outside the source that its links lead to, where they are followed."""

    @property
    def colour_share(self) -> float:
        """Share of the readable images that are in colour."""
        return self.in_colour / self.images if self.images else 0.0

    @property
    def looks_split(self) -> bool:
        """Return whether the folders taken for classes are the splits of a data set."""
        return len(self.classes) > 0 and set(self.classes) <= _SPLITS


def survey(
    source: str, on_progress: Callable[[int, int], None] = lambda done, total: None, *, follow_links: bool = False
) -> Survey:
    """Decode every file of ``source`` once, as `meme.data.images.open_images` would, and return the findings. Nothing is kept.

    ``on_progress`` is called with the number of files done and the number of all files. Raises UserError if the source cannot
    be read.
    """
    if source == "digits":
        digits = open_images("digits", size=8, channels=1)
        spread, counts = Spread(8, 8, 8), np.bincount(digits.known_labels)
        return Survey(source, len(digits), spread, spread, {"L": len(digits)}, 0, _counted(digits.classes, counts), ())
    with open_layout(existing(source), follow_links=follow_links) as layout:
        skipped, modes = list(layout.skipped), Counter[str]()
        shorter, longer, in_colour = list[int](), list[int](), 0
        counts = np.zeros(max(1, len(layout.classes)), np.int64)
        for done, found in enumerate(decode_all(layout, size=_LOOK, channels=3), start=1):
            on_progress(done, len(layout.members))
            if isinstance(found, Skipped):
                skipped.append(found)
                continue
            modes[found.origin.mode] += len(found.labels)
            in_colour += len(found.labels) * found.origin.in_colour
            shorter.append(found.origin.side)
            longer.append(max(found.origin.width, found.origin.height))
            counts += np.bincount(found.labels, minlength=len(counts))
    return Survey(
        source,
        sum(modes.values()),
        Spread.of(shorter) if shorter else None,
        Spread.of(longer) if longer else None,
        dict(modes.most_common()),
        in_colour,
        _counted(layout.classes, counts),
        tuple(skipped),
        layout.linked,
    )


def _counted(classes: Sequence[str], counts: np.ndarray) -> dict[str, int]:
    return {name: int(count) for name, count in zip(classes, counts, strict=False)}


def suggested_preset(found: Survey) -> str | None:
    """Return the largest preset that enlarges no image; None where images are too small for any."""
    if found.shorter_side is None or found.shorter_side.median * LARGEST_ENLARGEMENT < preset("digits-meme").image.size:
        return None
    side = found.shorter_side.median
    if side >= 256 and len(found.classes) == 1000:
        return "imagenet-meme"
    if fitting := next((name for name, size in _BY_SIZE if side >= size), None):
        return fitting
    if side * LARGEST_ENLARGEMENT >= 32:
        return "cifar10-meme"
    return "digits-meme" if found.colour_share <= 0.5 else SMALLEST


def suggested_commands(found: Survey, *, gpu: bool = True) -> list[str]:
    """Return the commands to run first: a search, which begins small, then the training of the preset. Empty where no preset
    fits.

    Without a ``gpu`` the search is that of the smallest network for colour.
    """
    name, path = suggested_preset(found), shell_command([found.source])
    path += " --follow-links" if found.linked else ""
    if name is None or found.shorter_side is None:
        return []
    if found.source == "digits":
        return ["python run_search.py", "python -m meme train digits-meme"]
    stage = " --first-stage path/to/vq-f8" if name == "imagenet-meme" else ""  # which is not to be had from the hub
    train = f"python -m meme train {name} --data {path}{stage}"
    if name == "digits-meme":
        return [f"python run_search.py --data {path} --preset digits-meme", train]
    if found.shorter_side.median * LARGEST_ENLARGEMENT < preset(name).pixels.size:  # fewer pixels than any preset for colour
        return [f"python run_search.py --data {path} --preset {name} --image-size 8"]
    if name == SMALLEST or not gpu:
        return [f"python run_search.py --data {path} --preset {SMALLEST}", train]
    return [f"python run_search.py --data {path}", train]


def survey_lines(found: Survey, *, gpu: bool = True) -> list[tuple[str, str]]:
    """Return ``found`` as lines for a person: pairs of a label and its text, with names fit to print."""
    lines = [("images", f"{found.images:,} in {printable(found.source)}")]
    if found.shorter_side and found.longer_side:
        lines += [("shorter side", str(found.shorter_side)), ("longer side", str(found.longer_side))]
    lines.append(("modes", _listed(found.modes) or "none"))
    lines.append(("in colour", f"{found.in_colour:,} of {found.images:,}"))
    lines += [("links lead to", folder) for folder in found.linked]
    classes = f"{len(found.classes)}: {_listed(found.classes)}" if found.classes else "none (a folder for each class names them)"
    lines.append(("classes", classes))
    if found.looks_split:
        lines.append(("", "these look like the splits of one data set: give the folder of one of them"))
    lines.append(("unreadable", f"{len(found.unreadable):,} files" if found.unreadable else "none"))
    lines += [("", f"{each.name}: {each.reason}") for each in found.unreadable[:_NAMED]]
    if len(found.unreadable) > _NAMED:
        lines.append(("", f"and {len(found.unreadable) - _NAMED:,} more, which --json names"))
    lines.append(("preset", suggested_preset(found) or "none: the images are too small, or none can be read"))
    return lines + [("start with", command) for command in suggested_commands(found, gpu=gpu)]


def _listed(counts: dict[str, int]) -> str:
    """Return names with their counts, the first few where there are many."""
    shown = [f"{printable(name)} {count:,}" for name, count in list(counts.items())[:_NAMED]]
    return ", ".join(shown) + (f", and {len(counts) - _NAMED} more" if len(counts) > _NAMED else "")
