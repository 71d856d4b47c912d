"""Run a search in processes of this machine, without Ray."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from meme_nas.engines.protocols import Source
from meme_nas.record.tasks import Outcome, Task, attempt

ATTEMPTS = 2  # tries of a task whose worker dies; after that it is recorded as failed


class LocalEngine:
    """Engine of ``workers`` processes that stay alive from trial to trial. Each is a pool of one, so a death harms no other."""

    def __init__(self, workers: int, gpus: int = 0):
        """Start the workers. If ``gpus`` is above 0, worker i sees only the GPU i modulo ``gpus``."""
        self._gpus = gpus
        self._pools = [new_pool(worker, gpus) for worker in range(workers)]
        self._running: dict[Future, tuple[int, Task]] = {}
        self._deaths: dict[str, int] = {}

    def run(self, search: Source, objective: Callable[[Task], Outcome], on_change: Callable[[], None]) -> None:
        """Run ``search`` to its end. ``on_change`` is called when trials start or end, and about once a second."""
        self._deaths.clear()  # another search may have tasks of the same names
        while not search.done:
            self._fill(search, objective)
            on_change()
            for future in wait(self._running, timeout=1.0, return_when=FIRST_COMPLETED).done:
                self._take(future, search, objective)
            on_change()

    def close(self) -> None:
        """Stop the workers, even if they are busy."""
        for pool in self._pools:
            end(pool)

    def _fill(self, search: Source, objective: Callable[[Task], Outcome]) -> None:
        """Give every idle worker a task while there are tasks."""
        idle = set(range(len(self._pools))) - {worker for worker, _ in self._running.values()}
        for worker in sorted(idle):
            if (task := search.next_task()) is None:
                return
            self._submit(worker, task, objective)

    def _take(self, future: Future, search: Source, objective: Callable[[Task], Outcome]) -> None:
        """Record the outcome of a task. If its worker died, submit it to a new one, up to ``ATTEMPTS`` tries in all."""
        worker, task = self._running.pop(future)
        try:
            search.record(future.result())
        except BrokenProcessPool:
            end(self._pools[worker])
            self._pools[worker] = new_pool(worker, self._gpus)
            self._deaths[task.name] = self._deaths.get(task.name, 0) + 1
            if self._deaths[task.name] < ATTEMPTS:
                self._submit(worker, task, objective)
            else:
                search.record(task.failed("its worker process died (killed, or out of memory)"))

    def _submit(self, worker: int, task: Task, objective: Callable[[Task], Outcome]) -> None:
        self._running[self._pools[worker].submit(attempt, objective, task)] = worker, task


def new_pool(worker: int, gpus: int, niceness: int = 0) -> ProcessPoolExecutor:
    """Return a pool of one process, whose niceness is this process's plus ``niceness``.

    If ``gpus`` is above 0, it sees only the GPU ``worker`` modulo ``gpus``.
    """
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=spawn, initializer=_start_worker, initargs=(worker, gpus, niceness))


def _start_worker(worker: int, gpus: int, niceness: int) -> None:
    """Prepare a new worker: ignore Ctrl-C, which the search handles, and end when the search ends, even by kill -9."""
    if niceness and hasattr(os, "nice"):
        os.nice(niceness)
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[worker % gpus]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def end(pool: ProcessPoolExecutor) -> None:
    """Stop a worker even if it is busy. Its trial can be run again."""
    for process in list((pool._processes or {}).values()):
        process.terminate()
    pool.shutdown(wait=False, cancel_futures=True)
