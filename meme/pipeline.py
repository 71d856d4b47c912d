"""Train all experts, sample, score: the one path that proxy, finalist and full training share.

A trained ensemble is a folder: ``config.yaml`` and an ``expert-N.safetensors`` for every expert.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from meme.config.schema import Config
from meme.data.first_stage import open_first_stage
from meme.data.images import LARGEST_ENLARGEMENT, Images, TrainingData, open_images
from meme.data.latents import Latents, latents_of
from meme.diffusion.ensemble import Ensemble, OneAtATime
from meme.diffusion.sampler import draw_images, sampling_timesteps
from meme.errors import UserError
from meme.network.pretrained import identified
from meme.scoring.cost import ensemble_cost
from meme.scoring.features import FeatureSpace
from meme.scoring.metrics import Measured, Metric, measure, require_images, require_metrics
from meme.support.devices import wait_for
from meme.support.folder_lock import FolderLock
from meme.training.trainer import OnProgress, check_expert, expert_file, is_finished, load_expert, train_expert, train_trunk

LOCK = ".training.lock"
GRID_IMAGES = 64
OnMessage = Callable[[str], None]


@dataclass(frozen=True)
class Score:
    """The scores of a trained ensemble with one sampling seed."""

    measured: dict[Metric, Measured]
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
    passes: int
    """Images that went through an expert, once for every sampler step that was taken here."""
    grid: Tensor
    """The first images drawn: uint8 (up to 64, C, H, W)."""

    @property
    def fid(self) -> float:
        """The FID; only where it was among the requested metrics."""
        return self.measured["fid"].value


def pick_device(choice: str) -> torch.device:
    """Return the device of that name; ``auto`` is the first GPU if there is one, else the CPU. Raises ``UserError`` for a
    device that does not exist."""
    has_gpu = torch.cuda.is_available()  # which a driver too old for this torch says no to, though it counts GPUs
    here = ["auto", "cpu"]
    if has_gpu:
        here += ["cuda", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        here.append("mps")
    if choice not in here:
        raise UserError(f"device: must be one of {', '.join(here)} on this machine, not {choice!r}")
    return torch.device(("cuda" if has_gpu else "cpu") if choice == "auto" else choice)


def open_reference(
    config: Config, *, strict: bool = False, fresh: bool = False, on_message: OnMessage = lambda message: None
) -> Images:
    """Open the images that ``config.data`` names, in their own pixels. Unreadable files are skipped, or refused if ``strict``.

    With ``fresh``, files are read again even where the cache holds them.

    Raises ``UserError`` where the images do not fit the config: no data, or other classes than those of a class-conditional
    network.
    """
    if not config.data:
        raise UserError("data: name a folder or a zip of images, or digits")
    size, channels = config.pixels.size, config.pixels.channels
    images = open_images(
        config.data,
        size=size,
        channels=channels,
        strict=strict,
        follow_links=config.follow_links,
        fresh=fresh,
        on_message=on_message,
    )
    _check_fit(config, images)
    return images


def _check_fit(config: Config, images: Images) -> None:
    """Raise ``UserError`` where the network's size would enlarge most images too much, where its channels would lose the colours
    of most, or where its classes are others."""
    size, wanted, found = config.pixels.size, config.network.classes, len(images.classes)
    if images.source_side and images.source_side * LARGEST_ENLARGEMENT < size:
        raise UserError(
            f"data: most images of {images.name} have {images.source_side} pixels a side, and {config.name} takes {size}: "
            f"enlarged more than {LARGEST_ENLARGEMENT} times they would teach it blur"
        )
    if config.pixels.channels == 1 and images.colour_share and images.colour_share > 0.5:
        raise UserError(f"data: most images of {images.name} are in colour, and {config.name} takes grey (image.channels 1)")
    if wanted and wanted != found:
        kind = f"{found} classes" if found else "no classes (a folder for each class names them)"
        raise UserError(f"data: {images.name} has {kind}, and {config.name} takes {wanted} (network.classes)")


def training_data(
    config: Config, images: Images, device: torch.device | str = "cpu", on_message: OnMessage = lambda message: None
) -> TrainingData:
    """Return the data that experts train on: the images, or their latents, computed once and cached."""
    if config.first_stage is None:
        return images
    return latents_of(images, config.first_stage, config.image, device, on_message=on_message, flip=config.training.flip)


def train(
    config: Config,
    data: TrainingData,
    *,
    folder: Path | None = None,
    device: torch.device | str = "cpu",
    on_progress: OnProgress = lambda progress: None,
) -> Ensemble:
    """Train every expert in turn by Eq. 2 of the paper, with timesteps drawn softly from its interval; return the ensemble.

    Where the config has a trunk, it is trained first, and every expert starts from it.

    With a ``folder``, the result is stored there. The same call again resumes the training, and one with more steps continues
    it. ``on_progress`` receives step and loss, and any exception that it raises stops the training. Raises ``UserError`` for a
    folder that holds another training or is in use by one, and ``TrainingDiverged`` when gradients are no longer finite.
    """
    config = identified(with_scale(config, data))
    with claim_folder(folder, config) if folder else nullcontext():
        numbers = range(1, len(config.experts) + 1)
        trunk = None
        if not (folder and all(is_finished(expert_file(folder, number), config, number, data) for number in numbers)):
            trunk = train_trunk(config, data, folder=folder, device=device, on_progress=on_progress)
        experts = [
            train_expert(config, number, data, folder=folder, device=device, on_progress=on_progress, trunk=trunk)
            for number in numbers
        ]
    return Ensemble(config, experts)


def with_scale(config: Config, data: TrainingData) -> Config:
    """Return ``config`` with the measured scale factor of its latents, where it has a first stage: sampling has no data to
    measure it on."""
    return config.with_(first_stage={"scale_factor": data.scale_factor}) if isinstance(data, Latents) else config


def claim_folder(folder: Path, config: Config) -> FolderLock:
    """Lock ``folder`` and write the config into it; return the lock.

    Raises ``UserError`` where another process trains in it, or where it holds the training of another config, or of more steps.
    """
    refusal = f"out: {folder} is being trained in by {{holder}}; wait for it, or give another folder"
    try:
        lock = FolderLock(folder / LOCK, refusal)
        try:
            _check_claim(folder, config)
            config.save(folder / "config.yaml")
        except BaseException:
            lock.release()
            raise
    except OSError as error:
        raise UserError(f"out: {folder} can't be written ({error.strerror})") from None
    return lock


def _check_claim(folder: Path, config: Config) -> None:
    if not (folder / "config.yaml").exists():
        return
    found, steps = identified(Config.load(folder / "config.yaml")), config.training.steps
    if found.with_(training={"steps": steps}).architecture_id != config.architecture_id:
        raise UserError(f"out: {folder} holds a training with other settings; give another folder")
    if found.training.steps > steps:
        raise UserError(
            f"training.steps: {folder} holds a training of {found.training.steps} steps, which can only be made longer; "
            f"give --steps {found.training.steps} or more, or another folder"
        )


def load_ensemble(folder: Path, device: torch.device | str = "cpu", *, one_at_a_time: bool = False) -> Ensemble:
    """Load a trained ensemble from its folder, with all experts in memory, or only the one in use (the paper's Appendix A).

    Raises ``UserError`` where there is none, or an expert is missing or of another architecture.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: not a trained ensemble (it has no config.yaml)")
    config = Config.load(folder / "config.yaml")
    numbers = range(1, len(config.experts) + 1)
    for number in numbers:
        check_expert(config, number, folder)
    if one_at_a_time:
        return Ensemble(config, OneAtATime(len(numbers), lambda number: load_expert(config, number, folder, device)))
    return Ensemble(config, [load_expert(config, number, folder, device) for number in numbers])


def draw(ensemble: Ensemble, count: int, seed: int, device: torch.device | str = "cpu") -> Iterator[Tensor]:
    """Yield ``count`` images in batches, uint8 (B, C, H, W); image i is a function of (weights, seed, i).

    Sampler and steps are those of the config. Where only one expert is in memory, all images pass through it before the next
    one is loaded. Raises ``UserError`` where the first stage of a latent ensemble cannot be opened.
    """
    config = ensemble.config
    timesteps = sampling_timesteps(config.diffusion, config.sampling)
    segments = ensemble.hand_overs(timesteps) if isinstance(ensemble.experts, OneAtATime) else [timesteps]
    return draw_images(ensemble.denoise, count, config, seed, device, decode=decoder(config, device), segments=segments)


def decoder(config: Config, device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """Return a function from denoised images or latents to images in [-1, 1]."""
    if config.first_stage is None:
        return lambda x: x
    first_stage = _first_stage(config.first_stage, config.image, device)
    scale = config.first_stage.scale_factor or 1.0
    return lambda x: first_stage.decode(x / scale)


_first_stage = lru_cache(maxsize=1)(open_first_stage)  # it takes a second, and every seed's images need the same one


def evaluate(
    ensemble: Ensemble,
    images: Images,
    space: FeatureSpace,
    *,
    metrics: Sequence[Metric] = ("fid",),
    seed: int | None = None,
    device: torch.device | str = "cpu",
    batches: Iterator[Tensor] | None = None,
) -> Score:
    """Score ``ensemble`` against ``images`` by ``metrics``, with the sampling noise of ``seed`` (default: the config's).

    Images are drawn, measured and dropped batch by batch. The FID (Heusel et al. 2017) is that of ``space``; quote the name of
    the space with it, and the number of samples, ``config.evaluation.samples``. Raises ``UserError`` for a metric that the
    space does not offer. ``batches`` may replace the images of ``draw`` by equal ones, where the caller has a quicker way to
    them.
    """
    config = ensemble.config
    require_metrics(metrics, space)
    require_images(metrics, len(images), images.name)
    seed = config.evaluation.seed if seed is None else seed
    begun, passes = time.perf_counter(), ensemble.passes
    drawn = _Drawn(draw(ensemble, config.evaluation.samples, seed, device) if batches is None else batches)
    measured = measure(drawn, images, space, metrics, seed, config.evaluation.inception_split)
    cost = ensemble_cost(config)
    return Score(
        measured=measured,
        features=space.name,
        samples=config.evaluation.samples,
        macs=cost.macs,
        params=cost.params,
        latency_ms=1000 * drawn.seconds / config.evaluation.samples,
        sampling_seconds=drawn.seconds,
        scoring_seconds=time.perf_counter() - begun - drawn.seconds,
        passes=ensemble.passes - passes,
        grid=torch.cat(drawn.first),
    )


class _Drawn:
    """Passes batches of images on, measures the time taken to draw them, and keeps the first few."""

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
            wait_for(batch.device)
            self.seconds += time.perf_counter() - begun
            self.first.append(batch[:missing].cpu())
            missing -= len(self.first[-1])
            yield batch
