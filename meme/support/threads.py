"""How many threads this process calculates with."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from threadpoolctl import ThreadpoolController


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many, of torch and of the BLAS that NumPy and SciPy have. More than there are free cores wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with _libraries().limit(limits=count, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)


@cache
def _libraries() -> ThreadpoolController:
    """Those loaded by now, which are all there will be; to look for them takes milliseconds, and a trial may take few more."""
    return ThreadpoolController()
