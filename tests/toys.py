"""Objectives that take no training, for tests of the search around them.

In a module of their own, which imports neither torch nor Optuna: workers import it, and start in a tenth of the time.
"""

import errno
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from meme.config.schema import Config
from meme_nas.record.tasks import Outcome, Task


def score(task: Task) -> Outcome:
    """A smooth function of the choices: attention pays late, convolution early."""
    parts = [abs(sum(expert.low_channels) / 48 - place / 3) for place, expert in enumerate(task.config.experts)]
    cost = 1e6 + sum(sum(expert.low_channels) for expert in task.config.experts) / 48
    if task.expert:
        loss = parts[task.expert - 1]
        return Outcome(task.number, task.expert, loss=loss, loss_error=0.01, macs=cost, params=7, training_seconds=0.01)
    fid = 1 + sum(parts)
    return Outcome(task.number, fid=fid, macs=cost, params=7, latency_ms=0.1, features="toy", training_seconds=0.01)


@dataclass(frozen=True)
class Crashing:
    """Fails wherever one expert has few attention channels at level 2: in two fifths of that expert's space. The score gets
    better toward them."""

    expert: int = 1
    most: int = 8

    def __call__(self, task: Task) -> Outcome:
        if task.expert in (0, self.expert) and self.crashes(task.config):
            raise RuntimeError("too little attention")
        return score(task)

    def crashes(self, config: Config) -> bool:
        return config.network.splits_channels and config.experts[self.expert - 1].low_channels[1] <= self.most


@dataclass(frozen=True)
class Troubled:
    """Behaves badly in some trials: gives NaN, raises, finds no room on the disk, or kills its own process (once, or always)."""

    nan: int = -1
    raises: int = -1
    no_room: int = -1
    dies_once: int = -1
    dies_always: int = -1
    folder: Path | None = None

    def __call__(self, task: Task) -> Outcome:
        if task.number == self.nan:
            return Outcome(task.number, fid=float("nan"), macs=1.0)
        if task.number == self.raises:
            raise MemoryError("out of\nmemory")
        if task.number == self.no_room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full/disk")
        if task.number == self.dies_always or (task.number == self.dies_once and not (self.folder / "died").exists()):
            (self.folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return score(task)


@dataclass(frozen=True)
class Limited:
    """Another objective, in a process that gets only so much more memory than it has when its first trial begins."""

    objective: Callable[[Task], Outcome]
    mib: int

    def __call__(self, task: Task) -> Outcome:
        if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + self.mib * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
        return self.objective(task)


@dataclass(frozen=True)
class Held:
    """Does not end the trials from ``first`` on: a search can be killed between the trials before and those."""

    first: int

    def __call__(self, task: Task) -> Outcome:
        while task.number >= self.first:
            time.sleep(1)
        return score(task)


@dataclass(frozen=True)
class ByWorker:
    """Leaves in a file for every attempt which process its worker is; then takes its time, or kills that process (once)."""

    folder: Path
    seconds: float
    dies_once: int

    def __call__(self, task: Task) -> Outcome:
        first = not list(self.folder.glob(f"{task.number:03d}-*"))
        (self.folder / f"{task.number:03d}-{time.time_ns()}").write_text(str(os.getpid()))
        if task.number == self.dies_once and first:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds)
        return score(task)


@dataclass(frozen=True)
class OnNode:
    """Leaves in a file for every attempt which process, a node's, its worker belongs to; then takes its time.

    The file's name has the moment it begins, its last change is the moment it ends.
    """

    folder: Path
    seconds: float
    stuck_once: int = -1
    """A trial whose first attempt does not end."""
    at_once: int = 1
    """None ends before so many have begun: workers start one after another, and slowly. Ten minutes are the most it waits."""

    def __call__(self, task: Task) -> Outcome:
        attempts = len(visits(self.folder).get(task.number, []))
        file = self.folder / f"{task.number:03d}-{time.time_ns()}"
        file.write_text(str(os.getppid()))
        time.sleep(1_000 if task.number == self.stuck_once and not attempts else self.seconds)
        deadline = time.monotonic() + 600
        while len(list(self.folder.iterdir())) < self.at_once and time.monotonic() < deadline:
            time.sleep(0.05)
        file.touch()
        return score(task)


def visits(folder: Path) -> dict[int, list[int]]:
    """For every trial, the workers or nodes that its attempts ran on, in order. A file that is being written is left out."""
    found: dict[int, list[int]] = {}
    for path in sorted(folder.iterdir()):
        if pid := path.read_text():
            found.setdefault(int(path.name[:3]), []).append(int(pid))
    return found
