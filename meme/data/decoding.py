"""The bytes of one file to square uint8 images, whatever its format, mode, orientation and aspect ratio.

Shapes: ``K`` images of one file, ``C`` channels (1 grey, 3 RGB), ``H W`` space. A file that cannot be read raises
nearly any exception, as Pillow's readers do on damaged bytes; `why_unreadable` puts it into a few words.
"""

import io
import os
import re
import threading
from contextlib import nullcontext, suppress
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageChops, ImageOps, TiffImagePlugin, UnidentifiedImageError

MAX_PIXELS = 100_000_000
_MOST_BYTES_A_PIXEL = 16  # of what Pillow decodes, with a copy of it
LARGE_PIXELS = 8_000_000  # images beyond it are not decoded side by side: a gigabyte each, out of 100 kB, adds up over threads
CIFAR_CLASSES = 10
CIFAR_SHAPE = (3, 32, 32)

# EPS would run a stranger's program in Ghostscript; the others are no pictures, or have no decoder in Pillow.
_REFUSED_FORMATS = {"EPS", "WMF", "BUFR", "FITS", "GRIB", "HDF5", "IPTC", "MPEG"}

FULL_WHITE = 65_535  # of 16-bit grey pixels, unless the data set uses only some of their bits
GREY_TOLERANCE = 4  # on the scale to 255: a lossy format lets the channels of a grey image differ by up to this much
HEAD_BYTES = 16  # of a file, which tell its format

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_RAW = "a camera's raw format, which is not read: export it as PNG or JPEG"
_RAW_ENDS = "cr2 cr3 crw nef nrw arw srf sr2 dng raf orf ori rw2 rwl raw pef ptx srw x3f erf kdc dcr mrw mef mos iiq 3fr fff gpr"
_CONVERT = "which is not read: convert it to PNG or JPEG"
_HEIF = "which needs the package pillow-heif: pip install 'meme-nas[heif]'"
# Extensions of pictures that Pillow does not decode by itself, with what to do about them.
_FOREIGN = {
    **dict.fromkeys((".heic", ".heif", ".heics", ".heifs", ".hif"), f"HEIC, {_HEIF}"),
    **dict.fromkeys((".avif", ".avifs"), f"AVIF, {_CONVERT}"),  # a Pillow without libavif
    **dict.fromkeys((f".{end}" for end in _RAW_ENDS.split()), _RAW),
    ".jxl": f"JPEG XL, {_CONVERT}",
    ".exr": f"OpenEXR, {_CONVERT}",
    ".hdr": f"Radiance HDR, {_CONVERT}",
    **dict.fromkeys((".jxr", ".wdp", ".hdp"), f"JPEG XR, {_CONVERT}"),
    ".bpg": f"BPG, {_CONVERT}",
    ".djvu": f"DjVu, {_CONVERT}",
    **dict.fromkeys((".dcm", ".dicom"), f"DICOM, {_CONVERT}"),
    **dict.fromkeys((".fit", ".fits"), f"FITS, {_CONVERT}"),
    **dict.fromkeys((".svg", ".svgz"), f"SVG, {_CONVERT}"),
    **dict.fromkeys((".eps", ".wmf", ".emf"), f"a drawing, {_CONVERT}"),
    ".xcf": f"GIMP's format, {_CONVERT}",
    ".kra": f"Krita's format, {_CONVERT}",
    ".psb": f"Photoshop's format for large documents, {_CONVERT}",
}
# How files begin that are pictures, with an extension that says of which kind; .png stands for all that Pillow decodes.
_MAGIC = {
    **dict.fromkeys((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a"), ".png"),
    **dict.fromkeys((b"8BPS\0\1", b"qoif", b"DDS |", b"icns\0"), ".png"),
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), ".png"),  # TIFF, and that of more than 4 GiB
    **dict.fromkeys((b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"), ".png"),  # JPEG 2000, with and without its container
    **dict.fromkeys((b"\0\0\0\x0cJXL ", b"\xff\x0a"), ".jxl"),
    b"\x76\x2f\x31\x01": ".exr",
    b"#?RADIANCE": ".hdr",
    b"gimp xcf ": ".xcf",
    b"8BPS\0\2": ".psb",
    b"FUJIFILMCCD-RAW": ".raf",
    b"II\xbc\x01": ".jxr",
    b"BPG\xfb": ".bpg",
}
_BRANDS = {
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"), ".heic"),
    **dict.fromkeys((b"avif", b"avis"), ".avif"),
    b"crx ": ".cr3",
}
_NETPBM = re.compile(rb"P[1-6]\s+(#|\d+\s)")  # then a comment, or width and height

_ONE_AT_A_TIME = threading.Lock()


class UnreadableError(Exception):
    """A file that breaks one of our own rules; the message is the reason, in a few words."""


def is_image_name(name: str) -> bool:
    """Return whether the extension belongs to a format that Pillow decodes by itself."""
    return os.path.splitext(name)[1].lower() in _extensions()


def has_extension(name: str) -> bool:
    """Return whether the name says what kind of file it is. A number at its end, as in scan.0001, is no extension."""
    return os.path.splitext(name)[1].strip(".0123456789") != ""


def why_foreign(name: str) -> str | None:
    """Return why a picture with this extension cannot be read here, and what to do. Return None for other files."""
    end = os.path.splitext(name)[1].lower()
    return None if end in _extensions() else _FOREIGN.get(end)


def extension_of(head: bytes) -> str | None:
    """Return the extension of the picture format whose files begin with ``head``, HEAD_BYTES long. Return None where it is no
    picture."""
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12])
    is_bitmap = head[:2] == b"BM" and head[6:10] == bytes(4)
    is_webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    if is_bitmap or is_webp or _NETPBM.match(head):
        return ".png"
    return next((end for begin, end in _MAGIC.items() if head.startswith(begin)), None)


