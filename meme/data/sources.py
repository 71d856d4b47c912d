"""Readers of image sources: a folder or a zip becomes a sorted list of files with classes, and is decoded in order.

Nothing is unpickled or unpacked to disk, and no bad file stops the others: it is `Skipped`, with a reason.
"""

import os
import re
import stat
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from meme.data.decoding import (
    CIFAR_CLASSES,
    CIFAR_SHAPE,
    FULL_WHITE,
    HEAD_BYTES,
    Origin,
    UnreadableError,
    decode_cifar,
    decode_image,
    extension_of,
    has_extension,
    is_image_name,
    why_foreign,
    why_unreadable,
)
from meme.data.huggingface import is_dataset, open_rows
from meme.errors import UserError, printable
from meme.support.files import stamp_of

MAX_FILE_BYTES = 512 * 2**20
ALLOWED = (
    "give 'digits', a folder of images, a zip of images, the folder of CIFAR-10's binary version, or a dataset of Hugging Face"
)
# A zip's member may unpack to this number of bytes, or this multiple of its size in the zip. A white BMP is packed 1,000 times.
UNPACKED_BYTES, UNPACKED_TIMES = 16 * 2**20, 200

_CIFAR_BATCH = re.compile(r"data_batch_\d+\.bin")
_CIFAR_PICKLE = re.compile(r"data_batch_\d+")
_CIFAR_NAMES = "batches.meta.txt"
_CIFAR_NAMES_BYTES = 10_000
# Folders that systems, network drives and synchronisers leave among pictures: thumbnails, bins and snapshots, not the user's.
_LEFT_BY_OTHERS = (
    r"__MACOSX|@eaDir|@__thumb|@tmp|@sharebin|@Recycle|@Recently-Snapshot|@SynoResource|#recycle|#snapshot|~snapshot"
    r"|\$RECYCLE\.BIN|RECYCLER|RECYCLED|FOUND\.\d{3}|System Volume Information|lost\+found|_vti_cnf|_gsdata_"
    r"|Network Trash Folder|Temporary Items|TheVolumeSettingsFolder"
)
# Those, and hidden files as .git and ._photo.jpg; "." and ".." are not.
_HIDDEN = re.compile(rf"(^|/)((?i:{_LEFT_BY_OTHERS})(/|$)|\.(?!\.?(/|$)))")
# Below this mean size, threads only contend for Python's lock: 5,000 CIFAR JPEGs take 0.7 s in one, 1.4 s in two.
_THREADS_FROM_BYTES = 8 * 2**10
_WINDOW = 128  # files decoded ahead of the reader, so that memory stays bounded


class Skipped(NamedTuple):
    """A file that could not be read: its name inside the source, and the reason in a few words. Both are fit to print."""

    name: str
    reason: str


@dataclass(frozen=True)
class Member:
    """One file of a source."""

    name: str  # path inside the source, "/" between the parts
    size: int  # bytes
    stamp: str  # changes when the contents do: the file's times in ns and inode, or the zip's date and CRC
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Layout:
    """The contents of a source, listed without decoding anything."""

    members: tuple[Member, ...]  # to be decoded, in this order
    skipped: tuple[Skipped, ...]  # refused before being opened
    classes: tuple[str, ...]  # class names, label 0 first; empty without labels
    labels: dict[str, int] | None  # an image's label by its name; None for CIFAR-10's batches, which hold their own
    linked: tuple[str, ...] = ()  # folders outside the source that its links lead to, where they are followed


class Block(NamedTuple):
    """The images of one file: one, or 10,000 for CIFAR-10's batches."""

    pixels: np.ndarray  # uint8 (K, C, H, W)
    labels: np.ndarray  # int64 (K,), zeros where the source has no classes
    origin: Origin  # of all of them


