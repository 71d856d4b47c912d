"""Train one expert: the loop, the averaged weights, checkpoint and resume."""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from meme.architecture import OVERRIDES
from meme.checkpoint import check_tensors, load_tensors, read_header, save_tensors
from meme.config import Config, stable_id
from meme.data import TrainingData, batch_indices
from meme.denoiser import Denoiser, build_expert
from meme.diffusion import draw_timesteps, dropped_labels, forward_process, training_noise
from meme.errors import UserError
from meme.files import remove_partials
from meme.freed_memory import keep_freed_memory
from meme.losses import DenoisingLoss
from meme.seeding import derive_seed
from meme.sharding import WHOLE, Shard
from meme.takeover import start_from
from meme.termination import interrupted_afterwards

REPORT_EVERY = 25  # steps; the loss is read from the device only then, so that a GPU is never waited for in between

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names, as is "step", its count of steps


class TrainingDiverged(UserError):
    """The loss is no longer a finite number."""


@dataclass(frozen=True)
class Progress:
    """Where one expert's training stands."""

    expert: int
    step: int
    steps: int
    loss: float
    """Mean squared error of the predicted noise, over the steps since the last report."""


OnProgress = Callable[[Progress], None]
"""Told about progress; whatever it raises stops the training (and leaves a checkpoint where one is kept)."""


def train_expert(
    config: Config,
    number: int,
    data: TrainingData,
    *,
    folder: Path | None = None,
    device: torch.device | str = "cpu",
    on_progress: OnProgress = lambda progress: None,
    checkpoint_seconds: float = 60.0,
    shard: Shard = WHOLE,
) -> Denoiser:
    """Train expert ``number`` and return it with its averaged weights.

    With a ``folder``, a finished expert found there is returned at once, an unfinished one is continued, and the same call
    again after any interruption ends with the same weights. With a ``shard``, several processes make the same call, each with
    its own. Raises ``TrainingDiverged`` when the loss is not finite.
    """
    if folder is None:
        return run_training(config, number, data, None, device, on_progress, checkpoint_seconds, shard).averaged.module.eval()
    finished, state = expert_file(folder, number), folder / f"expert-{number}.training.safetensors"
    if _holds(finished, config, number, data) == config.training.steps:
        return load_expert(config, number, folder, device)
    training = run_training(config, number, data, state, device, on_progress, checkpoint_seconds, shard)
    if shard.is_first:
        save_expert(training.averaged.module, config, number, data, finished)
        state.unlink(missing_ok=True)
        remove_partials(folder, rf"expert-{number}\.(training\.)?safetensors")
    return training.averaged.module.eval()


def run_training(
    config: Config,
    number: int,
    data: TrainingData,
    state: Path | None,
    device: torch.device | str = "cpu",
    on_progress: OnProgress = lambda progress: None,
    checkpoint_seconds: float = 60.0,
    shard: Shard = WHOLE,
) -> "Training":
    """The training of expert ``number`` at its last step, continued from the file ``state`` where that holds an earlier moment.

    On the way, and when it is stopped, it is kept in ``state``; what is there at the end is the caller's affair.
    """
    keep_freed_memory()
    training = Training(config, number, data, device, shard)
    if state and 0 < _holds(state, config, number, data) <= config.training.steps:
        training.load(state)
    try:
        _run(training, on_progress, state if shard.is_first else None, checkpoint_seconds)
    except TrainingDiverged:
        raise
    except BaseException:  # also Ctrl-C: what was trained is not lost, unless an error left weights half updated
        if state and shard.is_first and not training.updating:
            training.save(state)
        raise
    return training


def _run(training: "Training", on_progress: OnProgress, checkpoint: Path | None, checkpoint_seconds: float) -> None:
    """The loop: batch and noise, timestep, loss, step, average, report."""
    config, shard = training.config, training.shard
    expert, settings = shard.joined(training.expert), config.training
    losses, saved_at = torch.zeros((), device=training.device), time.monotonic()
    reported = training.step
    while training.step < settings.steps:
        x_0, t, epsilon, labels = training.batch()
        x_t = training.process.add_noise(x_0, epsilon, t)
        training.optimizer.param_groups[0]["lr"] = learning_rate(settings.learning_rate, settings.warmup_steps, training.step)
        with torch.autocast(training.device.type, torch.bfloat16, enabled=training.device.type == "cuda"):
            predicted = expert(x_t, t) if labels is None else expert(x_t, t, labels)
        loss = training.loss(predicted, x_0, x_t, epsilon, t)
        loss.backward()
        if settings.gradient_clip:
            torch.nn.utils.clip_grad_norm_(training.weights, settings.gradient_clip)
        with interrupted_afterwards():
            training.updating = True
            training.optimizer.step()
            training.optimizer.zero_grad(set_to_none=False)  # the weights' own gradients are views of this one
            training.average()
            training.step += 1
            training.updating = False
        losses += loss.detach()
        if training.step % REPORT_EVERY == 0 or training.step == settings.steps:
            mean = shard.mean(losses) / (training.step - reported)
            if not math.isfinite(mean):
                rate = f"training.learning_rate {settings.learning_rate:g}"
                raise TrainingDiverged(f"expert {training.number}: loss is {mean} at step {training.step}; lower {rate}")
            losses.zero_()
            reported = training.step
            if shard.is_first:
                on_progress(Progress(training.number, training.step, settings.steps, mean))
        if checkpoint and time.monotonic() - saved_at >= checkpoint_seconds:
            training.save(checkpoint)
            saved_at = time.monotonic()


