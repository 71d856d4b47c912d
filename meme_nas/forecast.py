"""How long a search will take here: from a few training steps of the hand-made pattern, timed on images of zeros."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from meme.config import Config
from meme.cost import ensemble_cost
from meme.data import Images
from meme.pipeline import pick_device
from meme.trainer import run_training
from meme_nas.settings import SearchSettings

PASSES_A_STEP = 3  # forward, and twice as much backward
TIMED_STEPS = 2
MOST_MACS_ON_A_CPU = 5e10  # in a timed step, about a second; of larger batches a part is timed


def search_seconds(settings: SearchSettings, workers: int) -> float:
    """Of the trainings and scores that the budget pays for, ``workers`` of them at a time; an audit comes on top.

    Architectures differ little in this, and cascades that share sampler steps take less.
    """
    proxy = settings.as_proxy(settings.full_config())
    with _threads(settings.cpus_per_trial):
        image_seconds = _training_seconds_an_image(proxy, pick_device(settings.device))
    trained = settings.budget * len(proxy.experts) * proxy.training.steps * proxy.training.batch_size
    scores = settings.budget * (settings.cascades_per_candidate if settings.strategy_name == "factorised" else 1)
    drawn = scores * proxy.evaluation.samples * proxy.sampling.steps
    return (trained + drawn / PASSES_A_STEP) * image_seconds / workers


def _training_seconds_an_image(config: Config, device: torch.device) -> float:
    """Of a training step of expert 1."""
    images = config.training.batch_size
    if device.type == "cpu":
        images = min(images, max(1, int(MOST_MACS_ON_A_CPU / PASSES_A_STEP / ensemble_cost(config).macs)))
    config = config.with_(training={"batch_size": images})
    _timed(config, 1, device)  # the first step allocates
    seconds = (_timed(config, 1 + TIMED_STEPS, device) - _timed(config, 1, device)) / TIMED_STEPS
    if device.type == "cuda":
        torch.cuda.empty_cache()  # trials are about to need the memory
    return seconds / images


def _timed(config: Config, steps: int, device: torch.device) -> float:
    """Seconds of a training of so many steps, its set-up included."""
    images, classes = config.training.batch_size, config.network.classes
    pixels = np.zeros((images, config.image.channels, config.image.size, config.image.size), dtype=np.uint8)
    labels = np.zeros(images, dtype=np.int64) if classes else None
    data = Images("zeros", pixels, labels, classes=(), content_id="", skipped=())
    begun = time.perf_counter()
    run_training(config.with_(training={"steps": steps}), 1, data, None, device)  # which in the end waits for the device
    return time.perf_counter() - begun


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """As many as a trial has."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
