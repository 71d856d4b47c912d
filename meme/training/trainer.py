"""Train one expert: the loop, the averaged weights, checkpoint and resume."""

import itertools
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from meme.config.architecture import OVERRIDES
from meme.config.schema import Config, stable_id
from meme.data.images import TrainingData, batch_indices
from meme.diffusion.loss import DenoisingLoss
from meme.diffusion.process import draw_timesteps, dropped_labels, flipped, forward_process, training_noise
from meme.errors import TrainingDiverged, UserError
from meme.network.pretrained import identified, start_from, weights_file
from meme.network.unet import Denoiser, build_expert
from meme.support.devices import calculating_in, exact_convolutions
from meme.support.files import remove_partials
from meme.support.memory import keep_freed_memory
from meme.support.seeding import derive_seed
from meme.support.signals import interrupted_afterwards
from meme.support.tensor_files import check_tensors, load_tensors, read_header, save_tensors
from meme.training.distributed import WHOLE, Shard
from meme.training.kept_states import KeptStates
from meme.training.skipped_steps import LossWindow, is_skipped
from meme.training.trunk import start_from_trunk, trunk_config

TRUNK = 0  # the trunk's number where experts have theirs
PASSES_A_STEP = 3  # of every image of a batch: forward, and twice as much backward
REPORT_EVERY = 25  # steps; the loss is read from the device only then, so that a GPU is never waited for in between

SCALE = ("scale", "_growth_tracker")  # torch's names of what its scaler of the loss keeps
ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names, as is "step", its count of steps


@dataclass(frozen=True)
class Progress:
    """The state of one expert's training, as reported."""

    expert: int
    """Its number from 1; 0: the trunk."""
    step: int
    steps: int
    loss: float
    """Mean squared error of the predicted noise, over the steps taken since the last report."""
    skipped: int = 0
    """Steps of the whole training so far whose gradient was not finite: they changed no weight."""


OnProgress = Callable[[Progress], None]
"""Receives progress. Any exception that it raises stops the training (and leaves a checkpoint where one is kept)."""


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
    trunk: Denoiser | None = None,
) -> Denoiser:
    """Train expert ``number`` and return it with its averaged weights.

    With a ``folder``, a finished expert found there is returned at once and an unfinished one is resumed; an interrupted
    training ends with the same weights as an uninterrupted one. The state stays beside the finished expert, so that a call with
    more steps continues from it. With a ``shard``, several processes make the same call, each with its own. Where the config
    has a trunk and none is given, ``train_trunk`` is called first. Raises ``TrainingDiverged`` when too many gradients in a
    row, or the weights, are not finite.
    """
    finished = expert_file(folder, number) if folder else None
    options: dict[str, Any] = {
        "device": device,
        "on_progress": on_progress,
        "checkpoint_seconds": checkpoint_seconds,
        "shard": shard,
    }
    if trunk is None and not is_finished(finished, config, number, data):
        trunk = train_trunk(config, data, folder=folder, **options)
    return _trained(config, number, data, finished, trunk, **options)


def train_trunk(
    config: Config,
    data: TrainingData,
    *,
    folder: Path | None = None,
    device: torch.device | str = "cpu",
    on_progress: OnProgress = lambda progress: None,
    checkpoint_seconds: float = 60.0,
    shard: Shard = WHOLE,
) -> Denoiser | None:
    """Train the network from which all experts of ``config`` start, and return it with its averaged weights. Return None where
    the config has no trunk.

    Everything else is as in ``train_expert``; its progress has the number 0, and its file is ``trunk.safetensors``.
    """
    if not config.training.trunk_steps:
        return None

    def report(progress: Progress) -> None:
        on_progress(replace(progress, expert=TRUNK))

    finished = expert_file(folder, TRUNK) if folder else None
    return _trained(
        trunk_config(config),
        1,
        data,
        finished,
        None,
        device=device,
        on_progress=report,
        checkpoint_seconds=checkpoint_seconds,
        shard=shard,
    )


def is_finished(finished: Path | None, config: Config, number: int, data: TrainingData) -> bool:
    """Return whether the file ``finished`` holds this very training at its last step."""
    return finished is not None and _holds(finished, config, number, data) == config.training.steps


