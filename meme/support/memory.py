"""What becomes of memory that this process frees: the C library keeps it, or the system has it back."""

import contextlib
import ctypes
from collections.abc import Iterator
from functools import cache

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_NEVER = 2**31 - 1  # bytes


@cache
def keep_freed_memory() -> None:
    """From here on, keep what is freed for what is asked for next, up to 2 GiB at a time.

    glibc returns large blocks to the system, and a training step frees and asks for the same ones again: each of their pages
    is then taken from the system, cleared and mapped anew, step after step. Other C libraries are left as they are.
    """
    with _glibc() as library:
        library.mallopt(_TRIM_THRESHOLD, _NEVER)
        library.mallopt(_MMAP_THRESHOLD, _NEVER)


def give_freed_memory_back() -> None:
    """To the system: else the C library keeps it in pieces that the next expert's weights do not fit."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with _glibc() as library:
        library.malloc_trim(0)


@contextlib.contextmanager
def _glibc() -> Iterator[ctypes.CDLL]:
    """The C library; where it is not glibc, what is asked of it is left undone."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        yield ctypes.CDLL(None)
