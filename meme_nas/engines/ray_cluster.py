"""A Ray cluster that others started: joining it, what room it has, whether its nodes see our files; latency measured on one."""

import logging
import os
import socket
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import meme
import meme_nas
import search_spaces
from meme.errors import UserError, in_one_line
from meme.scoring.cost import TimedNetwork
from meme.support.devices import DeviceKind
from meme.support.files import CACHE_VARIABLE, INCEPTION_VARIABLE, write_text
from meme.support.signals import terminate_on_sigterm
from meme_nas.engines.protocols import Meter

HANDED_ON = (CACHE_VARIABLE, INCEPTION_VARIABLE, "MEME_INCEPTION_SHA256")
REACH_SECONDS = 10
NODE_SECONDS = 120  # for a node to answer, its environment made first
ATTEMPTS = 2  # to measure what takes a process down
METER_SECONDS = 600  # for it to start: beside busy trials, at Ray's niceness, imports alone take minutes
SEES_GPUS = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}  # for an actor that holds none


def join(address: str) -> str | None:
    """Connect this process to the cluster at ``address``, unless it is; the address of the dashboard, where there is one.

    Our code is sent along, so that all nodes run the same; what it imports must be installed on them. ``UserError`` where there
    is no cluster, or one of another version.
    """
    _check_address(address)
    packages = [package.__path__[0] for package in (meme, meme_nas, search_spaces)]
    try:
        context = ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"py_modules": packages, "excludes": ["__pycache__"], "env_vars": variables_handed_on()},
            ignore_reinit_error=True,
        )
    except (ConnectionError, RuntimeError, ValueError, AuthenticationError) as error:
        raise UserError(f"ray_address: no Ray cluster can be joined at {address} ({in_one_line(error)}){_on_tokens()}") from None
    terminate_on_sigterm()  # Ray takes the signal for itself, and would end this process as if nothing had to be put in order
    return context.dashboard_url


def variables_handed_on() -> dict[str, str]:
    """Our environment variables as this process has them: they decide on the feature space, which must be one for all."""
    return {name: os.environ[name] for name in HANDED_ON if name in os.environ}


def _on_tokens() -> str:
    """Ray asks for a token where its head was started on a machine that has one, and says so to nobody who comes without."""
    if os.environ.get("RAY_AUTH_MODE") == "token":
        return "; its token must be that of this machine: docs/cluster.md"
    return "; if it asks for a token, set RAY_AUTH_MODE=token: docs/cluster.md"


