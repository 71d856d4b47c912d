"""Kill real searches at random moments, fill their disk, and count what is lost.

    python benchmarks/faults.py [--kills 100] [--ray-share 0.1] [--seed 0] [--keep FOLDER]

Every search is ``run_search.py`` on the digits with trainings of 2 steps and 16 samples. Strategies alternate: factorised, with
its bank, trainings of single experts and an audit, and joint. At a random moment one fault is injected: SIGKILL for the driver,
for one of its workers, for all of its processes or for a Ray node (with engine ray), or SIGTERM as clusters send it, which must
end it with status 143. The same command is repeated until the search is done. After each kill, every file of the study must be
complete, and every trial that was finished (of ensembles, of single experts, of the audit) must still be recorded once, with the
same scores. A killed search must end with the same trials and scores as an undisturbed one. Finally, a study on a full disk must
stop with a sentence, and resume when there is room again (skipped if no small file system can be mounted).

The last line is one JSON object. ``kills`` is the number of kills survived, by kind in ``victims`` and by strategy in
``strategies``. ``trials`` is the number of trials finished before a kill and checked after it. ``lost`` trials are missing,
``changed`` ones have other scores, ``twice`` ones are recorded twice. Then follow ``broken_files``, ``differing`` searches,
``stuck`` commands and ``unclean`` ends. All counts from ``lost`` on must be 0, or the status is 1. Ctrl-C ends it with the counts
so far.
"""

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import psutil
import yaml
from PIL import Image

from meme.support.tensor_files import load_tensors
from meme_nas.record.folder import APART
from meme_nas.record.study import TrialRecord, read_everything

ROOT = Path(__file__).parent.parent
STUCK_SECONDS = 600.0  # time after which a command is ended and counted as stuck
TERMINATED = 143
FAULTS = ("lost", "changed", "twice", "broken_files", "differing", "stuck", "unclean")
SCORES = ("fid", "fids", "loss", "macs", "params", "failure")
STRATEGIES = {
    "factorised": {"--budget": 4, "--cascades-per-candidate": 2, "--audit-factor": 2, "--audit-size": 4},
    "joint": {"--budget": 4, "--audit-factor": 0},
}
"""Options of each search: enough budget for two candidates of each expert beside the yardsticks, or for one proposal."""
Key = tuple[str, int]
"""Owner of a trial (ensembles, an expert, the audit), and its number."""


@dataclass
class Tally:
    """Counts of the results of all kills."""

    victims: Counter = field(default_factory=Counter)
    strategies: Counter = field(default_factory=Counter)
    faults: Counter = field(default_factory=Counter)
    trials: int = 0
    """Number of trials finished before a kill."""
    details: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return sum(self.victims.values())

    def fault(self, kind: str, detail: object) -> None:
        self.faults[kind] += 1
        self.details.append(f"{kind}: {detail}")

    def as_json(self) -> dict:
        counts = {"kills": self.kills, "trials": self.trials, **{kind: self.faults[kind] for kind in FAULTS}}
        return counts | {"victims": dict(self.victims), "strategies": dict(self.strategies)}


