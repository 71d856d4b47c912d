"""Tests use a cache of their own, never the network, and one thread: so that float sums come out the same on every machine."""

import os
from pathlib import Path

import hypothesis
import pytest
import torch
from threadpoolctl import threadpool_limits

ROOT = Path(__file__).parent.parent
CIFAR = ROOT.parent / "shared" / "data" / "cifar10-train.zip"

hypothesis.settings.register_profile("meme", deadline=None)  # no test here is about time, and machines are noisy
hypothesis.settings.load_profile("meme")


@pytest.fixture(scope="session", autouse=True)
def _surroundings(tmp_path_factory):
    os.environ["MEME_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["MEME_INCEPTION"] = "off"
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # Ray's workers import the objectives in toys.py
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # of commands that tests start
    torch.set_num_threads(1)
    threadpool_limits(1, user_api="blas")
