"""A process of this machine in which latency is measured as in a trial: with its threads, its device, its visible GPU, its nice.

The driver never measures: it has other threads, and other work.
"""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from meme.errors import UserError
from meme.scoring.cost import TimedNetwork
from meme.support.devices import DeviceKind
from meme_nas.engines.local import ATTEMPTS, end, new_pool
from meme_nas.engines.protocols import Meter


class MeasuringProcess:
    """Starts with the first question, and ends with ``close`` or with this process."""

    def __init__(self, meter: Meter, gpus: int = 0, niceness: int = 0):
        """``gpus`` as for ``LocalEngine``: with any, the first is visible alone. ``niceness`` is added to this process's."""
        self._meter, self._gpus, self._niceness = meter, gpus, niceness
        self._pool: ProcessPoolExecutor | None = None

    @property
    def kind(self) -> DeviceKind:
        """Kind of the device of a trial here. It needs no process, as that has the first of the devices that this one has."""
        return self._meter.kind

    def __call__(self, networks: Sequence[TimedNetwork]) -> list[float]:
        """``UserError`` where the process dies again and again."""
        for _ in range(ATTEMPTS):
            self._pool = self._pool or new_pool(0, self._gpus, self._niceness)
            try:
                return self._pool.submit(self._meter, networks).result()
            except BrokenProcessPool:
                self.close()
        raise UserError(f"latency_ms: the process that measures it died {ATTEMPTS} times (killed, or out of memory)")

    def close(self) -> None:
        """Stop the process, busy or not. A later question starts another one."""
        if self._pool:
            end(self._pool)
            self._pool = None
