"""Commands in processes of their own, interrupted when they have come to what a test is about."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conftest import ROOT

LONGEST = 600.0  # seconds that anything is waited for, on a machine with other work
_MARKED = """
import sys
from pathlib import Path
from meme.cli.verbs import main
from meme.training import trainer

rate = trainer.learning_rate

def marked(*arguments):
    Path(sys.argv[1]).touch()
    return rate(*arguments)

trainer.learning_rate = marked
main(sys.argv[2:])
"""
"""``python -m meme``, which leaves a file as soon as a training takes its first step."""


@contextmanager
def training(words: list[str], mark: Path, **options) -> Iterator[subprocess.Popen]:
    """The running command ``python -m meme`` with these words, from the moment when it trains; ``mark`` is the file it leaves."""
    process = subprocess.Popen(
        [sys.executable, "-c", _MARKED, str(mark), *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    try:
        deadline = time.monotonic() + LONGEST
        while not mark.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
