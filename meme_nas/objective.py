"""A task to an outcome: train at proxy length, sample, score. Runs in a worker process, one per trial at a time."""

import gc
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from meme.config import ImageConfig
from meme.data import Images
from meme.features import FeatureSpace, choose_features
from meme.grids import save_grid
from meme.pipeline import Score, evaluate, open_training_data, pick_device, train
from meme_nas.progress import ProgressFile
from meme_nas.study import trial_folder
from meme_nas.trial import Outcome, Task


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
        images, space = scoring_basis(config.data, config.image, config.evaluation.features, self.device, self.inception_weights)
        device, folder = pick_device(self.device), trial_folder(self.folder, task.number)
        begun_at, begun = time.time(), time.perf_counter()
        progress = ProgressFile(folder, len(config.experts))
        ensemble = train(
            config,
            images,
            folder=folder,
            device=device,
            on_progress=lambda now: progress.report(now.expert, now.step, now.steps),
        )
        training_seconds = time.perf_counter() - begun
        score = evaluate(ensemble, images, space, device=device)
        save_grid(folder / "samples.png", score.grid)
        progress.remove()
        return outcome_of(task.number, score, begun_at, training_seconds)


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


@lru_cache(maxsize=2)
def scoring_basis(
    data: str, image: ImageConfig, features: str, device: str, inception_weights: Path | None
) -> tuple[Images, FeatureSpace]:
    """The data of a study and the feature space it is scored in: opened once in each process."""
    images = open_training_data(data, image)
    return images, choose_features(features, images, inception_weights=inception_weights, device=pick_device(device))


def _free_memory() -> None:
    """After an out-of-memory failure the next trial must find what this one held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
