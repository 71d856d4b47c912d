"""Where cached files live, and how a file appears whole or not at all."""

import errno
import glob
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import platformdirs

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)  # error numbers of a disk that is full


def cache_folder() -> Path:
    """``$MEME_CACHE``, else the user's cache folder for this program."""
    return Path(os.environ.get("MEME_CACHE") or platformdirs.user_cache_dir("meme-nas"))


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on leaving without an error it is synced and renamed over ``path``, and
    the folder synced: after a power cut there is the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.chmod(partial, 0o666 & ~_umask())
        partial.replace(path)
        _sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def remove_partials(path: Path) -> None:
    """Remove what processes that were killed while they wrote ``path`` left beside it. None may be writing it now."""
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` so that a reader sees the old file or the new one, never half of it."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # not every file system, or system, lets a folder be synced
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
