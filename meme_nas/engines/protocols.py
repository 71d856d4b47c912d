"""What engines take and give: tasks handed to workers and outcomes back, and latency measured where trials run."""

from collections.abc import Callable, Sequence
from typing import Protocol

from meme.scoring.cost import TimedNetwork
from meme.support.devices import DeviceKind
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


class Meter(Protocol):
    """What measures in the process that calls it: milliseconds of one pass through each network. It can be pickled."""

    @property
    def kind(self) -> DeviceKind: ...

    def __call__(self, networks: Sequence[TimedNetwork]) -> list[float]: ...


class Measuring(Meter, Protocol):
    """Calls a meter in a process that is like a trial's."""

    def close(self) -> None: ...
