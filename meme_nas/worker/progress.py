"""Progress of a running trial: a small file in its folder that the worker writes and the driver reads, with any engine."""

import json
import time
from pathlib import Path

from meme.support.files import write_text

NAME = "progress.json"
EVERY_SECONDS = 2.0


class ProgressFile:
    """Writer of the progress file in a worker. ``report`` writes at most every ``EVERY_SECONDS``, so it may be called often."""

    def __init__(self, folder: Path, experts: int):
        self._path, self._experts = folder / NAME, experts
        self._written_at = 0.0

    def report(self, expert: int, step: int, steps: int) -> None:
        """Report that expert ``expert`` (from 1) has done ``step`` of its ``steps`` training steps."""
        if time.monotonic() - self._written_at < EVERY_SECONDS:
            return
        self._written_at = time.monotonic()
        write_text(self._path, json.dumps({"share": (expert - 1 + step / steps) / self._experts}))

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


def trained_share(folder: Path) -> float | None:
    """Return the share of a running trial's training that is done; None if nothing is reported yet."""
    try:
        return float(json.loads((folder / NAME).read_text())["share"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
