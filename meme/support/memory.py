"""Control whether the C library keeps the memory that this process frees or returns it to the system."""

import contextlib
import ctypes
from collections.abc import Iterator
from functools import cache

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_NEVER = 2**31 - 1  # bytes


@cache
def keep_freed_memory() -> None:
    """Keep freed memory, up to 2 GiB at a time, for the allocations that follow.

    By default glibc returns large blocks to the system. A training step frees and allocates the same blocks again, so the
    system would have to clear and map each of their pages in every step. Other C libraries are left as they are.
    """
    with _glibc() as library:
        library.mallopt(_TRIM_THRESHOLD, _NEVER)
        library.mallopt(_MMAP_THRESHOLD, _NEVER)


def give_freed_memory_back() -> None:
    """Return freed memory to the system. Otherwise the C library keeps it in pieces that do not fit the next expert's
    weights."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with _glibc() as library:
        library.malloc_trim(0)


@contextlib.contextmanager
def _glibc() -> Iterator[ctypes.CDLL]:
    """Yield the C library. Where it is not glibc, calls that it lacks are skipped."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        yield ctypes.CDLL(None)
