"""Where cached files live, and how a file appears whole or not at all."""

import errno
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import platformdirs

from meme.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NEW_SECONDS = 5.0  # a half-written file that is still empty may have been made just now, and not yet been locked
UNLOCKABLE_SECONDS = 3_600.0  # age from which one is taken for abandoned where the file system has no locks
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)  # error numbers of a disk that is full
CACHE_VARIABLE, INCEPTION_VARIABLE = "MEME_CACHE", "MEME_INCEPTION"
NO_FILE = "off"  # what MEME_INCEPTION may be beside a path


def cache_folder() -> Path:
    """Return ``$MEME_CACHE``, else the user's cache folder for this program. Raises ``UserError`` where there is neither."""
    if named := os.environ.get(CACHE_VARIABLE):
        return expanded(named)
    try:
        folder = Path(platformdirs.user_cache_dir("meme-nas"))
    except RuntimeError:  # no HOME, and a user that the system does not know, as in containers
        folder = Path()
    if not folder.is_absolute():
        raise UserError("MEME_CACHE: this user has no home folder; name a folder in MEME_CACHE, or one in HOME")
    return folder


def expanded(path: str | Path) -> Path:
    """Return ``path`` with ``~`` as the home folder, and ``~user`` as that user's. Shells leave ``--study=~/x`` as it is.

    Raises UserError where there is no such folder.
    """
    found = os.path.expanduser(path)
    if found.partition(os.sep)[0] == "~":
        raise UserError(f"{path}: this user has no home folder; write the path without ~, or name a folder in HOME")
    if found.startswith("~") and not os.path.lexists(found):
        user = found.partition(os.sep)[0][1:]
        raise UserError(f"{path}: there is no user {user} here; for a file or folder of that name write ./{path}")
    return Path(found)


def settle_paths() -> None:
    """Make the paths in our environment variables absolute, for the workers of this process, which may run in another
    folder."""
    for name in (CACHE_VARIABLE, INCEPTION_VARIABLE):
        if (value := os.environ.get(name)) and (name, value) != (INCEPTION_VARIABLE, NO_FILE):
            os.environ[name] = os.path.abspath(expanded(value))


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, which replaces ``path`` when the context ends without an error.

    File and folder are synced, so that a power cut leaves the old file or the new one. Meanwhile the temporary file is locked,
    by which ``remove_abandoned`` tells it from a file left by a killed process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    partial = Path(name)
    try:
        _lock(handle)
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.chmod(partial, 0o666 & ~_umask())
        partial.replace(path)
        _sync_folder(path.parent)
    finally:
        os.close(handle)
        partial.unlink(missing_ok=True)


def remove_partials(folder: Path, names: str, new_seconds: float = NEW_SECONDS) -> None:
    """Remove half-written files that killed processes left in ``folder``, where the names of their targets match ``names``.

    ``names`` is a regular expression. Other files stay, as do those that a process is writing.
    """
    ours = re.compile(rf"\.(?:{names})\.[a-z0-9_]{{8}}\.part")
    found = (path for path in folder.glob(".*.part") if ours.fullmatch(path.name) and not path.is_symlink())
    remove_abandoned(found, new_seconds)


def remove_abandoned(partials: Iterable[Path], new_seconds: float = NEW_SECONDS) -> None:
    """Remove the half-written files that no process is writing, here or on another host that shares the folder."""
    for partial in partials:
        with suppress(FileNotFoundError):  # its writer has finished
            if _is_abandoned(partial, new_seconds):
                partial.unlink()


def _is_abandoned(partial: Path, new_seconds: float) -> bool:
    with partial.open("rb+") as file:
        found, is_free = os.fstat(file.fileno()), _lock(file.fileno())
    age = time.time() - found.st_mtime
    if is_free is None:
        return age > UNLOCKABLE_SECONDS
    return is_free and (found.st_size > 0 or age >= new_seconds)


def _lock(handle: int) -> bool | None:
    """Lock an open file until it is closed. Return whether that succeeded, or None where the system has no such locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def stamp_of(facts: os.stat_result) -> str:
    """Return a stamp that changes when a file is written or replaced. It includes the inode and its time of change, since
    programs can set a file's own time to anything."""
    return f"{facts.st_mtime_ns} {facts.st_ctime_ns} {facts.st_ino}"


def check_writable(folder: Path) -> None:
    """Make ``folder``, and write and remove a file in it. Raises ``UserError`` where that is not allowed, before hours of
    work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: can't be written ({error.strerror})") from None


def write_text(path: Path, text: str) -> None:
    """Write ``text`` so that a reader sees the old file or the new one, never half of it.

    ``text`` may contain names of files that are not UTF-8; their odd bytes are written as escapes.
    """
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


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
