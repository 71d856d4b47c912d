"""Tests use a cache of their own, never the network, and one thread: so that float sums come out the same on every machine."""

import os
import sys
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).parent.parent
CIFAR = ROOT.parent / "shared" / "data" / "cifar10-train.zip"

hypothesis.settings.register_profile("meme", deadline=None)  # no test here is about time, and machines are noisy
hypothesis.settings.load_profile("meme")


def pytest_configure() -> None:
    """Keep compiled modules in a folder of pytest's where Python is told to write none beside the sources.

    Every process that a test starts would otherwise compile torch, SciPy and pandas again, which takes about 7 s. This one
    imports torch after this, so that it finds it compiled too.
    """
    if sys.dont_write_bytecode:
        sys.dont_write_bytecode, sys.pycache_prefix = False, str(ROOT / ".pytest_cache" / "compiled")
        os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.fixture(scope="session", autouse=True)
def _surroundings(tmp_path_factory):
    import torch
    from threadpoolctl import threadpool_limits

    os.environ["MEME_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["MEME_INCEPTION"] = "off"
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # Ray's workers import the objectives in toys.py
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # of commands that tests start
    os.environ |= {"RAY_worker_niceness": "0"}  # Ray's own is 15: beside other work a step of 30 ms took 4 s
    torch.set_num_threads(1)
    threadpool_limits(1, user_api="blas")
