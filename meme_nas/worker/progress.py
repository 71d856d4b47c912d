"""How far a running trial is: a small file in its folder that the worker writes and the driver reads, whatever engine runs it."""

import json
import time
from pathlib import Path

from meme.support.files import write_text

NAME = "progress.json"
EVERY_SECONDS = 2.0


class ProgressFile:
    """In the worker. Call ``report`` as often as you like."""

    def __init__(self, folder: Path, experts: int):
        self._path, self._experts = folder / NAME, experts
        self._written_at = 0.0

    def report(self, expert: int, step: int, steps: int) -> None:
        """Expert ``expert`` (from 1) has had ``step`` of its ``steps`` training steps."""
        if time.monotonic() - self._written_at < EVERY_SECONDS:
            return
        self._written_at = time.monotonic()
        write_text(self._path, json.dumps({"share": (expert - 1 + step / steps) / self._experts}))

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


def trained_share(folder: Path) -> float | None:
    """Share of a running trial's training that is done; None where nothing is known yet."""
    try:
        return float(json.loads((folder / NAME).read_text())["share"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
