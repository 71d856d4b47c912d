"""Sampling of a cascade of banked experts that reuses sampler states of earlier cascades.

Sampling runs from noise to data. Two cascades with the same later experts have the same states until the first expert in which
they differ takes over. So the states at every hand-over are stored on disk, under a key of all that determines them.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import filelock
import numpy as np
import torch
from torch import Tensor

from meme.config.schema import Config, stable_id
from meme.diffusion.ensemble import Ensemble, expert_at
from meme.diffusion.sampler import pass_through, sampling_timesteps, starting_noise, to_uint8
from meme.pipeline import decoder
from meme.support.files import written_whole

LIMIT_GIB = 2.0


@dataclass(frozen=True)
class StateCache:
    """Cache of the states of all samples at hand-overs, one file for each hand-over. The least recently used are deleted first.

    A file is float32 (N, C, H, W). A multistep solver stores its history along C, as a multiple of C.
    """

    folder: Path
    limit_gib: float = LIMIT_GIB

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.npy"

    def load(self, key: str) -> np.ndarray | None:
        """Return the states, mapped from disk; None if they are missing or damaged."""
        try:
            states = np.load(self.path(key), mmap_mode="r", allow_pickle=False)
            os.utime(self.path(key))
        except (OSError, ValueError, EOFError):
            return None
        return states

    def save(self, key: str, states: np.ndarray) -> None:
        with written_whole(self.path(key)) as partial, partial.open("wb") as file:
            np.save(file, states, allow_pickle=False)
        self._make_room()

    def remove(self) -> None:
        """Remove all states, and the folder unless it holds something else."""
        for path in (*self.folder.glob("*.npy"), *self.folder.glob("*.lock")):
            path.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()

    def _make_room(self) -> None:
        found = []
        for path in self.folder.glob("*.npy"):
            try:
                found.append((path.stat().st_mtime, path.stat().st_size, path))
            except FileNotFoundError:  # another worker made room
                continue
        excess = sum(size for _, size, _ in found) - self.limit_gib * 2**30
        for _, size, path in sorted(found):
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size


def draw_cascade(
    ensemble: Ensemble, ids: Sequence[str], seed: int, cache: StateCache, device: torch.device | str = "cpu"
) -> Iterator[Tensor]:
    """Yield the config's number of samples in batches, bit for bit those of ``meme.pipeline.draw``.

    ``ids[n - 1]`` identifies the weights of expert n.
    """
    return _Drawing(ensemble, seed, torch.device(device)).images(ids, cache)


@dataclass(frozen=True)
class _Drawing:
    ensemble: Ensemble
    seed: int
    device: torch.device

    @property
    def config(self) -> Config:
        return self.ensemble.config

    def images(self, ids: Sequence[str], cache: StateCache) -> Iterator[Tensor]:
        runs = self.ensemble.hand_overs(sampling_timesteps(self.config.diffusion, self.config.sampling))
        states, decode = self._before_last(runs, self._keys(ids, runs), cache), decoder(self.config, self.device)
        for indices in self._batches():
            yield to_uint8(decode(self._through(states, indices, runs[-1])))

    def _before_last(self, runs: Sequence[Sequence[int]], keys: Sequence[str], cache: StateCache) -> np.ndarray | None:
        """Return the states before the last run of steps; None if that starts from noise.

        They are computed from the latest hand-over in the cache, or from noise.
        """
        place, states = len(keys), None
        while place and states is None:
            place -= 1
            states = cache.load(keys[place])
        for later in range(place if states is None else place + 1, len(keys)):
            states = self._after(states, runs[later], keys[later], cache)
        return states

    def _after(self, states: np.ndarray | None, run: Sequence[int], key: str, cache: StateCache) -> np.ndarray:
        """Return the states after one more run of steps. Another worker that needs the same states waits for them."""
        cache.folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(cache.folder / f"{key}.lock"):
            if (found := cache.load(key)) is None:
                found = torch.cat([self._through(states, indices, run) for indices in self._batches()]).cpu().numpy()
                cache.save(key, found)
        return found

    def _through(self, states: np.ndarray | None, indices: range, run: Sequence[int]) -> Tensor:
        if states is None:
            x = starting_noise(self.config.image, self.seed, indices.start, len(indices))
        else:
            x = torch.from_numpy(np.array(states[indices.start : indices.stop]))
        return pass_through(self.ensemble.denoise, x, indices, run, self.config, self.seed, self.device)

    def _batches(self) -> Iterator[range]:
        count, size = self.config.evaluation.samples, self.config.sampling.batch_size
        return (range(first, min(first + size, count)) for first in range(0, count, size))

    def _keys(self, ids: Sequence[str], runs: Sequence[Sequence[int]]) -> list[str]:
        """Return the keys of the states after every run of steps except the last, as ids of all that determines them."""
        common = self.config.model_dump(mode="json", include={"image", "diffusion", "sampling"})
        facts = [common, self.config.evaluation.samples, self.config.network.learned_variance, self.seed]
        passed = [[ids[expert_at(self.config, run[0]) - 1], list(run)] for run in runs]
        return [stable_id([*facts, passed[: place + 1]]) for place in range(len(runs) - 1)]