class AveragedExpert(AveragedModel):
    """An expert whose weights are the average of another's."""

    module: Denoiser


class Training:
    """Everything that changes while one expert is trained, and what its steps need."""

    def __init__(self, config: Config, number: int, data: TrainingData, device: torch.device | str, shard: Shard = WHOLE):
        shard.check(config.training.batch_size)
        self.config, self.number, self.data, self.shard = config, number, data, shard
        self.device = torch.device(device)
        self.step = 0
        self.updating = False  # weights, averages and step do not belong together at this moment
        self.expert = starting_expert(config, number).to(self.device).train()
        self.averaged = AveragedExpert(self.expert)
        self.weights = in_one_piece(self.expert, gradients=True)
        self._averages = in_one_piece(self.averaged.module, gradients=False)
        self.optimizer = torch.optim.AdamW([self.weights], lr=0.0, weight_decay=config.training.weight_decay, fused=True)
        self.process = forward_process(config.diffusion)
        self.loss = DenoisingLoss(config, self.process, self.device)

    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """This process's images (B, C, H, W), timesteps (B,), noise (B, C, H, W) and labels (B,), if the network takes them, of
        this step: its rows of what is a function of (seed, step)."""
        seed, size = self.config.training.seed, self.config.training.batch_size
        indices = batch_indices(len(self.data), size, seed, self.step)
        x_0 = self.data.tensor(indices)
        noise = training_noise(tuple(x_0.shape), seed, self.step)
        t = draw_timesteps(self.config.expert(self.number), self.config.diffusion.timesteps, noise)
        if self.config.network.dropout:
            whose = (self.shard.rank,) if self.shard.rank else ()  # masks of different rows must not be the same
            torch.manual_seed(derive_seed(seed, "dropout", self.step, *whose))
        rows = self.shard.rows
        return (
            rows(x_0).to(self.device, memory_format=torch.channels_last, non_blocking=True),
            rows(t).to(self.device, non_blocking=True),
            rows(noise.epsilon).to(self.device, memory_format=torch.channels_last, non_blocking=True),
            rows(self._labels(indices)) if self.config.network.classes else None,
        )

    def _labels(self, indices: np.ndarray) -> Tensor:
        """The images' classes, some of them withheld so that guidance has a network without classes to start from."""
        training, classes = self.config.training, self.config.network.classes
        withheld = dropped_labels(len(indices), training.label_dropout, training.seed, self.step)
        labels = torch.from_numpy(np.asarray(self.data.labels)[indices])
        return torch.where(withheld, classes, labels).to(self.device, non_blocking=True)

    @torch.no_grad()
    def average(self) -> None:
        """Take this step's weights into the exponential moving average, whose decay is ramped up, so that a short training is not
        an average of its first steps. The averaged model's own update goes through the weights one by one and asks the device
        for its count."""
        warm = (1 + self.step) / (10 + self.step) if self.step else 0.0
        self._averages.lerp_(self.weights, 1 - min(self.config.training.ema_decay, warm))
        self.averaged.n_averaged += 1

    def save(self, path: Path) -> None:
        """Weights, averaged weights and the optimiser's moments."""
        tensors = self._networks()
        for key, whole in self.optimizer.state.get(self.weights, {}).items():
            tensors |= {f"optimizer.{key}.{name}": part for name, part in self._by_name(whole).items()}
        save_tensors(path, tensors, _header(self.config, self.number, self.data, self.step))

    def _networks(self) -> dict[str, Tensor]:
        """Weights and averaged weights by their names in a checkpoint."""
        tensors = {f"expert.{name}": tensor for name, tensor in self.expert.state_dict().items()}
        return tensors | {f"averaged.{name}": tensor for name, tensor in self.averaged.state_dict().items()}

    def load(self, path: Path) -> None:
        """Go on from what ``save`` wrote; ``UserError``, and nothing changed, where the file holds anything else."""
        tensors = load_tensors(path, str(self.device))
        fresh = {key: torch.zeros_like(self.weights) for key in ADAM_MOMENTS} | {"step": torch.zeros((), device=self.device)}
        moments = {f"optimizer.{key}.{name}": part for key in fresh for name, part in self._by_name(fresh[key]).items()}
        check_tensors(path, tensors, self._networks() | moments)
        self.step = read_header(path)["step"]
        self.expert.load_state_dict(_part(tensors, "expert."))
        self.averaged.load_state_dict(_part(tensors, "averaged."))
        for name, part in moments.items():
            part.copy_(tensors[name])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": {0: fresh | {"step": fresh["step"] + self.step}}, "param_groups": groups})

    def _by_name(self, whole: Tensor) -> dict[str, Tensor]:
        """Each weight's part of ``whole`` (P,); of a number, which is the same for all, a copy."""
        names, weights = zip(*self.expert.named_parameters(), strict=True)
        return dict(zip(names, parts(whole, weights) if whole.dim() else [whole.clone() for _ in weights], strict=True))


