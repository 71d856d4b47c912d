"""The bytes of one file to square uint8 images, whatever its format, mode, orientation and aspect ratio.

Shapes: ``K`` images of one file, ``C`` channels (1 grey, 3 RGB), ``H W`` space. A file that cannot be read raises
nearly any exception, as Pillow's readers do on damaged bytes; `why_unreadable` puts it into a few words.
"""

import io
import os
import threading
from contextlib import nullcontext
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 100_000_000
LARGE_PIXELS = 8_000_000  # images beyond it are not decoded side by side: a gigabyte each, out of 100 kB, adds up over threads
CIFAR_CLASSES = 10
CIFAR_SHAPE = (3, 32, 32)

# EPS would run a stranger's program in Ghostscript; the others are no pictures, or have no decoder in Pillow.
_REFUSED_FORMATS = {"EPS", "WMF", "BUFR", "FITS", "GRIB", "HDF5", "IPTC", "MPEG"}

GREY_MODES = {"1", "L", "LA", "La", "I", "F", "I;16", "I;16L", "I;16B", "I;16N"}

_ONE_AT_A_TIME = threading.Lock()


class UnreadableError(Exception):
    """A file that breaks one of our own rules; the message is the reason, in a few words."""


def is_image_name(name: str) -> bool:
    """Whether the extension is that of a format which Pillow decodes by itself."""
    return os.path.splitext(name)[1].lower() in _extensions()


class Origin(NamedTuple):
    """What an image was before it was converted."""

    width: int
    height: int
    mode: str
    """Pillow's."""

    @property
    def side(self) -> int:
        """Pixels of the shorter side."""
        return min(self.width, self.height)

    @property
    def in_colour(self) -> bool:
        return self.mode not in GREY_MODES


def decode_image(contents: bytes, size: int, channels: int) -> tuple[np.ndarray, Origin]:
    """An image file as uint8 (C, size, size), of an animation its first frame; and what it was."""
    with Image.open(io.BytesIO(contents), formats=_formats()) as image:
        if image.width * image.height > MAX_PIXELS:  # known from the header: nothing is decoded yet
            raise UnreadableError(f"more than {MAX_PIXELS // 10**6} megapixels")
        with _ONE_AT_A_TIME if image.width * image.height > LARGE_PIXELS else nullcontext():
            return square(image, size, channels), Origin(*image.size, image.mode)


def decode_cifar(contents: bytes, size: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """One of CIFAR-10's binary batches as images, uint8 (K, C, size, size), and labels, int64 (K,).

    A record is one label byte, then the red, green and blue plane of 32 x 32 bytes in row-major order.
    """
    record = 1 + int(np.prod(CIFAR_SHAPE))
    if len(contents) % record:
        raise UnreadableError(f"not a whole number of {record}-byte records")
    records = np.frombuffer(contents, np.uint8).reshape(-1, record)
    if records[:, 0].max() >= CIFAR_CLASSES:
        raise UnreadableError(f"labels beyond {CIFAR_CLASSES - 1}")
    planes = records[:, 1:].reshape(-1, *CIFAR_SHAPE)
    if (channels, size, size) != CIFAR_SHAPE:
        images = (Image.fromarray(np.ascontiguousarray(each.transpose(1, 2, 0))) for each in planes)
        planes = np.stack([square(image, size, channels) for image in images])
    return planes, records[:, 0].astype(np.int64)


def square(image: Image.Image, size: int, channels: int) -> np.ndarray:
    """Any Pillow image as uint8 (C, size, size): upright, on white where transparent, centre-cropped, antialiased.

    The centre square is cut out and resized (bicubic) in one go: the same as resizing the shorter side and cropping,
    without ever making a giant of a long thin strip.
    """
    image = _in_colours(ImageOps.exif_transpose(image), "L" if channels == 1 else "RGB")
    width, height = image.size
    if (width, height) != (size, size):
        side = min(width, height)
        # Whole source pixels: half a pixel's shift would blur an image that needs no resizing.
        left, top = (width - side) // 2, (height - side) // 2
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def why_unreadable(error: Exception) -> str:
    """The reason in a few words. It may quote the file, so it is not yet fit to print."""
    if isinstance(error, UnreadableError):
        return str(error)
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS // 10**6} megapixels"
    if "truncated" in str(error).lower():
        return "truncated"
    return f"damaged: {error}" if str(error) else f"damaged: {type(error).__name__}"


def _in_colours(image: Image.Image, mode: str) -> Image.Image:
    """``image`` in mode "L" or "RGB", transparent parts composited on white."""
    if image.mode == "F":
        raise UnreadableError("floating-point pixels, whose white is not defined")
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if mode == "L" and image.mode not in ("1", "L"):
        image = image.convert("RGB")  # not every mode can become grey directly
    return image.convert(mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    """A 16-bit grey image, which Pillow opens as "I;16" or "I", scaled to "L"; `convert` would clip all above 255."""
    wide = np.asarray(image).astype(np.float64).clip(0, 65535)
    return Image.fromarray(np.rint(wide / 257).astype(np.uint8))


@cache
def _extensions() -> dict[str, str]:
    """Extension (".png") to format ("PNG"); this also registers Pillow's readers, before threads could race to it."""
    known = Image.registered_extensions()
    return {end: name for end, name in known.items() if name in Image.OPEN and name not in _REFUSED_FORMATS}


@cache
def _formats() -> tuple[str, ...]:
    """Formats that may be opened, whatever the extension says: a PostScript file called a.png is not an image."""
    return tuple(sorted(set(_extensions().values()), key=lambda name: (name not in ("JPEG", "PNG"), name)))
