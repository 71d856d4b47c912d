"""Hypothesis strategies of broken and hostile files: configs, checkpoints, banks and data sources.

Most inputs are damaged good files, because random bytes would rarely pass the first check of any reader.
"""

import io
import json
import struct
import warnings
import zipfile
import zlib
from functools import cache
from typing import Any

import numpy as np
import yaml
from hypothesis import strategies as st
from PIL import Image

from meme.config.presets import preset

BYTES = st.binary(max_size=200)


def damaged(good: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Good files with bytes changed, removed, inserted or doubled, or truncated."""
    edit = st.tuples(st.floats(0, 1), st.integers(0, 40), st.one_of(st.binary(max_size=8), st.integers(0, 255), st.none()))
    return st.builds(_edited, good, st.lists(edit, min_size=1, max_size=6))


def _edited(content: bytes, edits: list) -> bytes:
    for place, length, new in edits:
        start = int(place * len(content))
        if new is None:
            content = content[:start]
        elif isinstance(new, int):
            content = content[:start] + bytes([new]) + content[start + 1 :]
        else:
            content = content[:start] + new + content[start + length :]
    return content


# Configs

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**63, 10**30, 10**4000, float("nan"), float("inf"), -0.0, 1e-320, 1e308]),
    st.floats(),
    st.text(max_size=12),
    st.dates(),
    st.binary(max_size=6),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=12,
)
# Hostile YAML: tags whose constructors fail, references, expansion, depth, vast numbers, odd names.
RAW = [
    "!!int ''",
    "!!int x",
    "!!float x",
    "!!bool perhaps",
    "!!timestamp never",
    "!!binary '*'",
    "!!null x",
    "!!set {a, b}",
    "!!omap [a: 1, a: 2]",
    "!!pairs [a]",
    "!!python/name:os.system",
    "!!python/object/apply:os.system ['true']",
    "!unknown x",
    "&a [*a]",
    "*nowhere",
    "{<<: 1}",
    "{<<: [1, 2]}",
    "{? [a, b] : 1}",
    "{? {a: b} : 1}",
    "0x" + "f" * 9_000,
    "9" * 5_000,
    "-" + "9" * 400,
    "1:59:59:59:59:59:59",
    "1e999",
    ".nan",
    "-.inf",
    '"\\ud800"',
    '"\\0"',
    '"a\\nerror: b"',
    '{"\\e[31m": 1}',
    "{" + "z" * 9_000 + ": 1}",
    "[" * 3_000,
    "{a: " * 2_000,
    "[" * 300 + "]" * 300,
    "[" + "1, " * 20_000 + "]",
    "%YAML 9.9",
    "--- b",
    "| \n x",
]
LAUGHS = "\n".join(
    [f"a0: &a0 [{', '.join(['lol'] * 9)}]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
)
MERGES = "\n".join(["a0: &a0 {x: 1}"] + [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 12)])


@cache
def _good_yaml(name: str) -> str:
    return preset(name).to_yaml()


GOOD_CONFIGS = st.sampled_from(["digits-meme", "digits-ldm-s", "ffhq-meme", "celeba64-meme", "imagenet-meme"]).map(_good_yaml)


@st.composite
def changed_configs(draw: st.DrawFn) -> bytes:
    """Good config with up to four values replaced, removed or added at any place."""
    tree = yaml.safe_load(draw(GOOD_CONFIGS))
    for _ in range(draw(st.integers(1, 4))):
        _change(draw, tree)
    return yaml.safe_dump(tree, allow_unicode=draw(st.booleans())).encode("utf-8", "surrogatepass")


def _change(draw: st.DrawFn, tree: Any) -> None:
    """Walk down ``tree`` at random and change one item there."""
    while True:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        if not keys:
            return
        key = draw(st.sampled_from(keys))
        if isinstance(tree[key], dict | list) and draw(st.integers(0, 3)):
            tree = tree[key]
            continue
        break
    action = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
    if action == "remove":
        del tree[key]
    elif action == "add" and isinstance(tree, dict):
        tree[draw(st.text(max_size=9))] = draw(VALUES)
    else:
        tree[key] = draw(VALUES)


@st.composite
def raw_configs(draw: st.DrawFn) -> bytes:
    """Good config in whose text one value is replaced by a construct of YAML."""
    lines = draw(GOOD_CONFIGS).splitlines()
    place = draw(st.integers(0, len(lines) - 1))
    lines[place] = lines[place].partition(":")[0] + ": " + draw(st.sampled_from(RAW))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


CONFIGS = st.one_of(
    changed_configs(),
    raw_configs(),
    damaged(GOOD_CONFIGS.map(str.encode)),
    VALUES.map(lambda value: yaml.safe_dump(value).encode("utf-8", "surrogatepass")),
    st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")),
    BYTES,
    st.sampled_from([LAUGHS, MERGES, *RAW]).map(str.encode),
)

# Checkpoints

DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "U16", "U32", "U64", "BOOL", "F8_E4M3", "F8_E5M2", "X"]
HEADERS = ["[" * 100_000, '{"a":' * 100_000, "9" * 5_000, "NaN", "[]", "null", "{}", '{"step": "x"}', "{", "\ud800", ""]


def parts(content: bytes) -> tuple[dict, bytes]:
    """Return header and data of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: dict, data: bytes, length: int | None = None) -> bytes:
    """Return a safetensors file of ``header`` and ``data``. If ``length`` is given, it is stated as the header's length."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


class Files(list):
    """File contents that hypothesis does not print."""

    def __repr__(self) -> str:
        return f"{len(self)} files"


@st.composite
def changed_checkpoints(draw: st.DrawFn, good: Files) -> bytes:
    """Good checkpoint with a changed header: its metadata of this program, or one of the tensors."""
    header, data = parts(good[draw(st.integers(0, len(good) - 1))])
    ours = json.loads(header["__metadata__"]["meme"])
    for _ in range(draw(st.integers(1, 3))):
        names = [name for name in header if name != "__metadata__"]
        if not names:
            break
        name = draw(st.sampled_from(names))
        action = draw(st.sampled_from(["dtype", "shape", "offsets", "remove", "rename", "ours", "odd"]))
        if action == "dtype":
            header[name] = header[name] | {"dtype": draw(st.sampled_from(DTYPES))}
        elif action == "shape":
            header[name] = header[name] | {"shape": draw(_shapes(header[name]["shape"]))}
        elif action == "offsets":
            header[name] = header[name] | {"data_offsets": draw(st.lists(st.integers(-1, 2**65), max_size=3))}
        elif action == "remove":
            del header[name]
        elif action == "rename":
            header[draw(st.text(max_size=6))] = header.pop(name)
        elif action == "ours":
            header["__metadata__"] = draw(_metadata(ours))
        else:
            header[name] = draw(st.one_of(st.none(), st.integers(), st.just([]), st.just({})))
            break
    return joined(header, data, draw(st.none() | st.integers(0, 2**64 - 1)) if draw(st.integers(0, 9)) == 0 else None)


def _shapes(shape: Any) -> st.SearchStrategy:
    same_count = [list(reversed(shape)), [*shape, 1], [int(np.prod(shape))]] if isinstance(shape, list) else [[]]
    return st.sampled_from(same_count) | st.lists(st.integers(0, 2**63), max_size=4)


def _metadata(ours: dict) -> st.SearchStrategy:
    """Metadata of this program with another step, or as text that is no JSON mapping."""
    steps = st.one_of(st.integers(), st.floats(), st.text(max_size=3), st.none(), st.booleans(), st.just([]))
    stepped = steps.map(lambda step: {"meme": json.dumps(ours | {"step": step})})
    return st.one_of(stepped, st.sampled_from(HEADERS).map(lambda text: {"meme": text}), st.just({}), st.none(), st.integers())


def checkpoints(good: Files) -> st.SearchStrategy[bytes]:
    """Damaged forms of ``good`` checkpoints, and content that is no checkpoint."""
    whole, changed = st.integers(0, len(good) - 1).map(good.__getitem__), changed_checkpoints(good)
    return st.one_of(changed, changed, damaged(whole), damaged(changed), BYTES, whole)


# Banks


def bank_files(good: dict[str, bytes]) -> st.SearchStrategy[tuple[str, bytes]]:
    """Name of one of the files of a bank in ``good``, with damaged or hostile content."""
    texts = {name: st.one_of(damaged(st.just(good[name])), _records(good[name]), BYTES) for name in ("label", "record")}
    weights = st.one_of(checkpoints(Files([good["weights"]])), BYTES)
    return st.one_of(*(st.tuples(st.just(name), content) for name, content in (texts | {"weights": weights}).items()))


def _records(good: bytes) -> st.SearchStrategy[bytes]:
    """JSON with a value of another type, up to two mappings deep, or with nesting beyond any stack."""
    content = json.loads(good)
    deep = st.just(b"[" * 100_000)
    return st.builds(_with_value, st.just(content), st.integers(0, 99), st.one_of(VALUES, st.just("../../elsewhere"))) | deep


def _with_value(content: dict, place: int, value: Any) -> bytes:
    changed = json.loads(json.dumps(content))
    inner = next((each for each in changed.values() if isinstance(each, dict)), changed)
    inner[sorted(inner)[place % len(inner)]] = value
    return json.dumps(changed, default=str).encode(errors="surrogatepass")


# Images and their containers

FORMATS = [
    "PNG",
    "JPEG",
    "GIF",
    "BMP",
    "TIFF",
    "WEBP",
    "PPM",
    "TGA",
    "PCX",
    "ICO",
    "ICNS",
    "JPEG2000",
    "DDS",
    "SGI",
    "QOI",
    "MSP",
]
FORMATS += ["MSP", "AVIF", "IM", "SPIDER", "XBM", "MPO", "BLP", "PDF", "EPS"]
ENDINGS = [
    "png",
    "jpg",
    "gif",
    "bmp",
    "tif",
    "webp",
    "ppm",
    "tga",
    "pcx",
    "ico",
    "icns",
    "jp2",
    "dds",
    "sgi",
    "qoi",
    "avif",
    "psd",
]
ENDINGS += ["psd", "PNG", "fli", "xpm", "cur", "eps", "bin", "txt"]
NAMES = st.one_of(
    st.sampled_from([f"a.{end}" for end in ENDINGS]),
    st.sampled_from(["../up.png", "/root.png", "C:\\disk.png", "a/../../b.png", "x\nerror: y.png", "\x1b[31m.png", ".png", "a/"]),
    st.sampled_from(["data_batch_1.bin", "batches.meta.txt", "data_batch_1", "cat/a.png", "dog/b.png", "é/\u202e.png"]),
    st.text(max_size=12).map(lambda text: f"{text}.png"),
)


def png_of_size(width: int, height: int, kind: int = 2) -> bytes:
    """Return a PNG of some 60 bytes whose header states this size."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@cache
