"""A lock on a folder that says who holds it."""

import json
import os
import socket
from contextlib import suppress
from pathlib import Path

import filelock

from meme.errors import UserError, printable
from meme.support.files import write_text

PROBED_SECONDS = 0.5  # for which a new holder tries: whoever asks whether a lock is held has it for a moment


class FolderLock:
    """A lock that is held from construction to ``release``, or to the end of the process. Two processes never both hold it."""

    def __init__(self, path: Path, refusal: str):
        """Lock the file ``path``, making its folder if need be.

        Raises ``UserError`` where the lock is held: ``refusal``, with process and host in place of ``{holder}``. Raises
        ``OSError`` where the folder cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._holder = path.with_name(f"{path.name}.holder")
        self._lock = filelock.FileLock(path, thread_local=False)
        try:
            self._lock.acquire(timeout=PROBED_SECONDS)
        except filelock.Timeout:
            raise UserError(refusal.replace("{holder}", _read_holder(self._holder))) from None
        except NotImplementedError:  # a file system without locks: the folder is then not guarded
            return
        write_text(self._holder, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))

    def release(self) -> None:
        """Release the lock. A second call does nothing."""
        if self._lock.is_locked:
            self._holder.unlink(missing_ok=True)
            self._lock.release(force=True)

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def is_held(path: Path) -> bool:
    """Return whether a process, here or on a host that shares the folder, holds the lock ``path``; true where that cannot be
    tested."""
    if not path.exists():
        return False
    try:
        with filelock.FileLock(path).acquire(timeout=0):
            return False
    except (filelock.Timeout, OSError):
        return True
    except NotImplementedError:
        return False


def _read_holder(path: Path) -> str:
    """Describe the process that holds the lock."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return f"process {int(found['pid'])} on {printable(str(found['host']))[:80]}"
    return "another process"
