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
    """Held from its making to ``release``, or to the end of the process. Two processes on one folder never both hold it."""

    def __init__(self, path: Path, refusal: str):
        """Lock the file ``path``, whose folder is made. ``UserError`` where it is held: ``refusal``, with process and host
        in the place of ``{holder}``. ``OSError`` where the folder can't be written."""
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
        """Let others have the folder. May be called again."""
        if self._lock.is_locked:
            self._holder.unlink(missing_ok=True)
            self._lock.release(force=True)

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def is_held(path: Path) -> bool:
    """Whether a process, here or on a host that shares the folder, holds the lock ``path``; true where that can't be seen."""
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
    """The process that holds the lock, in words."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return f"process {int(found['pid'])} on {printable(str(found['host']))[:80]}"
    return "another process"
