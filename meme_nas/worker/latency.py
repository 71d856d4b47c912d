"""Latency of networks, measured once for each kind of device and recorded in the study's folder.

A file holds one network on one kind of device: all that determines the measurement, and the milliseconds. The first recorded
value is final, so limits, costs and scores of one study are the same numbers in every process and after every interruption. If a
file is damaged or holds something else, the network is measured again and the file is replaced.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import filelock
import torch

from meme.config.schema import Config, stable_id
from meme.errors import UserError, in_one_line
from meme.pipeline import OnMessage, pick_device
from meme.scoring.cost import TimedNetwork, measure_pass_ms, passes_of, timed_network
from meme.support.devices import DeviceKind, device_kind
from meme.support.files import NO_ROOM, write_text
from meme.support.threads import threads
from meme_nas.record.folder import latency_folder
from meme_nas.record.tasks import SearchFault

DEVICE, LOCK = "device.json", ".lock"
MANY = 8  # networks in one call, from which a message is printed before their measurement


@dataclass(frozen=True)
class LatencyRecord:
    """Latencies recorded in a study."""

    study: Path

    @property
    def folder(self) -> Path:
        return latency_folder(self.study)

    def find(self, timed: TimedNetwork, kind: DeviceKind) -> float | None:
        """Return the milliseconds of a pass; None if no readable file has them."""
        facts = _facts(timed, kind)
        content = _read(self._path(facts))
        value = content.pop("pass_ms", None)
        return value if content == facts and isinstance(value, float) and 0 < value < math.inf else None

    def keep(self, timed: TimedNetwork, kind: DeviceKind, pass_ms: float) -> float:
        """Record ``pass_ms`` unless there is a value already, and return the recorded value."""
        facts = _facts(timed, kind)
        return self._first(lambda: self.find(timed, kind), self._path(facts), facts | {"pass_ms": pass_ms}) or pass_ms

    @property
    def device(self) -> DeviceKind | None:
        """Kind of device on which the search's limits and costs were first measured; None before that."""
        content = _read(self.folder / DEVICE)
        type_, name = content.get("type"), content.get("name")
        return DeviceKind(type_, name) if isinstance(type_, str) and isinstance(name, str) else None

    def note_device(self, kind: DeviceKind) -> None:
        """Record the kind of device on which limits and costs are measured, unless one is recorded."""
        if self.device is None:
            self._first(lambda: self.device, self.folder / DEVICE, asdict(kind))

    def _path(self, facts: dict[str, Any]) -> Path:
        return self.folder / f"{stable_id(facts)}.json"

    def _first(self, find: Callable[[], Any], path: Path, content: dict[str, Any]) -> Any:
        """Write ``content`` to ``path`` unless ``find`` returns a value, and return what ``find`` returns after that.

        A lock excludes other processes. Raises ``SearchFault`` if the folder can't be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(self.folder / LOCK):
                if find() is None:
                    write_text(path, json.dumps(content, indent=1))
                return find()
        except OSError as error:
            hint = "; make room, and the same command goes on from here" if error.errno in NO_ROOM else ""
            raise SearchFault(f"latency: {path} can't be written ({error.strerror}){hint}") from None


@dataclass(frozen=True)
class LatencyMeter:
    """Function for workers that returns the milliseconds of one pass through each network.

    Values are taken from the record, or measured and recorded.
    """

    study: Path
    device: str = "auto"
    threads: int = 1
    measure: Callable[[TimedNetwork, torch.device], float] = measure_pass_ms

    @property
    def kind(self) -> DeviceKind:
        """Kind of the device on which this process measures."""
        return device_kind(pick_device(self.device), self.threads)

    def __call__(self, networks: Sequence[TimedNetwork]) -> list[float]:
        record, kind, device = LatencyRecord(self.study), self.kind, pick_device(self.device)
        try:
            with threads(self.threads):
                return [self._of(network, record, kind, device) for network in networks]
        finally:
            if device.type == "cuda":
                torch.cuda.empty_cache()  # trials use the same GPU

    def _of(self, network: TimedNetwork, record: LatencyRecord, kind: DeviceKind, device: torch.device) -> float:
        if (found := record.find(network, kind)) is not None:
            return found
        return record.keep(network, kind, self.measure(network, device))

    def ensemble_ms(self, config: Config) -> float:
        """Return the milliseconds an image takes through all sampler steps of ``config``."""
        numbers, type_ = range(1, len(config.experts) + 1), self.kind.type
        passes = self([timed_network(config, number, type_) for number in numbers])
        return sum(passes_of(config, number) * ms for number, ms in zip(numbers, passes, strict=True))


class Measuring(Protocol):
    """Caller of a ``LatencyMeter`` in a process like a trial's."""

    @property
    def kind(self) -> DeviceKind: ...

    def __call__(self, networks: Sequence[TimedNetwork]) -> list[float]: ...


class RecordedLatency:
    """Function for the driver that returns the milliseconds an image takes through all sampler steps of each expert.

    Every value is from the record. Networks that the record lacks are measured by ``measuring``, all in one call.
    """

    def __init__(self, record: LatencyRecord, measuring: Measuring, on_message: OnMessage = lambda message: None):
        self._record, self._measuring, self._on_message = record, measuring, on_message
        self._known: dict[TimedNetwork, float] = {}

    @cached_property
    def kind(self) -> DeviceKind:
        """Kind of the device on which latency is measured."""
        kind = self._measuring.kind
        self._record.note_device(kind)
        return kind

    def __call__(self, experts: Sequence[tuple[Config, int]]) -> list[float]:
        networks = [timed_network(config, number, self.kind.type) for config, number in experts]
        for network in {network: None for network in networks if network not in self._known}:
            if (found := self._record.find(network, self.kind)) is not None:
                self._known[network] = found
        if missing := [*{network: None for network in networks if network not in self._known}]:
            self._known |= zip(missing, self._measured(missing), strict=True)
        return [passes_of(*expert) * self._known[network] for expert, network in zip(experts, networks, strict=True)]

    def _measured(self, networks: Sequence[TimedNetwork]) -> list[float]:
        if len(networks) >= MANY:
            self._on_message(f"measuring the latency of {len(networks)} networks on {self.kind.name}")
        try:
            return self._measuring(networks)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"latency_ms: can't be measured ({type(error).__name__}: {in_one_line(error)})") from None


def _facts(timed: TimedNetwork, kind: DeviceKind) -> dict[str, Any]:
    """Return all that determines a measurement, as JSON types."""
    return {"device": asdict(kind), **timed.facts()}


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file; empty if it is missing, damaged or no mapping."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