def good_images() -> list[bytes]:
    """Return a small image in every format and mode that Pillow writes."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 10, 4), dtype=np.uint8)
    found = []
    for kind in FORMATS:
        for mode in ("RGB", "RGBA", "L", "P", "1", "I;16", "I", "CMYK", "F"):
            buffer = io.BytesIO()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    Image.fromarray(noise).convert(mode).save(buffer, kind)
            except Exception:  # no such mode in this format, or no such format in this Pillow
                continue
            found.append(buffer.getvalue())
    return found


def cifar_batch(count: int) -> bytes:
    """Return ``count`` records of CIFAR-10's binary version."""
    records = np.random.default_rng(0).integers(0, 256, (count, 3073), dtype=np.uint8)
    records[:, 0] %= 10
    return records.tobytes()


IMAGES = st.deferred(lambda: st.sampled_from(good_images()))
IMAGE_FILES = st.one_of(
    damaged(IMAGES),
    damaged(IMAGES),
    IMAGES,
    st.builds(png_of_size, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 6)),
    damaged(st.integers(0, 3).map(cifar_batch)),
    st.just(b"a b c d e f g h i j"),
    BYTES,
)
FOLDERS = st.dictionaries(NAMES, IMAGE_FILES, max_size=3)

# EXIF: any metadata beside intact pixels

