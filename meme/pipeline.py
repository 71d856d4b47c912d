"""Train all experts, sample, score: the one path that proxy, finalist and full training share.

A trained ensemble is a folder: ``config.yaml`` and an ``expert-N.safetensors`` for every expert.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from meme.config import Config, ImageConfig
from meme.cost import ensemble_cost
from meme.data import Images, open_images
from meme.ensemble import Ensemble
from meme.errors import UserError
from meme.features import FeatureSpace
from meme.metrics import frechet_distance, reference_statistics, statistics
from meme.sampler import draw_images
from meme.trainer import OnProgress, load_expert, train_expert

GRID_IMAGES = 64


@dataclass(frozen=True)
class Score:
    """What one sampling seed says of a trained ensemble."""

    fid: float
    features: str
    """Name of the feature space; distances of different spaces do not compare."""
    samples: int
    macs: float
    """Mean over the sampler's steps of one image's multiply-accumulates a step, attention counted."""
    params: int
    """Sum over the experts."""
    latency_ms: float
    """Measured wall time an image takes through all sampler steps, at the sampling batch size, on the device that scored."""
    sampling_seconds: float
    scoring_seconds: float
    grid: Tensor
    """The first images drawn: uint8 (up to 64, C, H, W)."""


def pick_device(choice: str) -> torch.device:
    """``auto`` is the first GPU if there is one, else the CPU; ``UserError`` for a device that is not there."""
    if choice == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if choice.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("device: there is no CUDA device here; allowed are auto and cpu")
    try:
        return torch.device(choice)
    except RuntimeError:
        raise UserError(f"device: allowed are auto, cpu, cuda and cuda:N, not {choice!r}") from None


def open_training_data(
    data: str, image: ImageConfig, *, strict: bool = False, on_message: Callable[[str], None] = lambda message: None
) -> Images:
    """The images that ``data`` names, at the size and channels the network takes; unreadable files are skipped or refused."""
    if image.space == "latents":
        raise UserError("image.space: these are latents of a first stage, and this version trains on pixels only")
    if not data:
        raise UserError("data: name a folder or a zip of images, or digits")
    return open_images(data, size=image.size, channels=image.channels, strict=strict, on_message=on_message)


def train(
    config: Config,
    images: Images,
    *,
    folder: Path | None = None,
    device: torch.device | str = "cpu",
    on_progress: OnProgress = lambda progress: None,
) -> Ensemble:
    """Train every expert in turn. With a ``folder`` the result is kept there, and the same call again continues it."""
    if folder:
        claim_folder(folder, config)
    experts = [
        train_expert(config, number, images, folder=folder, device=device, on_progress=on_progress)
        for number in range(1, len(config.experts) + 1)
    ]
    return Ensemble(config, experts)


def claim_folder(folder: Path, config: Config) -> None:
    """Write the config into a new folder; ``UserError`` if the folder holds the training of another config."""
    path = folder / "config.yaml"
    try:
        if path.exists() and Config.load(path).architecture_id != config.architecture_id:
            raise UserError(f"out: {folder} holds a training with other settings; give another folder")
        config.save(path)
    except OSError as error:
        raise UserError(f"out: {folder} can't be written ({error.strerror})") from None


def load_ensemble(folder: Path, device: torch.device | str = "cpu") -> Ensemble:
    """A trained ensemble from its folder."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: not a trained ensemble (it has no config.yaml)")
    config = Config.load(folder / "config.yaml")
    return Ensemble(config, [load_expert(config, number, folder, device) for number in range(1, len(config.experts) + 1)])


def draw(ensemble: Ensemble, count: int, seed: int, device: torch.device | str = "cpu") -> Iterator[Tensor]:
    """Yield ``count`` images in batches, uint8 (B, C, H, W); image i is a function of (weights, seed, i)."""
    config = ensemble.config
    return draw_images(ensemble.denoise, count, config.image, config.diffusion, config.sampling, seed, device)


def evaluate(
    ensemble: Ensemble,
    images: Images,
    space: FeatureSpace,
    *,
    seed: int | None = None,
    device: torch.device | str = "cpu",
) -> Score:
    """Score ``ensemble`` against ``images`` with the sampling noise of ``seed`` (default: the config's)."""
    config = ensemble.config
    begun = time.perf_counter()
    drawn = _Drawn(draw(ensemble, config.evaluation.samples, config.evaluation.seed if seed is None else seed, device))
    sampled = statistics(space(batch) for batch in drawn)
    fid = frechet_distance(sampled, reference_statistics(images, space))
    cost = ensemble_cost(config)
    return Score(
        fid=fid,
        features=space.name,
        samples=config.evaluation.samples,
        macs=cost.macs,
        params=cost.params,
        latency_ms=1000 * drawn.seconds / config.evaluation.samples,
        sampling_seconds=drawn.seconds,
        scoring_seconds=time.perf_counter() - begun - drawn.seconds,
        grid=torch.cat(drawn.first),
    )


class _Drawn:
    """Passes batches of images on, noting how long drawing them took and keeping the first few."""

    def __init__(self, batches: Iterator[Tensor]):
        self._batches = batches
        self.seconds = 0.0
        self.first: list[Tensor] = []

    def __iter__(self) -> Iterator[Tensor]:
        missing = GRID_IMAGES
        while True:
            begun = time.perf_counter()
            batch = next(self._batches, None)
            if batch is None:
                return
            if batch.is_cuda:
                torch.cuda.synchronize()
            self.seconds += time.perf_counter() - begun
            self.first.append(batch[:missing].cpu())
            missing -= len(self.first[-1])
            yield batch