@dataclass(frozen=True)
class Command:
    """Search that can be started repeatedly."""

    study: Path
    strategy: str
    engine: str

    @contextmanager
    def started(self) -> Iterator[subprocess.Popen]:
        """Start the command in a process group of its own. All its processes are ended when the context ends."""
        driver = self._start()
        family: list[psutil.Process] = []
        try:
            yield driver
        finally:
            family += _descendants(driver)
            driver.kill()
            driver.wait()
            for process in family:
                _end(process)

    def run(self) -> int:
        """Run the command to its end and return its exit status."""
        with self.started() as driver:
            return driver.wait(timeout=STUCK_SECONDS)

    def _start(self) -> subprocess.Popen:
        options = {"--study": self.study, "--engine": self.engine, "--strategy": self.strategy, **STRATEGIES[self.strategy]}
        options |= {
            "--proxy-steps": 2,
            "--samples": 16,
            "--workers": 2,
            "--trunk-share": 0.001,
            "--p-share": 0,
            "--confirm-share": 0,
        }
        words = [str(word) for pair in options.items() for word in pair]
        surroundings = os.environ | {"PYTHONPATH": str(ROOT), "MEME_INCEPTION": "off"}
        log = self.study.with_suffix(".log").open("ab")
        return subprocess.Popen(
            [sys.executable, str(ROOT / "run_search.py"), *words],
            cwd=ROOT,
            env=surroundings,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


# Checks


def scores(study: Path) -> dict[Key, tuple]:
    """Return state, choices and scores of the finished trials of a study."""
    if not (study / "study.journal").exists() or not (study / "study.journal").stat().st_size:
        return {}
    return {_key(trial): _told(trial) for trial in _trials(study) if trial.finished}


def _key(trial: TrialRecord) -> Key:
    kind = trial.kind if trial.kind in APART else f"expert {trial.expert}" if trial.expert else "ensembles"
    return kind, trial.number


def _trials(study: Path) -> list[TrialRecord]:
    """Return the trials of a study; none if the search has not written its first records yet."""
    try:
        return read_everything(study)
    except ValueError as error:
        if "holds no study" in str(error):
            return []
        raise


def _told(trial: TrialRecord) -> tuple:
    found = tuple(getattr(trial.outcome, name, None) for name in SCORES)
    return trial.state, tuple(sorted(trial.choices.items())), found


def broken_files(folder: Path) -> list[str]:
    """Return the files under ``folder`` that are invalid for the type in their name, except partly written files of a kill."""
    readers: dict[str, Callable[[Path], object]] = {
        ".safetensors": load_tensors,
        ".yaml": lambda path: yaml.safe_load(path.read_text())["name"],
        ".json": lambda path: json.loads(path.read_text()),
        ".csv": pd.read_csv,
        ".png": lambda path: Image.open(path).load(),
        ".html": lambda path: path.read_text().rindex("</html>"),
    }
    found = []
    for path in sorted(folder.rglob("*")):
        if path.suffix in readers and "ray" not in path.relative_to(folder).parts and path.is_file():
            try:
                readers[path.suffix](path)
            except Exception as error:
                found.append(f"{path}: {error!r:.100}")
    return found


def compare(before: dict[Key, tuple], study: Path, tally: Tally) -> None:
    """Count the effects of a fault on the trials that were finished ``before`` it."""
    after = scores(study)
    tally.trials += len(before)
    for key, told in before.items():
        if key not in after:
            tally.fault("lost", f"{study}: trial {key}")
        elif after[key] != told:
            tally.fault("changed", f"{study}: trial {key}: {told} is now {after[key]}")
    for detail in broken_files(study):
        tally.fault("broken_files", detail)


# Faults


def kill_driver(driver: subprocess.Popen, source: random.Random) -> bool:
    os.kill(driver.pid, signal.SIGKILL)
    return True


def kill_worker(driver: subprocess.Popen, source: random.Random) -> bool:
    """Kill one of the processes that run trials. Returns False if there is none yet."""
    workers = [child for child in _descendants(driver) if "spawn_main" in _line(child) or "TrialActor" in _line(child)]
    return bool(workers) and _end(source.choice(workers))


def kill_node(driver: subprocess.Popen, source: random.Random) -> bool:
    """Kill Ray's process for this machine. Returns False if there is none (yet)."""
    nodes = [child for child in _descendants(driver) if child.name() == "raylet"]
    return bool(nodes) and _end(nodes[0])


def kill_all(driver: subprocess.Popen, source: random.Random) -> bool:
    """Kill all processes at once, as a power cut does."""
    family = [*_descendants(driver), psutil.Process(driver.pid)]
    killed = [_end(process) for process in family]  # a list, so that all are killed even if an earlier kill fails
    return all(killed)


def terminate(driver: subprocess.Popen, source: random.Random) -> bool:
    driver.send_signal(signal.SIGTERM)
    return True


VICTIMS = {"driver": kill_driver, "worker": kill_worker, "node": kill_node, "everything": kill_all, "sigterm": terminate}


def _descendants(driver: subprocess.Popen) -> list[psutil.Process]:
    try:
        return psutil.Process(driver.pid).children(recursive=True)
    except psutil.Error:
        return []


def _line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _end(process: psutil.Process) -> bool:
    try:
        process.kill()
    except psutil.Error:  # the process had ended already
        return False
    return True


class Killer:
    """Killer of searches of one engine, with alternating strategies, until a number of kills is reached."""

    def __init__(
        self, folder: Path, engine: str, source: random.Random, tally: Tally, strategies: Sequence[str] = tuple(STRATEGIES)
    ):
        self.folder, self.engine, self.source, self.tally = folder, engine, source, tally
        self.victims = [name for name in VICTIMS if name != "node" or engine == "ray"]
        self.unbroken = {strategy: self._undisturbed(strategy) for strategy in strategies}

    def _undisturbed(self, strategy: str) -> tuple[float, dict[Key, tuple]]:
        """Return the seconds and the trials of an undisturbed search."""
        whole = Command(self.folder / f"{self.engine}-{strategy}-unbroken", strategy, self.engine)
        begun = time.monotonic()
        if whole.run():
            raise SystemExit(f"a search that nothing disturbs fails; see {whole.study.with_suffix('.log')}")
        return time.monotonic() - begun, scores(whole.study)

    def kill(self, kills: int) -> None:
        """Run searches one after the other, each killed repeatedly while it runs, until ``kills`` kills are done."""
        target, number = self.tally.kills + kills, 0
        turns = itertools.cycle(self.unbroken)
        while self.tally.kills < target:
            strategy = next(turns)
            self._through(Command(self.folder / f"{self.engine}-{number}-{strategy}", strategy, self.engine), target)
            number += 1

    def _through(self, command: Command, target: int) -> None:
        """Run one search from its first start to its end, with kills in between."""
        done = False
        while not done:
            before = scores(command.study)
            victim = self.source.choice(self.victims) if self.tally.kills < target else None
            with command.started() as driver:
                hit = victim is not None and self._strike(command, driver, victim)
                status = self._ended(command, driver)
            if hit:
                self.tally.victims[victim] += 1
                self.tally.strategies[command.strategy] += 1
                print(f"{self.tally.kills} {victim} of {command.study.name}: status {status}", file=sys.stderr, flush=True)
                if victim == "sigterm" and status not in (TERMINATED, 0):  # 0: the search was just ending
                    self.tally.fault("unclean", f"{command.study}: status {status} after SIGTERM")
            done = status == 0
            compare(before, command.study, self.tally)
        self._finished(command)

    def _strike(self, command: Command, driver: subprocess.Popen, victim: str) -> bool:
        """Inject a fault at a random time or, every other time, just after a record was written. False if the search was over."""
        journal, begun = command.study / "study.journal", time.monotonic()
        whole, _ = self.unbroken[command.strategy]
        if self.source.random() < 0.5:
            moment = begun + self.source.uniform(0, whole)
            while time.monotonic() < moment and driver.poll() is None:
                time.sleep(0.01)
        else:
            records = self.source.randint(1, 6)  # number of records to wait for
            size = _size(journal)
            while records and driver.poll() is None and time.monotonic() < begun + STUCK_SECONDS:
                time.sleep(0.002)
                if _size(journal) != size:
                    records, size = records - 1, _size(journal)
            time.sleep(self.source.uniform(0, 0.02))
        return driver.poll() is None and VICTIMS[victim](driver, self.source)

    def _ended(self, command: Command, driver: subprocess.Popen) -> int:
        """Return the status of a command that ends by itself or by the fault."""
        try:
            return driver.wait(timeout=STUCK_SECONDS)
        except subprocess.TimeoutExpired:
            self.tally.fault("stuck", command.study)
            return -signal.SIGKILL

    def _finished(self, command: Command) -> None:
        found, (_, unbroken) = [_key(trial) for trial in read_everything(command.study)], self.unbroken[command.strategy]
        table = pd.read_csv(command.study / "trials.csv")
        ensembles = [number for kind, number in found if kind == "ensembles"]
        if sorted(found) != sorted(unbroken) or table["number"].tolist() != ensembles:
            self.tally.fault("twice", f"{command.study}: {found}")
        if scores(command.study) != unbroken:
            self.tally.fault("differing", command.study)
        left = [str(path) for path in command.study.rglob("*.part")]
        if left:
            self.tally.fault("broken_files", left)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def full_disk(folder: Path, tally: Tally) -> bool:
    """Run a search on a file system that is too small and then grows. Returns False if none can be mounted."""
    disk = folder / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(disk)], check=False, capture_output=True).returncode:
        return False
    try:
        command = Command(disk / "study", "factorised", "local")
        status = command.run()
        said = command.study.with_suffix(".log").read_text()
        if status != 2 or "make room" not in said:
            tally.fault("unclean", f"status {status} on a full disk")
        before = scores(command.study)
        compare(before, command.study, tally)
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        if command.run():
            tally.fault("stuck", "a search for which room was made")
        compare(before, command.study, tally)
        if any(trial.state != "complete" for trial in read_everything(command.study)):
            tally.fault("lost", "a trial failed for want of room")
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=False)
    return True


def run(kills: int, ray_share: float, seed: int, folder: Path, tally: Tally) -> str:
    """Run all kills and the full disk, and return the result of the latter."""
    source = random.Random(seed)
    on_ray = round(kills * ray_share)
    for engine, count in {"local": kills - on_ray, "ray": on_ray}.items():
        if count:
            Killer(folder, engine, source, tally).kill(count)
    return "survived" if full_disk(folder, tally) else "skipped: nothing can be mounted here"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ray-share", type=float, default=0.1, help="share of the kills in searches on Ray")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of victims and moments")
    parser.add_argument("--keep", type=Path, help="folder for the studies and their logs (default: a temporary one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        begun, tally, disk = time.monotonic(), Tally(), "not reached"
        with suppress(KeyboardInterrupt):  # the counts so far are printed
            disk = run(arguments.kills, arguments.ray_share, arguments.seed, folder, tally)
    print("\n".join(tally.details), file=sys.stderr)
    print(json.dumps(tally.as_json() | {"full_disk": disk, "minutes": round((time.monotonic() - begun) / 60, 1)}))
    sys.exit(1 if tally.faults else 0)


if __name__ == "__main__":
    main()
