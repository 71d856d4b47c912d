"""Bank of trained experts, stored under ids of all that determines them, so that none is trained twice.

An entry is a folder named by the expert's training id: architecture in canonical form, interval, p, noise schedule, training
settings, seed and the data's content. It holds averaged weights at one or more numbers of steps, the state from which training
resumes, and ``entry.json``, which is written last and lists the complete files.

Under a size limit, the least recently used states are deleted first, then the least recently used entries. Entries of a running
search stay: it writes a lease into each, which is valid while the search's lock is held, on any host. So the leases of a resumed
search are valid again.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from uuid import uuid4

import filelock
import torch
from pydantic import TypeAdapter

from meme.config.schema import Config, stable_id
from meme.data.images import TrainingData
from meme.errors import UserError
from meme.network.unet import Denoiser
from meme.scoring.cost import ensemble_cost
from meme.support.files import write_text
from meme.support.folder_lock import is_held
from meme.training.interval_loss import interval_loss
from meme.training.kept_states import KeptStates
from meme.training.trainer import Progress, read_expert, run_training, save_expert, training_id
from meme.training.trunk import trunk_config

FORMAT = 1  # format of the folder; increase it when an older bank can no longer be read
_STATE, _ENTRY, _LABEL, _LEASE = "state.safetensors", "entry.json", "bank.json", ".lease"
OnProgress = Callable[[Progress], None]


@dataclass(frozen=True)
class Banked:
    """One trained expert at one number of steps."""

    id: str
    steps: int
    loss: float
    """Mean squared error over its interval on held-out images."""
    loss_error: float
    """Standard error of that mean over the images."""
    params: int
    macs: int
    """MACs for one image and step, including attention."""
    curve: tuple[tuple[int, float], ...]
    """Pairs (step, mean training loss since the last pair), from the first step."""


_RECORDS = TypeAdapter(dict[str, Banked])  # validates entries, which may be damaged or foreign


class ExpertBank:
    """Folder of experts trained on one data set, which several studies and their workers may share."""

    def __init__(
        self,
        folder: Path,
        data: TrainingData,
        held_out: TrainingData,
        limit_gib: float | None = None,
        search: Path | None = None,
    ):
        """Open or create the bank in ``folder``.

        ``search`` is the lock file of the search that uses the bank. Without it, entries in use are protected from this process's
        evictions only. Raises ``UserError`` if ``folder`` can't be written, has another format, or holds experts of other data.
        """
        self._search = search.absolute() if search else None
        self.folder, self.data, self.held_out, self.limit_gib = folder, data, held_out, limit_gib
        self._known: dict[tuple[str, int], Banked] = {}
        self._asked: set[str] = set()
        self.passes = 0
        """Cost of the trainings made here in forward passes of one image, including trunks."""
        _claim(folder, data.content_id)

    def key(self, config: Config, number: int) -> str:
        """Return the id of expert ``number`` of ``config``. It does not depend on the number of steps."""
        return training_id(config, number, self.data)

    def find(self, config: Config, number: int) -> Banked | None:
        """Return the expert at the config's number of steps; None if the bank lacks it."""
        return self._find(self.key(config, number), config.training.steps)

    def obtain(
        self,
        config: Config,
        number: int,
        device: torch.device | str = "cpu",
        on_progress: OnProgress = lambda progress: None,
    ) -> Banked:
        """Return the expert at the config's number of steps: found, trained further, or trained from the start.

        Another process that needs the same expert waits for it. Raises ``TrainingDiverged`` if gradients are not finite.
        """
        key = self.key(config, number)
        self._asked.add(key)
        self._lease(self._entry(key))
        if (found := self._find(key, config.training.steps)) is not None:
            _touch(self._entry(key))
            return found
        entry = self._entry(key)
        entry.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(entry / ".lock"):
            found = self._find(key, config.training.steps) or self._train(key, config, number, device, on_progress)
        self._evict()
        return found

    def trunk(
        self, config: Config, device: torch.device | str = "cpu", on_progress: OnProgress = lambda progress: None
    ) -> Denoiser | None:
        """Return the network from which the experts of ``config`` start, trained if it is missing; None without a trunk."""
        if not config.training.trunk_steps:
            return None
        trunk = trunk_config(config)
        return self.load(trunk, 1, self.obtain(trunk, 1, device, on_progress), device)

    def weights(self, banked: Banked) -> Path:
        """Return the path of the expert's averaged weights."""
        return self._entry(banked.id) / f"weights-{banked.steps:06d}.safetensors"

    def load(self, config: Config, number: int, banked: Banked, device: torch.device | str = "cpu") -> Denoiser:
        """Return the network with the expert's averaged weights."""
        return read_expert(config, number, self.weights(banked), device)

    def _entry(self, key: str) -> Path:
        return self.folder / key[:2] / key

    def _find(self, key: str, steps: int) -> Banked | None:
        found = self._known.get((key, steps)) or _read_records(self._entry(key)).get(str(steps))
        if found is None or not self.weights(found).is_file():  # never trained, or evicted by another process
            return None
        self._known[key, steps] = found
        return found

    def _train(self, key: str, config: Config, number: int, device: torch.device | str, on_progress: OnProgress) -> Banked:
        """Train from the entry's state, unless that has more steps, and write weights, state and record."""
        entry, steps = self._entry(key), config.training.steps
        records = _read_records(entry)
        earlier = [record for record in records.values() if record.steps <= steps]
        curve = dict(max(earlier, key=lambda record: record.steps).curve) if earlier else {}

        def remember(progress: Progress) -> None:
            curve[progress.step] = progress.loss  # a training whose state was evicted repeats its first steps
            on_progress(progress)

        state = entry / _STATE
        training = run_training(config, number, self.data, state, device, remember, trunk=self.trunk(config, device))
        self.passes += training.passes
        expert = training.averaged.module.eval()
        loss = interval_loss(expert, config, number, self.held_out, device)
        cost = ensemble_cost(config).experts[number - 1]
        record = Banked(key, steps, loss.mean, loss.error, cost.params, cost.macs, _in_order(curve.items()))
        save_expert(expert, config, number, self.data, self.weights(record))
        if steps >= max((other.steps for other in records.values()), default=0):
            training.save(state)
        KeptStates(state).remove_previous()
        _write_records(entry, records | {str(steps): record})
        return record

    def _lease(self, entry: Path) -> None:
        """Write a lease of this search into ``entry``."""
        if self._search is None:
            return
        lease = entry / f"{stable_id(str(self._search))}{_LEASE}"
        with suppress(OSError):  # a bank that may only be read
            if not lease.exists():
                write_text(lease, str(self._search))

    def _evict(self) -> None:
        """Delete files until the bank is under its limit: first states, then whole entries, least recently used first.

        Entries stay if this bank or another running search uses them, or if they are being trained.
        """
        if self.limit_gib is None:
            return
        excess = _size(self.folder) - self.limit_gib * 2**30
        if excess <= 0:
            return
        used = {entry: _used_at(entry) for entry in self.folder.glob("??/*") if entry.name not in self._asked}
        idle = sorted((moment, entry) for entry, moment in used.items() if moment is not None)
        running = cache(is_held)
        for part in (_STATE, ""):
            for _, entry in idle:
                if excess <= 0:
                    return
                excess -= _removed(entry, part, running)


