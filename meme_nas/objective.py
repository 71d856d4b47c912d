"""A task to an outcome: train at proxy length, sample, score. Runs in a worker process, one per trial at a time."""

import gc
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from meme.config import Config
from meme.data import Images, TrainingData
from meme.features import FeatureSpace, choose_features
from meme.grids import save_grid
from meme.pipeline import OnMessage, Score, evaluate, open_reference, pick_device, train, training_data
from meme_nas.progress import ProgressFile
from meme_nas.study import trial_folder
from meme_nas.trial import Outcome, Task


@dataclass(frozen=True)
class Basis:
    """What all trials of a study share."""

    images: Images
    data: TrainingData
    """What experts train on: the images, or their latents."""
    space: FeatureSpace


def open_basis(
    config: Config,
    device: str,
    inception_weights: Path | None,
    *,
    strict: bool = False,
    on_message: OnMessage = lambda message: None,
) -> Basis:
    """Open a study's data and feature space; ``UserError`` for what is wrong with them."""
    images, chosen = open_reference(config, strict=strict, on_message=on_message), pick_device(device)
    kind = config.evaluation.features
    space = choose_features(kind, images, inception_weights=inception_weights, device=chosen, on_message=on_message)
    return Basis(images, training_data(config, images, chosen, on_message), space)


_opened: dict[tuple, Basis] = {}  # by a worker process, which serves one study at a time


@dataclass(frozen=True)
class Objective:
    """``objective(task)`` trains and scores the task's config; whatever goes wrong is raised."""

    folder: Path
    """The study's folder; a trial leaves its weights and samples in ``trials/NNN``."""
    device: str = "auto"
    threads: int = 1
    inception_weights: Path | None = None

    def __call__(self, task: Task) -> Outcome:
        torch.set_num_threads(self.threads)
        try:
            return self._train_and_score(task)
        finally:
            _free_memory()

    def _train_and_score(self, task: Task) -> Outcome:
        config = task.config
        device, folder = pick_device(self.device), trial_folder(self.folder, task.number)
        basis = self._basis(config)
        begun_at, begun = time.time(), time.perf_counter()
        progress = ProgressFile(folder, len(config.experts))
        ensemble = train(
            config,
            basis.data,
            folder=folder,
            device=device,
            on_progress=lambda now: progress.report(now.expert, now.step, now.steps),
        )
        training_seconds = time.perf_counter() - begun
        score = evaluate(ensemble, basis.images, basis.space, device=device)
        save_grid(folder / "samples.png", score.grid)
        progress.remove()
        return outcome_of(task.number, score, begun_at, training_seconds)

    def _basis(self, config: Config) -> Basis:
        key = (config.data, config.pixels, config.first_stage, config.network.classes, config.evaluation.features)
        if key not in _opened:
            _opened.clear()
            _opened[key] = open_basis(config, self.device, self.inception_weights)
        return _opened[key]


def outcome_of(number: int, score: Score, begun_at: float, training_seconds: float) -> Outcome:
    """A score as the outcome of trial ``number``."""
    return Outcome(
        number,
        fid=score.fid,
        macs=score.macs,
        params=score.params,
        latency_ms=score.latency_ms,
        features=score.features,
        begun_at=begun_at,
        training_seconds=training_seconds,
        sampling_seconds=score.sampling_seconds,
        scoring_seconds=score.scoring_seconds,
    )


def _free_memory() -> None:
    """After an out-of-memory failure the next trial must find what this one held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