def _trained(
    config: Config,
    number: int,
    data: TrainingData,
    finished: Path | None,
    trunk: Denoiser | None,
    *,
    device: torch.device | str,
    on_progress: OnProgress,
    checkpoint_seconds: float,
    shard: Shard,
) -> Denoiser:
    """Read the network from the file ``finished``, or train it and store it there. With None it is trained and not stored."""
    if finished is not None and is_finished(finished, config, number, data):
        return read_expert(config, number, finished, device)
    state = state_beside(finished) if finished else None
    training = run_training(config, number, data, state, device, on_progress, checkpoint_seconds, shard, trunk)
    if finished and state and shard.is_first:
        KeptStates(state).keep(training.save)
        save_expert(training.averaged.module, config, number, data, finished)
        KeptStates(state).remove_previous()
        remove_partials(finished.parent, re.escape(finished.name), new_seconds=0.0)
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
    trunk: Denoiser | None = None,
) -> "Training":
    """Return the training of expert ``number`` at its last step, resumed from the file ``state`` where that holds one.

    ``trunk`` is the network that it starts from, where the config has one. The training is saved in ``state`` from time to time
    and when it is stopped. The caller removes or keeps the file at the end.
    """
    keep_freed_memory()
    training = Training(config, number, data, device, shard, trunk)
    states = KeptStates(state) if state else None
    if states:
        states.load(training.continue_from)
    training.began_at = training.step
    kept = states if shard.is_first else None
    try:
        with exact_convolutions(config.training.precision):
            _run(training, on_progress, kept, checkpoint_seconds)
    except TrainingDiverged:
        if kept:
            kept.go_back()
        raise
    except BaseException:  # also Ctrl-C: what was trained is not lost, unless an error left weights half updated
        if kept and not training.updating:
            training.keep(kept)
        raise
    return training


def _run(training: "Training", on_progress: OnProgress, states: KeptStates | None, checkpoint_seconds: float) -> None:
    """Run the loop: batch and noise, timestep, loss, step, average, report."""
    config, shard = training.config, training.shard
    expert, settings = shard.joined(training.expert), config.training
    saved_at = time.monotonic()
    while training.step < settings.steps:
        x_0, t, epsilon, labels = training.batch()
        x_t = training.process.add_noise(x_0, epsilon, t)
        training.optimizer.param_groups[0]["lr"] = learning_rate(settings.learning_rate, settings.warmup_steps, training.step)
        with calculating_in(training.device, settings.precision):
            predicted = expert(x_t, t) if labels is None else expert(x_t, t, labels)
        loss = training.loss(predicted, x_0, x_t, epsilon, t)
        training.scaler.scale(loss).backward()
        skipped = training.clip_gradient()
        with interrupted_afterwards():
            training.updating = True
            training.optimizer.step()
            training.optimizer.zero_grad(set_to_none=False)  # the weights' own gradients are views of this one
            training.average()
            training.step += 1
            training.window.add(loss, skipped)
            training.updating = False
        if training.step % REPORT_EVERY == 0 or training.step == settings.steps:
            mean = training.window.mean(training.number, training.step, settings.steps)
            if shard.is_first and mean is not None:
                on_progress(Progress(training.number, training.step, settings.steps, mean, training.skipped))
        if states and time.monotonic() - saved_at >= checkpoint_seconds:
            training.keep(states)
            saved_at = time.monotonic()
    training.require_finite()


class AveragedExpert(AveragedModel):
    """An expert whose weights are the average of another's."""

    module: Denoiser


