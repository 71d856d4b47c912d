"""Ways to run a search: each hands tasks to workers and outcomes back."""

from collections.abc import Callable
from typing import Protocol

from meme_nas.record.tasks import Outcome, Task


class Source(Protocol):
    """Where an engine's tasks come from: a strategy, or an audit."""

    unit: str

    @property
    def done(self) -> bool: ...

    def next_task(self) -> Task | None: ...

    def record(self, outcome: Outcome) -> object: ...


class Engine(Protocol):
    """What the engines have in common."""

    def run(self, search: Source, objective: Callable[[Task], Outcome], on_change: Callable[[], None]) -> None: ...

    def close(self) -> None: ...