class Origin(NamedTuple):
    """Properties of an image before it was converted."""

    width: int
    height: int
    mode: str
    """Pillow's name of the mode."""
    in_colour: bool
    """True if any pixel is in colour; a grey image may be stored as RGB."""
    peak: int = 0
    """Largest value of grey pixels of more than 8 bits; 0 for other images."""

    @property
    def side(self) -> int:
        """Pixels of the shorter side."""
        return min(self.width, self.height)


def decode_image(contents: bytes, size: int, channels: int, white: int = FULL_WHITE) -> tuple[np.ndarray, Origin]:
    """Decode an image file to uint8 (C, size, size), an animation to its first frame. Also return its properties before
    conversion.

    ``white`` is the value of white in grey pixels of more than 8 bits.
    """
    with Image.open(io.BytesIO(contents), formats=_formats()) as image:
        if image.width * image.height > MAX_PIXELS:  # known from the header: nothing is decoded yet
            raise UnreadableError(f"more than {MAX_PIXELS // 10**6} megapixels")
        with _ONE_AT_A_TIME if image.width * image.height > LARGE_PIXELS else nullcontext():
            _load(image)
            turned = _upright(image)
            plain = _opaque(turned, white, is_negative=_is_wide(image) and _is_white_zero(image))
            peak = int(np.asarray(turned).max()) if _is_wide(turned) else 0
            origin = Origin(*turned.size, image.mode, plain.mode == "RGB" and _has_colour(plain), peak)
            return _cropped(plain, size, channels), origin