class Training:
    """Everything that changes while one expert is trained, and everything its steps need."""

    def __init__(
        self,
        config: Config,
        number: int,
        data: TrainingData,
        device: torch.device | str,
        shard: Shard = WHOLE,
        trunk: Denoiser | None = None,
    ):
        shard.check(config.training.batch_size)
        self.config, self.number, self.data, self.shard = config, number, data, shard
        self.device = torch.device(device)
        self.step = self.began_at = 0
        self.updating = False  # weights, averages and step do not belong together at this moment
        self.expert = starting_expert(config, number, trunk).to(self.device).train()
        self.averaged = AveragedExpert(self.expert)
        self.weights = in_one_piece(self.expert, gradients=True)
        self._averages = in_one_piece(self.averaged.module, gradients=False)
        self.optimizer = torch.optim.AdamW([self.weights], lr=0.0, weight_decay=config.training.weight_decay, fused=True)
        self.process = forward_process(config.diffusion)
        self.loss = DenoisingLoss(config, self.process, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.training.precision == "fp16")
        self.window = LossWindow(shard)

    @property
    def passes(self) -> int:
        """Return the cost of this process's steps in forward passes of one image; a step's gradient counts as two."""
        return PASSES_A_STEP * self.config.training.batch_size * (self.step - self.began_at)

    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return this process's images (B, C, H, W), timesteps (B,), noise (B, C, H, W) and, if the network takes them, labels
        (B,) of this step.

        They are its rows of a batch that is a function of (seed, step).
        """
        seed, size = self.config.training.seed, self.config.training.batch_size
        indices = batch_indices(len(self.data), size, seed, self.step)
        x_0 = self._images(indices)
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

    def _images(self, indices: np.ndarray) -> Tensor:
        """Return the images (B, C, H, W), about half of them mirrored if the config says so."""
        x_0 = self.data.tensor(indices)
        if self.config.training.flip:
            mirrored = flipped(len(indices), self.config.training.seed, self.step)
            x_0[mirrored] = self.data.mirrored(indices[mirrored.numpy()])
        return x_0

    def _labels(self, indices: np.ndarray) -> Tensor:
        """Return the images' classes, some of them replaced by "no class", which classifier-free guidance needs."""
        training, classes = self.config.training, self.config.network.classes
        withheld = dropped_labels(len(indices), training.label_dropout, training.seed, self.step)
        labels = torch.from_numpy(np.asarray(self.data.labels)[indices])
        return torch.where(withheld, classes, labels).to(self.device, non_blocking=True)

    def clip_gradient(self) -> Tensor:
        """Limit the gradient's norm as the config says. Return, on the device, 1 where the gradient is not finite, else 0.

        With 1, the optimiser's next step changes nothing.
        """
        self.scaler.unscale_(self.optimizer)
        if clip := self.config.training.gradient_clip:
            skipped = is_skipped(torch.nn.utils.clip_grad_norm_(self.weights, clip))
        else:
            skipped = is_skipped(torch.nn.utils.get_total_norm([self.weights.grad]))  # type: ignore[list-item]  # it has one
        self.scaler.update()
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]  # which torch's fused step looks at
        return skipped

    @property
    def skipped(self) -> int:
        """Return the number of steps so far that changed no weight. Waits for the device."""
        taken = self.optimizer.state[self.weights].get("step", 0) if self.weights in self.optimizer.state else 0
        return self.step - int(taken)

    @property
    def is_finite(self) -> bool:
        """Return whether weights, averages and moments are finite numbers. Waits for the device."""
        moments = [self.optimizer.state[self.weights][key] for key in ADAM_MOMENTS] if self.optimizer.state else []
        return all(bool(whole.isfinite().all()) for whole in (self.weights, self._averages, *moments))

    def require_finite(self) -> None:
        """Raise ``TrainingDiverged`` where weights, averages or moments are not finite."""
        if not self.is_finite:
            raise TrainingDiverged(f"expert {self.number}: weights are not finite at step {self.step}")

    @torch.no_grad()
    def average(self) -> None:
        """Add this step's weights to the exponential moving average.

        The decay is ramped up, so that a short training is not an average of its first steps. The averaged model's own update
        is avoided: it handles the weights one by one and reads its count from the device.
        """
        warm = (1 + self.step) / (10 + self.step) if self.step else 0.0
        self._averages.lerp_(self.weights, 1 - min(self.config.training.ema_decay, warm))
        self.averaged.n_averaged += 1

    def keep(self, states: KeptStates) -> None:
        """Save the state, unless it should not be resumed from: its last step was skipped, or it is not finite."""
        if not self.window.last_was_skipped and self.is_finite:
            states.keep(self.save)

    def continue_from(self, path: Path) -> bool:
        """``load`` the file at ``path`` if it holds an earlier state of this training with finite numbers; return whether it
        did."""
        is_held = 0 < _holds(path, self.config, self.number, self.data) <= self.config.training.steps
        return is_held and self.load(path)

    def save(self, path: Path) -> None:
        """Save weights, averaged weights, the optimiser's moments and, in fp16, the scale of the loss."""
        tensors = self._networks() | self._scale()
        for key, whole in self.optimizer.state.get(self.weights, {}).items():
            tensors |= {f"optimizer.{key}.{name}": part for name, part in self._by_name(whole).items()}
        save_tensors(path, tensors, _header(self.config, self.number, self.data, self.step))

    def _networks(self) -> dict[str, Tensor]:
        """Return weights and averaged weights by their names in a checkpoint."""
        tensors = {f"expert.{name}": tensor for name, tensor in self.expert.state_dict().items()}
        return tensors | {f"averaged.{name}": tensor for name, tensor in self.averaged.state_dict().items()}

    def _scale(self) -> dict[str, Tensor]:
        """Return the scale of the loss and the steps since it changed, by their names in a checkpoint; empty except in fp16."""
        state = self.scaler.state_dict()
        return {f"scaler.{name}": torch.tensor(float(state[name]), device=self.device) for name in SCALE if name in state}

    def load(self, path: Path) -> bool:
        """Restore what ``save`` wrote. Return False, and change nothing, where its numbers are not finite.

        Raises ``UserError``, and changes nothing, where the file holds anything else.
        """
        tensors = load_tensors(path, str(self.device))
        fresh = {key: torch.zeros_like(self.weights) for key in ADAM_MOMENTS} | {"step": torch.zeros((), device=self.device)}
        moments = {f"optimizer.{key}.{name}": part for key in fresh for name, part in self._by_name(fresh[key]).items()}
        check_tensors(path, tensors, self._networks() | self._scale() | moments)
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            return False
        self.step = read_header(path)["step"]
        self.expert.load_state_dict(_part(tensors, "expert."))
        self.averaged.load_state_dict(_part(tensors, "averaged."))
        if scale := self.scaler.state_dict():
            scale |= {"scale": tensors["scaler.scale"].item(), "_growth_tracker": int(tensors["scaler._growth_tracker"])}
            self.scaler.load_state_dict(scale)
        for name, part in moments.items():
            part.copy_(tensors[name])
        taken = next(tensors[name] for name in moments if name.startswith("optimizer.step."))  # the same for all weights
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": {0: fresh | {"step": taken}}, "param_groups": groups})
        return True

    def _by_name(self, whole: Tensor) -> dict[str, Tensor]:
        """Return each weight's part of ``whole`` (P,). A single number, common to all weights, is copied to each."""
        names, weights = zip(*self.expert.named_parameters(), strict=True)
        return dict(zip(names, parts(whole, weights) if whole.dim() else [whole.clone() for _ in weights], strict=True))