def _check_address(address: str) -> None:
    """``UserError`` where nobody listens: Ray itself would go on asking for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in address:
        raise UserError(f"ray_address: must be host:port, or auto for a cluster of this machine, not {address}")
    try:
        socket.create_connection((host, int(port)), timeout=REACH_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"ray_address: no Ray cluster can be joined at {address} ({error})") from None


def room(cpus: float, gpus: float) -> int:
    """Trials of ``cpus`` cores (and, unless 0, a share ``gpus`` of a GPU) that the joined cluster holds at a time."""
    return sum(_room_on(node, cpus, gpus) for node in _nodes())


def has_gpus() -> bool:
    """Whether any node of the joined cluster has a GPU."""
    return any(node["Resources"].get("GPU") for node in _nodes())


def check_shared(folder: Path, inputs: Sequence[Path] = ()) -> None:
    """``UserError`` unless every node that may run trials sees ``folder`` with what is written here, and all ``inputs``."""
    folder = folder.absolute()
    token = folder / f".seen-{uuid.uuid4().hex}"
    try:
        write_text(token, token.name)
        needed = [str(path) for path in inputs]
        for node in [node for node in _nodes() if node["Resources"].get("CPU")]:
            missing = _ask(node, str(token), needed)
            if missing:
                raise UserError(
                    f"{'study' if missing == str(token) else 'data'}: {folder if missing == str(token) else missing} is not "
                    f"visible from the cluster's node {node['NodeManagerAddress']}; put it on storage that all nodes have "
                    "under the same path"
                )
    finally:
        token.unlink(missing_ok=True)


def _ask(node: dict, token: str, inputs: list[str]) -> str | None:
    """The first of these paths that ``node`` does not see."""
    strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    answer = _unseen.options(scheduling_strategy=strategy).remote(token, inputs)
    try:
        return ray.get(answer, timeout=NODE_SECONDS)
    except ray.exceptions.TaskUnschedulableError:
        return None  # it has died, which the list of nodes does not know yet: no trial will run there
    except ray.exceptions.RayError as error:
        raise UserError(
            f"ray_address: the node {node['NodeManagerAddress']} does not run our code ({in_one_line(error)})"
        ) from None


@ray.remote(num_cpus=0, max_retries=0)
def _unseen(token: str, inputs: list[str]) -> str | None:
    """On a node: the first of these paths that is not there, or whose content is not what it should be."""
    path = Path(token)
    if not path.is_file() or path.read_text() != path.name:
        return token
    return next((path for path in inputs if not Path(path).exists()), None)


def _nodes() -> list[dict]:
    return [node for node in ray.nodes() if node["Alive"]]


def _room_on(node: dict, cpus: float, gpus: float) -> int:
    resources = node["Resources"]
    places = int(resources.get("CPU", 0) / cpus)
    return min(places, int(resources.get("GPU", 0) / gpus)) if gpus else places


@ray.remote(num_cpus=0)
class _MeasuringActor:
    def __init__(self, meter: Meter):
        self._meter = meter

    def kind(self) -> DeviceKind:
        return self._meter.kind

    def measured(self, networks: Sequence[TimedNetwork]) -> list[float]:
        return self._meter(networks)


class MeasuringNode:
    """Calls a meter in an actor on one node that has room for trials. It starts with the first question.

    The actor takes no resources: the trials' own actors hold theirs for the whole search, so that one which asked for a trial's
    would wait for ever in a cluster that is full.
    """

    def __init__(
        self,
        meter: Meter,
        address: str,
        cpus: float,
        gpus: Callable[[], float],
        folder: Path,
        wanted: DeviceKind | None = None,
    ):
        """``cpus`` and ``gpus`` of a trial; ``wanted``: the kind of device to measure on, if a node has it."""
        self._meter, self._address, self._cpus, self._gpus, self._folder = meter, address, cpus, gpus, folder
        self._wanted = wanted
        self._kind: DeviceKind | None = None
        self._actor: Any = None

    @property
    def kind(self) -> DeviceKind:
        """Kind of device of the node that measures; it stays."""
        if self._kind is None:
            self._start()
        assert self._kind is not None
        return self._kind

    def __call__(self, networks: Sequence[TimedNetwork]) -> list[float]:
        """``UserError`` where the actor dies again and again, or its node has died and no other has a device of its kind."""
        for _ in range(ATTEMPTS):
            try:
                if self._actor is None:
                    self._start()
                return ray.get(self._actor.measured.remote(networks))
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayError:  # its process or node has died, or the engine has left the cluster
                self._actor = None
        raise UserError(f"latency_ms: the process that measures it on a node died {ATTEMPTS} times (killed, or out of memory)")

    def close(self) -> None:
        """Stop the actor."""
        if self._actor is not None and ray.is_initialized():
            ray.kill(self._actor)
        self._actor = None

    def _start(self) -> None:
        """Start an actor on the first node, in order of address, whose device is of the kind that is wanted; where none is, on
        the first. ``UserError`` where that is not the kind of the answers before."""
        join(self._address)
        check_shared(self._folder)
        started = self._started()
        wanted = self._kind or self._wanted
        chosen = next((found for found in started if found[1] == wanted), None)
        if chosen is None and self._kind is None:
            chosen = next(iter(started), None)
        for actor, _ in started:
            if chosen is None or actor is not chosen[0]:
                ray.kill(actor)
        if chosen is None:
            device = f" and a device like {self._kind.name}" if self._kind else ""
            raise UserError(f"latency_ms: can't be measured: no node of the cluster that answers has room for a trial{device}")
        self._actor, self._kind = chosen

    def _started(self) -> list[tuple[Any, DeviceKind]]:
        """Return actors and the kinds of their devices, in order of address up to the first that is of the kind wanted."""
        gpus, found = self._gpus(), []
        options: dict[str, Any] = {"runtime_env": {"env_vars": SEES_GPUS}} if gpus else {}
        for node in sorted((node for node in _nodes() if _room_on(node, self._cpus, gpus)), key=_address_of):
            place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            actor = _MeasuringActor.options(scheduling_strategy=place, **options).remote(self._meter)  # type: ignore[attr-defined]
            try:
                found.append((actor, ray.get(actor.kind.remote(), timeout=METER_SECONDS)))
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayError:  # the node has died, or does not answer
                ray.kill(actor)
                continue
            if found[-1][1] == (self._kind or self._wanted or found[-1][1]):
                break
        return found


def _address_of(node: dict) -> tuple[str, str]:
    return node["NodeManagerAddress"], node["NodeID"]
