"""A Ray cluster that others started: joining it, what room it has, and whether its nodes see our files."""

import logging
import os
import socket
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import ray
import ray._private.utils
from ray.exceptions import AuthenticationError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import meme
import meme_nas
import search_spaces
from meme.errors import UserError, in_one_line, printable
from meme.support.files import CACHE_VARIABLE, INCEPTION_VARIABLE, write_text
from meme.support.signals import terminate_on_sigterm

HANDED_ON = (CACHE_VARIABLE, INCEPTION_VARIABLE, "MEME_INCEPTION_SHA256")
REACH_SECONDS = 10
NODE_SECONDS = 120  # for a node to answer, its environment made first


def join(address: str) -> str | None:
    """Connect this process to the cluster at ``address``, unless it is; the address of the dashboard, where there is one.

    Our code is sent along, so that all nodes run the same; what it imports must be installed on them. ``UserError`` where there
    is no cluster, or one of another version.
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
    terminate_on_sigterm()  # Ray takes the signal for itself, and would end this process as if nothing had to be put in order
    return context.dashboard_url


@contextmanager
def printable_command() -> Iterator[None]:
    """Have Ray note this process's command line, for its dashboard, with escapes for what is not UTF-8.

    The bytes of such a path, of data or of a study, would keep Ray from starting.
    """
    noted = ray._private.utils.get_entrypoint_name
    ray._private.utils.get_entrypoint_name = lambda: printable(noted())
    try:
        yield
    finally:
        ray._private.utils.get_entrypoint_name = noted


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