def decode_cifar(contents: bytes, size: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Decode one of CIFAR-10's binary batches to images, uint8 (K, C, size, size), and labels, int64 (K,).

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
    """Convert any Pillow image to uint8 (C, size, size): upright, on white where transparent, centre-cropped, antialiased.

    The centre square is cut out and resized (bicubic) in one go: the same as resizing the shorter side and cropping,
    without ever making a giant of a long thin strip.
    """
    return _cropped(_opaque(_upright(image), FULL_WHITE), size, channels)


def _cropped(image: Image.Image, size: int, channels: int) -> np.ndarray:
    image = image.convert("L" if channels == 1 else "RGB")
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
    """Return the reason in a few words. It may quote the file, so it is not yet fit to print."""
    if isinstance(error, UnreadableError):
        return str(error)
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS // 10**6} megapixels"
    if "truncated" in str(error).lower():
        return "truncated"
    return f"damaged: {error}" if str(error) else f"damaged: {type(error).__name__}"


def _load(image: Image.Image) -> None:
    """Decode ``image``. Where Pillow runs out of memory although there is enough for the pixels, the file is damaged."""
    try:
        image.load()
    except MemoryError:
        bytearray(_MOST_BYTES_A_PIXEL * image.width * image.height)  # or MemoryError again
        raise UnreadableError("damaged: asks for more memory than its pixels take") from None


def _upright(image: Image.Image) -> Image.Image:
    """Turn ``image`` as its EXIF orientation says. Nothing else in EXIF is read, since cameras write odd things there."""
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow's reader raises nearly anything on EXIF that is damaged, beside pixels that are not
        return 1
    if isinstance(found, tuple) and found:
        found = found[0]
    return found if isinstance(found, int) else 1


def _opaque(image: Image.Image, white: int, *, is_negative: bool = False) -> Image.Image:
    """Convert ``image`` to mode "1", "L" or "RGB", with transparent parts composited on white."""
    if image.mode == "F":
        raise UnreadableError("floating-point pixels, whose white is not defined")
    if _is_wide(image):
        image = ImageOps.invert(_eight_bits(image, white)) if is_negative else _eight_bits(image, white)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode in ("1", "L") else image.convert("RGB")  # not every mode can become grey directly


def _is_wide(image: Image.Image) -> bool:
    """Return whether the image is grey in more than 8 bits."""
    return image.mode == "I" or image.mode.startswith("I;16")


def _is_white_zero(image: Image.Image) -> bool:
    """Return whether the image is a TIFF in which 0 means white. Pillow inverts only those of 8 bits."""
    return isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0


def _eight_bits(image: Image.Image, white: int) -> Image.Image:
    """Scale a 16-bit grey image, which Pillow opens as "I;16" or "I", to "L" or "LA"; `convert` would clip all values above
    255."""
    wide = np.asarray(image).astype(np.float64)
    if wide.min() < 0 or wide.max() > FULL_WHITE:
        raise UnreadableError(f"32-bit pixels outside 0 to {FULL_WHITE:,}, whose white is not defined")
    grey = np.rint(wide.clip(0, white) / (white / 255)).astype(np.uint8)
    transparent = image.info.get("transparency")
    if transparent is None:
        return Image.fromarray(grey)
    return Image.fromarray(np.stack([grey, np.where(wide == transparent, 0, 255).astype(np.uint8)], axis=-1))


def _has_colour(image: Image.Image) -> bool:
    """Return whether the channels of an RGB image differ anywhere. A small copy is tried first, since most photos show it
    there."""
    small = image.reduce(8) if min(image.size) >= 64 else image
    return _channels_differ(small) or (small is not image and _channels_differ(image))


def _channels_differ(image: Image.Image) -> bool:
    red, green, blue = image.split()
    pairs = ((red, green), (green, blue), (blue, red))
    return any(np.asarray(ImageChops.difference(*pair)).max() > GREY_TOLERANCE for pair in pairs)


@cache
def _extensions() -> dict[str, str]:
    """Map extensions (".png") to formats ("PNG"). The call also registers Pillow's readers, before threads could race to it."""
    with suppress(ImportError):  # an extra: meme-nas[heif]
        from pillow_heif import register_heif_opener

        register_heif_opener()
    known = Image.registered_extensions()
    return {end: name for end, name in known.items() if name in Image.OPEN and name not in _REFUSED_FORMATS}


@cache
def _formats() -> tuple[str, ...]:
    """Return the formats that may be opened, whatever the extension says: a PostScript file called a.png is not an image."""
    return tuple(sorted(set(_extensions().values()), key=lambda name: (name not in ("JPEG", "PNG"), name)))
