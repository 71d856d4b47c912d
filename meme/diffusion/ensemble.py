"""Experts and their intervals as one ``denoise(x, t)``, independent of how images are sampled."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from meme.config.schema import Config
from meme.network.unet import Denoiser
from meme.support.devices import calculating_in
from meme.support.memory import give_freed_memory_back


class ExpertSequence(Protocol):
    """One expert for each interval, that of least noise first."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Denoiser: ...
    def __iter__(self) -> Iterator[Denoiser]: ...


class Ensemble:
    """The cascade of experts: timestep t is denoised by the expert whose interval holds it.

    ``experts`` is a list, with all experts in memory, or ``OneAtATime``.
    """

    def __init__(self, config: Config, experts: ExpertSequence):
        if len(experts) != len(config.experts):
            raise ValueError(f"experts: the config has {len(config.experts)}, not {len(experts)}")
        self.config = config
        self.experts = experts
        self.passes = 0
        """Images that have gone through an expert, once for every step."""

    def denoise(self, x: Tensor, t: float, labels: Tensor | None = None) -> Tensor:
        """Return what the expert at ``t``, one t for the whole batch, predicts from x_t (B, C, H, W).

        This is the noise (B, C, H, W), or with a learned variance (B, 2C, H, W); float32 on every device. ``labels`` (B,) are
        for class-conditional experts.
        """
        expert = self.experts[expert_at(self.config, t) - 1]
        timesteps = torch.full((x.shape[0],), t, device=x.device)
        inputs = (x, timesteps, labels) if self.config.network.classes else (x, timesteps)
        self.passes += len(x)
        with calculating_in(x.device, self.config.sampling.precision):
            predicted: Tensor = expert(*inputs)
        return predicted.float()

    def hand_overs(self, timesteps: Sequence[int]) -> list[list[int]]:
        """Cut ``timesteps`` wherever another expert takes over."""
        return [list(run) for _, run in itertools.groupby(timesteps, key=lambda t: expert_at(self.config, t))]


class OneAtATime:
    """A sequence of experts that keeps only the one last used in memory."""

    def __init__(self, count: int, load: Callable[[int], Denoiser]):
        self._count, self._load = count, load
        self._held: tuple[int, Denoiser] | None = None

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Denoiser]:
        return map(self.__getitem__, range(self._count))

    def __getitem__(self, index: int) -> Denoiser:
        """Return expert ``index + 1``, loaded unless it is the one in memory."""
        if not 0 <= index < self._count:
            raise IndexError(index)
        if self._held is None or self._held[0] != index:
            self._held = None  # before the next is loaded, or two would be in memory
            give_freed_memory_back()
            self._held = index, self._load(index + 1)
        return self._held[1]


def expert_at(config: Config, t: float) -> int:
    """Return the number of the expert (1 = least noise) whose interval holds timestep ``t``."""
    for number, expert in enumerate(config.experts, start=1):
        if expert.interval[0] <= t < expert.interval[1]:
            return number
    raise ValueError(f"t: must be 0 to {config.experts[-1].interval[1] - 1}, not {t}")