@contextmanager
def open_layout(path: Path, *, follow_links: bool = False) -> Iterator[Layout]:
    """Open the layout of a folder, zip or dataset of Hugging Face. Its members can be read until the context ends.

    Hidden files, and folders that systems leave among pictures, are passed over. Links that lead out of a folder, and linked
    folders, are refused one by one unless ``follow_links``. Raises UserError if ``path`` is none of these, or holds no image.
    """
    shown = printable(str(path))
    if path.is_dir():
        walk = _Walk(path, follow_links)
        listed = list(walk.files())
        has_images = any(is_image_name(each.name) or _is_image(each) for each in listed)
        layout = _layout(listed, shown) if has_images or not is_dataset(path) else _dataset_layout(path, shown)
        yield replace(layout, linked=tuple(sorted(walk.linked)))
        return
    if is_dataset(path):
        yield _dataset_layout(path, shown)
        return
    if not path.is_file() or not zipfile.is_zipfile(path):
        kind = "not a whole zip file" if path.suffix.lower() == ".zip" else "neither a folder nor a zip"
        raise UserError(f"data: {shown} is {kind}; {ALLOWED}")
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise UserError(f"data: {shown} is not a readable zip ({printable(str(error))}); {ALLOWED}") from error
    with archive:
        yield _layout(list(_list_zip(archive)), shown)


def decode_all(layout: Layout, size: int, channels: int, white: int = FULL_WHITE) -> Iterator[Block | Skipped]:
    """Decode every member of ``layout`` in order, to ``size`` x ``size`` images with 1 (grey) or 3 (RGB) channels.

    ``white`` is the value of white in grey pixels of more than 8 bits. Raises UserError where the machine, not the file, is at
    fault: permission, a failing disk, a file that vanished.
    """
    members = layout.members
    decode = partial(_decode_or_skip, labels=layout.labels, size=size, channels=channels, white=white)
    threaded = sum(member.size for member in members) >= _THREADS_FROM_BYTES * len(members)
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("ignore")  # Pillow's remarks on odd files; what matters is an error, or checked here
        for start in range(0, len(members), _WINDOW):
            window = members[start : start + _WINDOW]
            yield from pool.map(decode, window) if threaded else map(decode, window)


def _decode_or_skip(member: Member, labels: dict[str, int] | None, size: int, channels: int, white: int) -> Block | Skipped:
    name = printable(member.name)
    try:
        return _decode(member, labels, size, channels, white)
    except MemoryError as error:
        raise UserError(f"data: there is not enough memory to decode {name}") from error
    except Exception as error:  # Pillow's and zipfile's readers raise nearly anything on damaged bytes
        if isinstance(error, OSError) and error.errno is not None:
            # Not the file's fault, so to be repaired rather than remembered in the cache as unreadable.
            raise UserError(f"data: cannot read {name}: {error.strerror}") from error
        return Skipped(name, printable(why_unreadable(error)))


def _decode(member: Member, labels: dict[str, int] | None, size: int, channels: int, white: int) -> Block:
    if member.size > MAX_FILE_BYTES:
        raise UnreadableError(f"larger than {MAX_FILE_BYTES // 2**20} MiB")
    if member.size == 0:
        raise UnreadableError("empty")
    contents = member.read()
    if labels is None:
        return Block(*decode_cifar(contents, size, channels), Origin(*CIFAR_SHAPE[1:], "RGB", in_colour=True))
    pixels, origin = decode_image(contents, size, channels, white)
    return Block(pixels[None], np.array([labels.get(member.name, 0)], np.int64), origin)


