"""Process of this machine that measures latency under the conditions of a trial: threads, device, visible GPU and niceness.

The driver does not measure, because it has other threads and other work.
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
    """Process that calls a meter. It starts at the first call, and ends at ``close`` or with this process."""

    def __init__(self, meter: Meter, gpus: int = 0, niceness: int = 0):
        """Call ``meter``. If ``gpus`` is above 0, only the first GPU is visible. ``niceness`` is added to this process's."""
        self._meter, self._gpus, self._niceness = meter, gpus, niceness
        self._pool: ProcessPoolExecutor | None = None

    @property
    def kind(self) -> DeviceKind:
        """Kind of the device of a trial here. No process is started for it, as that would have this process's first device."""
        return self._meter.kind

    def __call__(self, networks: Sequence[TimedNetwork]) -> list[float]:
        """Return the meter's result. Raises ``UserError`` if the process dies ``ATTEMPTS`` times."""
        for _ in range(ATTEMPTS):
            self._pool = self._pool or new_pool(0, self._gpus, self._niceness)
            try:
                return self._pool.submit(self._meter, networks).result()
            except BrokenProcessPool:
                self.close()
        raise UserError(f"latency_ms: the process that measures it died {ATTEMPTS} times (killed, or out of memory)")

    def close(self) -> None:
        """Stop the process, even if it is busy. A later call starts another one."""
        if self._pool:
            end(self._pool)
            self._pool = None
