"""Interfaces of engines, of their sources of tasks, and of latency measurements where trials run."""

from collections.abc import Callable, Sequence
from typing import Protocol

from meme.scoring.cost import TimedNetwork
from meme.support.devices import DeviceKind
from meme_nas.record.tasks import Outcome, Task


class Source(Protocol):
    """Source of an engine's tasks: a strategy, or a stage after the search."""

    unit: str

    @property
    def done(self) -> bool: ...

    def next_task(self) -> Task | None: ...

    def record(self, outcome: Outcome) -> object: ...


class Engine(Protocol):
    """Common interface of the engines."""

    def run(self, search: Source, objective: Callable[[Task], Outcome], on_change: Callable[[], None]) -> None: ...

    def close(self) -> None: ...


class Meter(Protocol):
    """Function that measures the milliseconds of one pass through each network, in the process that calls it. It is picklable."""

    @property
    def kind(self) -> DeviceKind: ...

    def __call__(self, networks: Sequence[TimedNetwork]) -> list[float]: ...


class Measuring(Meter, Protocol):
    """Caller of a meter in a process like a trial's."""

    def close(self) -> None: ...
