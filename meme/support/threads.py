"""The number of threads that this process calculates with."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from threadpoolctl import ThreadpoolController


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Limit torch, and the BLAS of NumPy and SciPy, to ``count`` threads. Threads beyond the free cores wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with _libraries().limit(limits=count, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)


@cache
def _libraries() -> ThreadpoolController:
    """Return the libraries loaded by now, to which none is added later. The search for them takes milliseconds, as long as a
    short trial."""
    return ThreadpoolController()
