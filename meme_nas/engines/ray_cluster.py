"""Use of a Ray cluster that others started: join it, count its room, check that its nodes see our files, measure latency."""

import logging
import os
import socket
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray._private.utils
from ray.exceptions import AuthenticationError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import meme
import meme_nas
import search_spaces
from meme.errors import UserError, in_one_line, printable
from meme.scoring.cost import TimedNetwork
from meme.support.devices import DeviceKind
from meme.support.files import CACHE_VARIABLE, INCEPTION_VARIABLE, write_text
from meme.support.signals import terminate_on_sigterm
from meme_nas.engines.protocols import Meter

HANDED_ON = (CACHE_VARIABLE, INCEPTION_VARIABLE, "MEME_INCEPTION_SHA256")
REACH_SECONDS = 10
NODE_SECONDS = 120  # time for a node to answer, including the set-up of its environment
ATTEMPTS = 2  # tries of a measurement whose process dies
METER_SECONDS = 600  # time for it to start: beside busy trials, at Ray's niceness, imports alone take minutes
SEES_GPUS = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}  # so that an actor without GPU resources still sees the GPUs


def join(address: str) -> str | None:
    """Connect this process to the cluster at ``address``, unless it is connected, and return the dashboard's address or None.

    Our code is sent to the nodes, so that all run the same. Its dependencies must be installed there. Raises ``UserError`` if
    there is no cluster, or if it has another version.
    """
    _check_address(address)
    packages = [package.__path__[0] for package in (meme, meme_nas, search_spaces)]
    try:
        with printable_command():
            context = ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"py_modules": packages, "excludes": ["__pycache__"], "env_vars": variables_handed_on()},
                ignore_reinit_error=True,
            )
    except (ConnectionError, RuntimeError, ValueError, AuthenticationError) as error:
        raise UserError(f"ray_address: no Ray cluster can be joined at {address} ({in_one_line(error)}){_on_tokens()}") from None
    terminate_on_sigterm()  # Ray replaces the handler of SIGTERM by one that ends this process without clean-up
    return context.dashboard_url


@contextmanager
def printable_command() -> Iterator[None]:
    """Make Ray record this process's command line with escapes for bytes that are not UTF-8.

    Ray shows it in its dashboard. It would not start with such bytes, which the path of data or of a study may contain.
    """
    noted = ray._private.utils.get_entrypoint_name
    ray._private.utils.get_entrypoint_name = lambda: printable(noted())
    try:
        yield
    finally:
        ray._private.utils.get_entrypoint_name = noted


def variables_handed_on() -> dict[str, str]:
    """Return our environment variables that are set here. They determine the feature space, which must be equal on all nodes."""
    return {name: os.environ[name] for name in HANDED_ON if name in os.environ}


def _on_tokens() -> str:
    """Return a hint on tokens. A cluster that requires a token does not say so to a client without one."""
    if os.environ.get("RAY_AUTH_MODE") == "token":
        return "; its token must be that of this machine: docs/cluster.md"
    return "; if it asks for a token, set RAY_AUTH_MODE=token: docs/cluster.md"


def _check_address(address: str) -> None:
    """Raise ``UserError`` if nothing listens at ``address``. Ray itself would retry for minutes."""
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
    """Return the number of trials that the joined cluster holds at a time.

    A trial takes ``cpus`` cores and, unless ``gpus`` is 0, that share of a GPU.
    """
    return sum(_room_on(node, cpus, gpus) for node in _nodes())


def has_gpus() -> bool:
    """Return True if any node of the joined cluster has a GPU."""
    return any(node["Resources"].get("GPU") for node in _nodes())


def check_shared(folder: Path, inputs: Sequence[Path] = ()) -> None:
    """Raise ``UserError`` unless every node that may run trials sees ``folder``, with files written here, and all ``inputs``."""
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
    """Return the first of ``token`` and ``inputs`` that ``node`` does not see; None if it sees all."""
    strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    answer = _unseen.options(scheduling_strategy=strategy).remote(token, inputs)
    try:
        return ray.get(answer, timeout=NODE_SECONDS)
    except ray.exceptions.TaskUnschedulableError:
        return None  # the node has died and is still listed; no trial will run there
    except ray.exceptions.RayError as error:
        raise UserError(
            f"ray_address: the node {node['NodeManagerAddress']} does not run our code ({in_one_line(error)})"
        ) from None


@ray.remote(num_cpus=0, max_retries=0)
def _unseen(token: str, inputs: list[str]) -> str | None:
    """Return, on a node, the first of the paths that is missing, or ``token`` if its content is wrong."""
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
    """Actor on one node with room for trials that calls a meter. It starts at the first call.

    The actor takes no resources. The trials' actors hold theirs for the whole search, so an actor that requested a trial's
    resources would wait for ever in a full cluster.
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
        """Take ``cpus`` and ``gpus`` of a trial, and the kind of device to measure on if a node has it, ``wanted``."""
        self._meter, self._address, self._cpus, self._gpus, self._folder = meter, address, cpus, gpus, folder
        self._wanted = wanted
        self._kind: DeviceKind | None = None
        self._actor: Any = None

    @property
    def kind(self) -> DeviceKind:
        """Kind of device of the node that measures. It does not change."""
        if self._kind is None:
            self._start()
        assert self._kind is not None
        return self._kind

    def __call__(self, networks: Sequence[TimedNetwork]) -> list[float]:
        """Return the meter's result.

        Raises ``UserError`` if the actor dies ``ATTEMPTS`` times, or its node has died and no other has a device of its kind.
        """
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
        """Start an actor on the first node, in order of address, with a device of the wanted kind, or on the first node of all.

        Raises ``UserError`` if no node has room, or none has the kind of device of earlier calls.
        """
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
        """Return started actors and the kinds of their devices, in order of address, up to the first of the wanted kind."""
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