def _claim(folder: Path, content_id: str) -> None:
    """Make ``folder`` a bank of these data. Raises ``UserError`` if it is one of other data or format, or can't be used."""
    label = folder / _LABEL
    try:
        if not label.exists():
            if folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
                raise UserError(f"bank: {folder} holds other files; give an empty folder, or that of a bank")
            write_text(label, json.dumps({"format": FORMAT, "data": content_id}))
        text = label.read_bytes()
    except OSError as error:
        raise UserError(f"bank: {folder} can't be used ({error.strerror}); give another --bank") from None
    kind, data = _read_label(text, label)
    if kind != FORMAT:
        raise UserError(f"bank: {folder} is of format {kind!r:.40}, and this program reads {FORMAT}; give another --bank")
    if data != content_id:
        raise UserError(f"bank: the experts in {folder} were trained on other data or another image size; give another --bank")


def _read_label(text: bytes, label: Path) -> tuple[int, str]:
    """Return format and data's content id from the text of a label. Raises ``UserError`` if it is not readable."""
    try:
        content = json.loads(text)
        return content["format"], content["data"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"bank: {label} is not readable; give another --bank") from None


def _read_records(entry: Path) -> dict[str, Banked]:
    """Return the entry's complete experts by number of steps; empty if it is missing or damaged, so that it is made again."""
    try:
        records = _RECORDS.validate_json((entry / _ENTRY).read_bytes())
    except (OSError, ValueError):
        return {}
    whole = all(record.id == entry.name and str(record.steps) == steps for steps, record in records.items())
    return records if whole else {}


def _write_records(entry: Path, records: dict[str, Banked]) -> None:
    write_text(entry / _ENTRY, json.dumps({steps: asdict(record) for steps, record in records.items()}))


def _in_order(curve: Iterable[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    return tuple((int(step), float(loss)) for step, loss in sorted(curve))


def _touch(entry: Path) -> None:
    """Set the time of last use, which orders evictions."""
    try:
        os.utime(entry)
    except OSError:  # evicted just now, or a bank that may only be read
        return


def _used_at(entry: Path) -> float | None:
    """Return the time of last use; None if another process has just evicted the entry."""
    try:
        return entry.stat().st_mtime
    except OSError:
        return None


def _size(folder: Path) -> int:
    """Return the bytes of all weights and states below ``folder``, without files that are deleted meanwhile."""
    size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            if name.endswith(".safetensors"):
                with suppress(FileNotFoundError):
                    size += os.stat(os.path.join(place, name)).st_size
    return size


def _is_leased(entry: Path, running: Callable[[Path], bool]) -> bool:
    """Return True if ``entry`` has a lease of a search for whose lock ``running`` returns True."""
    for lease in entry.glob(f"*{_LEASE}"):
        with suppress(OSError, ValueError):
            if running(Path(lease.read_text(encoding="utf-8"))):
                return True
    return False


def _removed(entry: Path, part: str, running: Callable[[Path], bool]) -> int:
    """Remove the file ``part`` of an entry, or all of it if ``part`` is empty, and return the bytes freed.

    Nothing is removed if the entry is leased or being trained.
    """
    try:
        with filelock.FileLock(entry / ".lock").acquire(timeout=0):
            if _is_leased(entry, running):
                return 0
            before = _size(entry)
            if part:
                (entry / part).unlink(missing_ok=True)
                return before - _size(entry)
            return before if _is_gone(entry, running) else 0
    except (filelock.Timeout, FileNotFoundError):  # in use, or evicted by another process
        return 0


def _is_gone(entry: Path, running: Callable[[Path], bool]) -> bool:
    """Hide ``entry`` and delete it, and return True. If a search leased it in between, restore it and return False."""
    hidden = entry.with_name(f".{entry.name}.{uuid4().hex}")
    entry.rename(hidden)
    if _is_leased(hidden, running):
        with suppress(OSError):  # it is being trained again already
            hidden.rename(entry)
            return False
    shutil.rmtree(hidden, ignore_errors=True)
    return True