class _Walk:
    """The files of a folder, and the places that its links lead to."""

    def __init__(self, root: Path, follow_links: bool):
        self._root, self._follow_links = root, follow_links
        self._seen: set[str] = set()  # real paths of folders, as links may lead in a circle
        self.linked: set[str] = set()
        """Folders outside the root that links lead to, fit to print; empty where links are not followed."""

    def files(self) -> Iterator[Member | Skipped]:
        for folder, subfolders, files in os.walk(self._root, onerror=_refuse, followlinks=self._follow_links):
            inside = Path(folder).relative_to(self._root)
            self._seen.add(os.path.realpath(folder))
            for name in list(subfolders):
                relative = (inside / name).as_posix()
                if _HIDDEN.search(relative):
                    subfolders.remove(name)
                elif os.path.islink(os.path.join(folder, name)) and (reason := self._why_not(os.path.join(folder, name))):
                    subfolders.remove(name)
                    yield Skipped(printable(relative), reason)
            for name in files:
                if found := self._file(Path(folder, name), (inside / name).as_posix()):
                    yield found

    def _why_not(self, folder: str) -> str | None:
        """Return why a linked folder is not entered, or None where it is."""
        if not self._follow_links:
            return "a linked folder, which only --follow-links enters"
        target = os.path.realpath(folder)
        if target in self._seen:
            return "a linked folder that was listed before"
        self._note(target)
        return None

    def _note(self, target: str) -> None:
        if not Path(target).is_relative_to(self._root):
            self.linked.add(printable(target))

    def _file(self, path: Path, name: str) -> Member | Skipped | None:
        """Return a file as a member of the source, or as skipped with the reason. Return None for anything but a picture."""
        if _HIDDEN.search(name):
            return None
        if reason := why_foreign(name):
            return Skipped(printable(name), reason)
        if _is_named_image(name):
            return self._checked(path, name)
        if has_extension(name):
            return None
        found = self._checked(path, name)
        return _by_content(found, partial(_head, path)) if isinstance(found, Member) else None

    def _checked(self, path: Path, name: str) -> Member | Skipped:
        if path.is_symlink() and not (target := Path(os.path.realpath(path))).is_relative_to(self._root):
            if not self._follow_links:
                return Skipped(printable(name), "a link out of the folder, which only --follow-links follows")
            self._note(str(target.parent))
        try:
            facts = path.stat()
        except OSError:
            return Skipped(printable(name), "a broken link")
        if not stat.S_ISREG(facts.st_mode):  # reading a pipe would wait for ever
            return Skipped(printable(name), "not a regular file")
        return Member(name, facts.st_size, stamp_of(facts), path.read_bytes)


def _refuse(error: OSError) -> None:
    raise UserError(f"data: cannot list {printable(str(error.filename))}: {error.strerror}") from error


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


def _by_content(member: Member, head: Callable[[], bytes]) -> Member | Skipped | None:
    """Return a file whose name says nothing as a member, if it begins as a picture does, or as skipped where that kind of
    picture cannot be read."""
    try:
        end = extension_of(head())
    except Exception:  # of the file system, or a damaged zip: nothing says that it is a picture
        return None
    if end is None:
        return None
    reason = why_foreign(f"a{end}")
    return Skipped(printable(member.name), reason) if reason else member


def _list_zip(archive: zipfile.ZipFile) -> Iterator[Member | Skipped]:
    for info in {info.filename: info for info in archive.infolist()}.values():  # of two with one name, the later counts
        name = info.filename.replace("\\", "/")  # some Windows tools write backslashes
        if name.endswith("/") or _HIDDEN.search(name):
            continue
        is_named = _is_named_image(name)
        if not (is_named or why_foreign(name)) and has_extension(name):
            continue
        if reason := _zip_refusal(info, name) or why_foreign(name):
            if is_named or why_foreign(name):
                yield Skipped(printable(name), reason)
            continue
        member = Member(name, info.file_size, f"{info.date_time} {info.CRC:08x}", partial(_unpacked, archive, info))
        if found := member if is_named else _by_content(member, partial(_unpacked_head, archive, info)):
            yield found


def _zip_refusal(info: zipfile.ZipInfo, name: str) -> str | None:
    """Return why a zip's member is not to be trusted, or None."""
    if name.startswith("/") or name[1:2] == ":":
        return "an absolute path"
    if ".." in name.split("/"):
        return "a path out of the zip"
    if stat.S_ISLNK(info.external_attr >> 16):
        return "a link"
    if info.flag_bits & 1:
        return "encrypted"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others unpack without a limit, see _unpacked
        return "compressed in another way than deflate"
    if info.file_size > max(UNPACKED_BYTES, UNPACKED_TIMES * info.compress_size):
        return f"a zip bomb: {info.file_size} bytes out of {info.compress_size}"
    return None


