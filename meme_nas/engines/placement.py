"""Placement of trials: the engine, the number of trials at a time on this machine or cluster, and checks of file locations."""

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from meme.cli.console import remarks
from meme.config.schema import Config
from meme.data.images import check_outside, existing
from meme.diffusion.ensemble import Ensemble
from meme.errors import UserError
from meme.pipeline import pick_device, train
from meme.support.devices import DeviceKind
from meme.support.files import cache_folder
from meme_nas.engines.protocols import Engine, Measuring, Meter
from meme_nas.settings import LEAST_LAG, SearchSettings

NICENESS_VARIABLE, RAY_NICENESS = "RAY_worker_niceness", 15  # niceness that Ray adds to its workers, unless the variable is set
LONGEST_SOCKET_PATH = 107  # bytes, on Linux
SOCKET_IN_TMPDIR = "ray/session_2000-01-01_00-00-00_000000_0000000/sockets/plasma_store"  # with the longest ids


def check_places(settings: SearchSettings, config: Config) -> None:
    """Raise ``UserError`` if the data are missing, or if a folder that the search writes would be inside them."""
    if config.data == "digits" or not config.data:
        return
    data = existing(config.data)
    for field, place in {"study": settings.folder, "bank": settings.bank_folder, "MEME_CACHE": cache_folder()}.items():
        check_outside(data, place, field)


def check_engine(settings: SearchSettings) -> None:
    """Raise ``UserError`` if Ray cannot start here, for reasons that Ray's own errors do not name."""
    if settings.engine != "ray":
        return
    if os.path.expanduser("~") == "~":  # no HOME, and no passwd entry of the user, as in containers
        raise UserError("engine: Ray needs a home folder, which this user has not; name one in HOME, or take --engine local")
    for field, what, place in (("engine", "works in", Path.cwd()), ("study", "writes to", settings.folder.absolute())):
        if not _is_utf8(place):
            raise UserError(
                f"{field}: Ray {what} no folder whose path is not UTF-8, as {place}; rename it, or take --engine local"
            )
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    length = len(os.fsencode(os.path.join(folder, SOCKET_IN_TMPDIR)))
    if length > LONGEST_SOCKET_PATH and not settings.ray_address:
        raise UserError(
            f"engine: Ray's sockets in {folder} would have paths of {length} bytes, and {LONGEST_SOCKET_PATH} is the most; "
            "name a shorter folder in RAY_TMPDIR, or take --engine local"
        )


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def room_for_trials(settings: SearchSettings) -> int:
    """Return the number of trials that the cores (and GPUs) of this machine, or of the cluster to join, hold at a time."""
    if settings.engine == "ray" and settings.ray_address:
        from meme_nas.engines import ray_cluster

        ray_cluster.join(settings.ray_address)
        return max(1, ray_cluster.room(settings.cpus_per_trial, gpus_a_trial(settings)))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    room = cores // settings.cpus_per_trial
    if pick_device(settings.device).type == "cuda":
        room = min(room, int(torch.cuda.device_count() / settings.gpus_per_trial))
    return max(1, room)


def workers_for(settings: SearchSettings) -> int:
    """Return the number of trials at a time: that of the settings, else what the machine holds.

    It is at most the proposal lag and the budget, beyond which workers would have no work.
    """
    return min(settings.workers or room_for_trials(settings), settings.proposal_lag or LEAST_LAG, settings.budget)


def gpus_a_trial(settings: SearchSettings) -> float:
    """Return the share of a GPU that a trial on Ray takes; 0 if there is no GPU, or the settings exclude it."""
    if settings.ray_address and settings.device == "auto":
        from meme_nas.engines import ray_cluster

        ray_cluster.join(settings.ray_address)  # for a full training or a resumed study; else it has joined already
        on_gpu = ray_cluster.has_gpus()
    else:
        on_gpu = pick_device(settings.device).type == "cuda"
    return settings.gpus_per_trial if on_gpu else 0


def open_engine(settings: SearchSettings, workers: int) -> Engine:
    if settings.engine == "local":
        from meme_nas.engines.local import LocalEngine

        remarks.print(f"{workers} trials at a time in processes of this machine")
        return LocalEngine(workers, gpus=_gpus_here(settings))
    from meme_nas.engines.ray import RayEngine, token_command

    remarks.print(f"joining the Ray cluster at {settings.ray_address} ..." if settings.ray_address else "starting Ray ...")
    engine = RayEngine(
        workers,
        settings.cpus_per_trial,
        gpus_a_trial(settings),
        settings.folder,
        address=settings.ray_address,
        dashboard_host=settings.dashboard_host,
        inputs=settings.inputs,
    )
    remarks.print(f"{workers} trials at a time on Ray; dashboard: {engine.dashboard or 'could not be started'}")
    if engine.asks_for_token:
        remarks.print(f"  (it asks for the token that this prints: {token_command()})")
    return engine


def open_measuring(settings: SearchSettings, meter: Meter, wanted: DeviceKind | None) -> Measuring:
    """Return an object that calls ``meter`` in a process like a trial's. The process starts at the first call.

    In a cluster it is on a node with a device of the kind ``wanted``, if there is one.
    """
    if settings.engine == "ray" and settings.ray_address:
        from meme_nas.engines.ray_cluster import MeasuringNode

        return MeasuringNode(
            meter, settings.ray_address, settings.cpus_per_trial, partial(gpus_a_trial, settings), settings.folder, wanted
        )
    from meme_nas.engines.measuring import MeasuringProcess

    niceness = int(os.environ.get(NICENESS_VARIABLE, RAY_NICENESS)) if settings.engine == "ray" else 0
    return MeasuringProcess(meter, _gpus_here(settings), niceness)


def _gpus_here(settings: SearchSettings) -> int:
    """Return the number of GPUs that the workers of this machine take in turn; 0 if they all have the same device."""
    return torch.cuda.device_count() if settings.device in ("auto", "cuda") else 0


def training_of(settings: SearchSettings) -> Callable[..., Ensemble]:
    """Return the function that trains the winner in full: its experts one after the other here, or side by side on Ray."""
    if settings.engine == "local":
        return train
    from meme_nas.engines.ray_training import RayTraining

    return RayTraining(
        cpus=settings.cpus_per_trial,
        on_gpus=gpus_a_trial(settings) > 0,
        workers_per_expert=settings.workers_per_expert,
        address=settings.ray_address,
        dashboard_host=settings.dashboard_host,
        inputs=settings.inputs,
        on_message=remarks.print,
    )
