"""How many threads a process calculates with."""

import numpy as np  # noqa: F401
import pytest
import torch
from scipy.linalg import blas  # noqa: F401  # NumPy and SciPy each have one, once they are loaded
from threadpoolctl import threadpool_info

from meme.support.threads import threads


def blas_threads() -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


def test_within_it_torch_and_both_blas_have_so_many_and_afterwards_as_many_as_before():
    before = torch.get_num_threads(), blas_threads()
    with threads(3):
        assert torch.get_num_threads() == 3 and blas_threads() == {3}
        with threads(1):
            assert torch.get_num_threads() == 1 and blas_threads() == {1}
        assert torch.get_num_threads() == 3 and blas_threads() == {3}
    assert (torch.get_num_threads(), blas_threads()) == before


def test_an_error_leaves_no_limit_behind():
    before = torch.get_num_threads()
    with pytest.raises(MemoryError), threads(before + 1):
        raise MemoryError
    assert torch.get_num_threads() == before