def _unpacked(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Return a member's bytes. ``read`` without a number would unpack everything, even where the zip claims a smaller size."""
    with archive.open(info) as file:
        return file.read(info.file_size)


def _unpacked_head(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    with archive.open(info) as file:
        return file.read(HEAD_BYTES)


def is_passed_over(name: str) -> bool:
    """Return whether a path inside a source is hidden, or in a folder that systems leave among pictures."""
    return bool(_HIDDEN.search(name))


def _is_named_image(name: str) -> bool:
    """Return whether the name is that of an image or of one of CIFAR-10's files."""
    return is_image_name(name) or _is_cifar(name)


def _is_cifar(name: str) -> bool:
    last = name.rpartition("/")[2]
    return bool(_CIFAR_PICKLE.match(last)) or last == _CIFAR_NAMES


def _is_image(found: Member | Skipped) -> bool:
    return isinstance(found, Member) and (is_image_name(found.name) or not _is_cifar(found.name))


def _layout(listed: Sequence[Member | Skipped], shown: str) -> Layout:
    """Return the layout of the images if there are any, else of CIFAR-10's batches. ``shown`` is the source's name in
    messages."""
    members = sorted((each for each in listed if isinstance(each, Member)), key=lambda member: member.name.split("/"))
    skipped = tuple(sorted(each for each in listed if isinstance(each, Skipped)))
    if images := tuple(member for member in members if _is_image(member)):
        return Layout(images, skipped, *_class_folders([member.name for member in images]))
    batches = {member.name.rpartition("/")[2]: member for member in members}
    if wanted := tuple(member for last, member in batches.items() if _CIFAR_BATCH.fullmatch(last)):
        return Layout(wanted, skipped, _cifar_classes(batches.get(_CIFAR_NAMES), shown), None)
    if any(_CIFAR_PICKLE.fullmatch(last) for last in batches):
        advice = "take the binary version, cifar-10-binary.tar.gz, unpacked"
        raise UserError(f"data: {shown} is CIFAR-10's Python version, which is never unpickled; {advice}")
    if skipped:
        raise UserError(f"data: {shown} has no readable image: {skipped[0].name} is {skipped[0].reason}; {ALLOWED}")
    raise UserError(f"data: {shown} has no image in it; {ALLOWED}")


def _dataset_layout(path: Path, shown: str) -> Layout:
    """Return the layout of a dataset of Hugging Face, whose rows are named by their numbers. Rows without an image are
    refused."""
    rows = open_rows(path, shown)
    names = [f"row {number}" for number in range(len(rows.sizes))]
    members = [
        Member(name, size, rows.stamp, partial(rows.read, number))
        for number, (name, size) in enumerate(zip(names, rows.sizes, strict=True))
        if size is not None
    ]
    skipped = [Skipped(name, "holds no image") for name, size in zip(names, rows.sizes, strict=True) if size is None]
    if not members:
        raise UserError(f"data: {shown} has no image in any of its {len(names)} rows; {ALLOWED}")
    return Layout(tuple(members), tuple(skipped), rows.classes, dict(zip(names, rows.labels, strict=False)))


def _class_folders(names: Sequence[str]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Return the classes, and the label of each name, after stripping folders common to all. Both are empty if images lie
    beside the folders."""
    parts = [name.split("/") for name in names]
    while all(len(part) > 1 for part in parts) and len({part[0] for part in parts}) == 1:
        parts = [part[1:] for part in parts]
    if any(len(part) == 1 for part in parts):
        return (), {}
    classes = tuple(sorted({part[0] for part in parts}))
    numbers = {name: number for number, name in enumerate(classes)}
    return classes, {name: numbers[part[0]] for name, part in zip(names, parts, strict=True)}


def _cifar_classes(meta: Member | None, shown: str) -> tuple[str, ...]:
    if meta is None:
        return tuple(str(number) for number in range(CIFAR_CLASSES))
    try:
        contents = meta.read() if meta.size <= _CIFAR_NAMES_BYTES else b""
    except Exception as error:  # as in _decode_or_skip
        raise UserError(f"data: {shown} has an unreadable {_CIFAR_NAMES}: {why_unreadable(error)}") from error
    names = tuple(contents.decode("utf-8", "replace").split())
    if len(names) != CIFAR_CLASSES:
        raise UserError(f"data: {shown} names {len(names)} classes in {_CIFAR_NAMES}, must be {CIFAR_CLASSES}")
    return names
