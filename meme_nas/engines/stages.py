"""A search and its later stages in one run of an engine, so that workers are not restarted in between."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Self

from meme_nas.engines.protocols import Source
from meme_nas.record.tasks import Outcome, Task

OnChange = Callable[[], None]
"""Callback for when trials start or end, and about once a second."""


@dataclass(frozen=True)
class Stage:
    """One source of tasks, and its display on the console."""

    source: Source
    shown: Callable[[], AbstractContextManager[OnChange]]
    """Context of the display, entered before the stage's first task, if it has any, and left after its last."""


class Stages:
    """Several sources in turn, as one source. Each begins when all tasks of the one before are recorded."""

    def __init__(self, stages: Sequence[Stage]):
        """Run ``stages`` in order. There must be at least one."""
        self._current, *self._waiting = stages
        self._shown, self._on_change = ExitStack(), _nothing
        self.unit = self._current.source.unit

    def __enter__(self) -> Self:
        self._show()
        return self

    def __exit__(self, *exception) -> None:
        self._shown.close()

    @property
    def done(self) -> bool:
        return not self._waiting and self._current.source.done

    def next_task(self) -> Task | None:
        task = self._current.source.next_task()
        while task is None and self._waiting and self._current.source.done:
            self._current = self._waiting.pop(0)
            if not self._current.source.done:
                self._show()
            task = self._current.source.next_task()
        return task

    def record(self, outcome: Outcome) -> object:
        return self._current.source.record(outcome)

    def on_change(self) -> None:
        """Update the display of the current stage."""
        self._on_change()

    def _show(self) -> None:
        self._shown.close()
        self._on_change = self._shown.enter_context(self._current.shown())


def _nothing() -> None:
    pass
