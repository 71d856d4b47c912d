"""The last two states of a training on disk, so that a bad one never takes the place of the only good one."""

import re
from collections.abc import Callable
from pathlib import Path

from meme.errors import UserError
from meme.support.files import remove_partials


class KeptStates:
    """The file ``newest``, and beside it the one that it replaced."""

    def __init__(self, newest: Path):
        self.newest = newest
        self.previous = newest.with_name(newest.name.replace(".safetensors", ".previous.safetensors"))

    def keep(self, save: Callable[[Path], None]) -> None:
        """Write a new state by ``save``; the newest becomes the previous one. If the process is killed at any moment, one of
        them is whole."""
        if self.newest.exists():
            self.newest.replace(self.previous)
        save(self.newest)

    def load(self, load: Callable[[Path], bool]) -> bool:
        """Load the newest state by ``load``, or the previous one where the newest is missing, unreadable or refused.

        ``load`` returns whether it accepted a file's state. Return whether it accepted either. Raises ``UserError`` as ``load``
        does, where the newest is unreadable and the previous one is not accepted.
        """
        unreadable = None
        try:
            if self.newest.exists() and load(self.newest):
                return True
        except UserError as error:
            unreadable = error
        if self.previous.exists() and load(self.previous):
            return True
        if unreadable:
            raise unreadable
        return False

    def go_back(self) -> None:
        """Drop the newest state where there is a previous one, so that the training resumes from that."""
        if self.previous.exists():
            self.previous.replace(self.newest)

    def remove_previous(self) -> None:
        """Remove the previous state, and half-written files of killed processes. The newest state stays."""
        self.previous.unlink(missing_ok=True)
        remove_partials(self.newest.parent, re.escape(self.newest.name), new_seconds=0.0)