@torch.no_grad()
def in_one_piece(network: nn.Module, *, gradients: bool) -> Tensor:
    """Return all weights as one vector (P,), of which they become views; with ``gradients``, their gradients become views of
    its gradient.

    Clipping, step and average are then one operation each instead of one for every weight.
    """
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
    """Return views of ``whole`` (P,), one for every weight, with its shape and its order in memory."""
    ends = itertools.accumulate(weight.numel() for weight in weights)
    return [whole.detach().as_strided(w.shape, w.stride(), end - w.numel()) for w, end in zip(weights, ends, strict=True)]


def starting_expert(config: Config, number: int, trunk: Denoiser | None = None) -> Denoiser:
    """Return expert ``number`` before its first step: with fresh weights, or those of the initial weights or the trunk where
    they fit.

    Raises ``ValueError`` where the config has a trunk and none is given.
    """
    if config.training.trunk_steps and trunk is None:
        raise ValueError(f"training.trunk_steps is {config.training.trunk_steps}, and no trunk is given")
    expert = build_expert(config, number)
    if source := identified(config).training.initial_weights:
        start_from(config.network, expert, weights_file(Path(source), number))
    if trunk is not None:
        start_from_trunk(expert, trunk)
    return expert


def learning_rate(peak: float, warmup_steps: int, step: int) -> float:
    """Return the learning rate: linear from peak / warmup_steps at step 0 up to ``peak``, then constant."""
    return peak * min(1.0, (step + 1) / warmup_steps) if warmup_steps else peak


def expert_file(folder: Path, number: int) -> Path:
    """Return the path of a finished expert's averaged weights, or for number 0 of the trunk's."""
    return folder / (f"expert-{number}.safetensors" if number else "trunk.safetensors")


