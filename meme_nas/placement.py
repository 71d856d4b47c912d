"""Where trials run: how many at a time this machine or cluster holds, and the engine that runs them."""

import os
from collections.abc import Callable

import torch

from meme.console import remarks
from meme.ensemble import Ensemble
from meme.pipeline import pick_device, train
from meme_nas.engines import Engine
from meme_nas.settings import LEAST_LAG, SearchSettings


def room_for_trials(settings: SearchSettings) -> int:
    """Trials that the cores (and GPUs) of this machine, or of the cluster to join, hold at a time."""
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
    """Trials at a time: as told, else what the machine holds; no more than proposals or the budget leave work for."""
    return min(settings.workers or room_for_trials(settings), settings.proposal_lag or LEAST_LAG, settings.budget)


def gpus_a_trial(settings: SearchSettings) -> float:
    """The share of a GPU that a trial on Ray takes: 0 where there is none, or none is wanted."""
    if settings.ray_address and settings.device == "auto":
        from meme_nas.engines import ray_cluster

        ray_cluster.join(settings.ray_address)  # unless it is: before a full training, and where a study goes on, it is not
        on_gpu = ray_cluster.has_gpus()
    else:
        on_gpu = pick_device(settings.device).type == "cuda"
    return settings.gpus_per_trial if on_gpu else 0


def open_engine(settings: SearchSettings, workers: int) -> Engine:
    if settings.engine == "local":
        from meme_nas.engines.local import LocalEngine

        remarks.print(f"{workers} trials at a time in processes of this machine")
        return LocalEngine(workers, gpus=torch.cuda.device_count() if settings.device in ("auto", "cuda") else 0)
    from meme_nas.engines.ray import RayEngine

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
        remarks.print("  (it asks for the token that this prints: .venv/bin/ray get-auth-token)")
    return engine


def training_of(settings: SearchSettings) -> Callable[..., Ensemble]:
    """How the winner's experts are trained: one after the other here, or side by side on Ray."""
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