@torch.no_grad()
def in_one_piece(network: nn.Module, *, gradients: bool) -> Tensor:
    """All weights as one vector (P,), of which they are views from now on, as their ``gradients`` are of its gradient: clipping,
    step and average are then one operation each, and not one for every weight."""
    weights = list(network.parameters())
    whole = nn.Parameter(torch.empty(sum(weight.numel() for weight in weights), device=weights[0].device))
    for weight, value in zip(weights, parts(whole, weights), strict=True):
        weight.data = value.copy_(weight)
    if gradients:
        whole.grad = torch.zeros_like(whole)
        for weight, gradient in zip(weights, parts(whole.grad, weights), strict=True):
            weight.grad = gradient
    return whole


def parts(whole: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Views of ``whole`` (P,), one for every weight, with its shape and its order in memory."""
    ends = itertools.accumulate(weight.numel() for weight in weights)
    return [whole.detach().as_strided(w.shape, w.stride(), end - w.numel()) for w, end in zip(weights, ends, strict=True)]


def starting_expert(config: Config, number: int) -> Denoiser:
    """Expert ``number`` before its first step: fresh, or with what the config's initial weights have for it."""
    expert = build_expert(config, number)
    if config.training.initial_weights:
        start_from(config.network, expert, Path(config.training.initial_weights))
    return expert


def learning_rate(peak: float, warmup_steps: int, step: int) -> float:
    """Linear from peak / warmup_steps at step 0 up to ``peak``, then constant."""
    return peak * min(1.0, (step + 1) / warmup_steps) if warmup_steps else peak


def expert_file(folder: Path, number: int) -> Path:
    """Where the averaged weights of a finished expert lie."""
    return folder / f"expert-{number}.safetensors"


def save_expert(expert: Denoiser, config: Config, number: int, data: TrainingData, path: Path) -> None:
    """Write a finished expert with what it was made of, for ``read_expert``."""
    save_tensors(path, expert.state_dict(), _header(config, number, data, config.training.steps))


def check_expert(config: Config, number: int, folder: Path) -> Path:
    """The file of a finished expert in ``folder``; ``UserError`` if it is missing or of another architecture."""
    path = expert_file(folder, number)
    if not path.is_file():
        raise UserError(f"{path}: missing; train this config first (python -m meme train ...)")
    _check_architecture(config, number, path)
    return path


def _check_architecture(config: Config, number: int, path: Path) -> None:
    if read_header(path).get("architecture") != _architecture(config, number):
        raise UserError(f"{path}: holds an expert of another architecture than the config beside it")


def load_expert(config: Config, number: int, folder: Path, device: torch.device | str = "cpu") -> Denoiser:
    """A finished expert from ``folder``; ``UserError`` if it is missing or of another architecture."""
    return read_expert(config, number, check_expert(config, number, folder), device)


def read_expert(config: Config, number: int, path: Path, device: torch.device | str = "cpu") -> Denoiser:
    """A finished expert from the file ``path``; ``UserError`` if it can't be read or is of another architecture."""
    _check_architecture(config, number, path)
    with torch.device("meta"):
        expert = build_expert(config, number)
    tensors = load_tensors(path, str(device))
    check_tensors(path, tensors, expert.state_dict())
    expert.load_state_dict(tensors, assign=True)
    return expert.eval()


def _architecture(config: Config, number: int) -> str:
    """Of what an expert's file must fit. Overrides count only where there are any, or files from before them would not fit."""
    expert = config.canonical_expert(number)
    overrides = expert.model_dump(include=set(OVERRIDES))
    content = [config.image.model_dump(), config.network.model_dump(), list(expert.low_channels)]
    return stable_id([*content, overrides] if overrides else content)


def training_id(config: Config, number: int, data: TrainingData) -> str:
    """Of all that determines the weights of expert ``number`` but for the number of steps: architecture, interval, p, noise
    schedule, training settings with their seed, and the data's content."""
    header = _header(config, number, data, 0)
    return stable_id([header["architecture"], header["training"]])


def _header(config: Config, number: int, data: TrainingData, step: int) -> dict[str, str | int]:
    """What an expert is made of: two trainings with equal headers but for ``step`` are one training at two moments."""
    training = config.training.model_dump(exclude={"steps"})
    made_of = [training, config.canonical_expert(number).model_dump(), config.diffusion.model_dump(), data.content_id]
    return {"architecture": _architecture(config, number), "training": stable_id(made_of), "step": step}


def _holds(path: Path, config: Config, number: int, data: TrainingData) -> int:
    """Steps of this very training found at ``path``; 0 where there is none, or that of another config or data."""
    if not path.is_file():
        return 0
    found = read_header(path)
    step = found.get("step", 0)
    if not isinstance(step, int) or isinstance(step, bool):
        return 0
    return step if found == _header(config, number, data, step) else 0


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