def state_file(folder: Path, number: int) -> Path:
    """Return the path of the state from which an expert's training resumes."""
    return state_beside(expert_file(folder, number))


def state_beside(finished: Path) -> Path:
    """Return the path of the state of a training whose finished weights are ``finished``."""
    return finished.with_suffix(".training.safetensors")


def steps_done(folder: Path, config: Config, number: int, data: TrainingData) -> tuple[int, int]:
    """Return the steps of this training that the finished expert ``number`` in ``folder`` has, and those of its stored state;
    0: none."""
    finished, state = expert_file(folder, number), state_file(folder, number)
    return _holds(finished, config, number, data), _holds(state, config, number, data)


def save_expert(expert: Denoiser, config: Config, number: int, data: TrainingData, path: Path) -> None:
    """Write a finished expert, with a header of what determined it, for ``read_expert``."""
    save_tensors(path, expert.state_dict(), _header(config, number, data, config.training.steps))


def check_expert(config: Config, number: int, folder: Path) -> Path:
    """Return the file of a finished expert in ``folder``.

    Raises ``UserError`` if it is missing, of another architecture, or of fewer steps than the config has, as where a training
    that was made longer has not ended.
    """
    path = expert_file(folder, number)
    if not path.is_file():
        raise UserError(f"{path}: missing; train this config first (python -m meme train ...)")
    _check_architecture(config, number, path)
    done, steps = read_header(path).get("step"), config.training.steps
    if done != steps:
        raise UserError(f"{path}: holds an expert of {done} training steps, not {steps}; run its training again to its end")
    return path


def _check_architecture(config: Config, number: int, path: Path) -> None:
    if read_header(path).get("architecture") != _architecture(config, number):
        raise UserError(f"{path}: holds an expert of another architecture than the config beside it")


def load_expert(config: Config, number: int, folder: Path, device: torch.device | str = "cpu") -> Denoiser:
    """Load a finished expert from ``folder``. Raises ``UserError`` if it is missing or of another architecture."""
    return read_expert(config, number, check_expert(config, number, folder), device)


def read_expert(config: Config, number: int, path: Path, device: torch.device | str = "cpu") -> Denoiser:
    """Read a finished expert from the file ``path``. Raises ``UserError`` if it cannot be read or is of another
    architecture."""
    _check_architecture(config, number, path)
    with torch.device("meta"):
        expert = build_expert(config, number)
    tensors = load_tensors(path, str(device))
    check_tensors(path, tensors, expert.state_dict())
    expert.load_state_dict(tensors, assign=True)
    return expert.eval()


def _architecture(config: Config, number: int) -> str:
    """Return the id of the architecture that an expert's file must have. Overrides enter it only where there are any, so that
    older files still fit."""
    expert = config.canonical_expert(number)
    overrides = expert.model_dump(include=set(OVERRIDES))
    content = [config.image.model_dump(), config.network.model_dump(), list(expert.low_channels)]
    return stable_id([*content, overrides] if overrides else content)


def training_id(config: Config, number: int, data: TrainingData) -> str:
    """Return the id of everything that determines the weights of expert ``number`` except the number of steps: architecture,
    interval, p, noise schedule, training settings with their seed, and the data's content."""
    header = _header(config, number, data, 0)
    return stable_id([header["architecture"], header["training"]])


def _header(config: Config, number: int, data: TrainingData, step: int) -> dict[str, str | int]:
    """Return the header of an expert's file, which identifies its training. Equal headers with different ``step`` belong to one
    training at two moments."""
    training = identified(config).training.model_dump(exclude={"steps", "initial_weights"})  # known by their digest
    made_of = [training, config.canonical_expert(number).model_dump(), config.diffusion.model_dump(), data.content_id]
    return {"architecture": _architecture(config, number), "training": stable_id(made_of), "step": step}


def _holds(path: Path, config: Config, number: int, data: TrainingData) -> int:
    """Return the steps of this very training found at ``path``; 0 where there is none, or one of another config or data."""
    if not path.is_file():
        return 0
    found = read_header(path)
    step = found.get("step", 0)
    if not isinstance(step, int) or isinstance(step, bool):
        return 0
    return step if found == _header(config, number, data, step) else 0


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