ENTRY = st.builds(
    lambda tag, kind, count, value: struct.pack("<HHI", tag, kind, count) + value,
    st.sampled_from([0x112, 0x112, 0x10F, 0x11A, 0x11B, 0x128, 0x132, 0x8769, 0x8825, 0xA005, 0x9000, 0x927C, 0x2BC])
    | st.integers(0, 65535),
    st.integers(0, 14),
    st.sampled_from([0, 1, 1, 1, 2, 3, 4, 5, 1000, 2**32 - 1]),
    st.binary(min_size=4, max_size=4) | st.integers(0, 9).map(lambda value: struct.pack("<HH", value, 0)),
)
EXIF_BODIES = st.builds(
    lambda entries, after: b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + bytes(4) + after,
    st.lists(ENTRY, max_size=6),
    st.binary(max_size=40),
)
EXIF_SEGMENTS = st.one_of(EXIF_BODIES, damaged(EXIF_BODIES), BYTES).map(lambda body: b"Exif\0\0" + body)


@cache
def _plain_jpeg() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (10, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


def jpeg_with_exif(segment: bytes) -> bytes:
    """Return a whole JPEG of 8 x 10 pixels with this APP1 segment."""
    plain = _plain_jpeg()
    return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + plain[2:]


# Listings: files of other programs beside images, and links

ODD_NAMES = st.one_of(
    NAMES,
    st.sampled_from(["IMG.HEIC", "a.nef", "a.jxl", "scan.0001", "image", "Thumbs.db", "@eaDir/a.png/T.jpg", "#recycle/a.png"]),
    st.sampled_from(
        ["a[/b].jpg", "[red].png", ".movie.mkv.part", "~", "~root/a.png", "caf\udce9.png", "caf\udce9/a.png", "-a.png"]
    ),
)
LINKS = st.sampled_from(["..", ".", "a.png", "/", "/dev/null", "/proc/self/fd", "nowhere", "loop.png", "../outside", "\udcff"])
LISTINGS = st.tuples(st.dictionaries(ODD_NAMES, IMAGE_FILES | LINKS, max_size=5), st.booleans())

# Environments: values of variables, and words of a command line

ODD_PATHS = st.one_of(
    st.sampled_from(
        ["", ".", "cache", "~", "~/x", "~nobody-here/x", "off", "/dev/null", "/proc/x", "a" * 300, "/" + "a" * 90, "caf\udce9"]
    ),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20),
)
VARIABLES = ("MEME_CACHE", "MEME_INCEPTION", "MEME_INCEPTION_SHA256", "HOME", "TMPDIR", "RAY_TMPDIR", "XDG_CACHE_HOME")
ENVIRONMENTS = st.tuples(st.dictionaries(st.sampled_from(VARIABLES), ODD_PATHS), st.lists(ODD_PATHS, max_size=4))


@st.composite
def zips(draw: st.DrawFn) -> bytes:
    """Zip of image files whose members state a wrong size, type or compression."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as archive:
        warnings.simplefilter("ignore")  # about duplicate names
        for name, content in draw(FOLDERS).items():
            try:
                info = zipfile.ZipInfo(name.replace("\0", ""))
                info.external_attr = draw(st.sampled_from([0, 0, 0o120777 << 16]))
                method = draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]))
                archive.writestr(info, content, compress_type=method)
            except ValueError:  # a name that cannot be encoded as UTF-8
                continue
    return buffer.getvalue()


ZIPS = st.one_of(zips(), damaged(zips()), BYTES.map(lambda tail: b"PK\x05\x06" + tail))
