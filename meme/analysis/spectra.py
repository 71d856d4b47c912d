"""The paper's frequency analysis: of what the networks are given (Fig. 2), of their features (Fig. 3), and of expert against
expert (Fig. 6, Appendix E).

All three return a table with a row for every frequency of every curve, in these columns:

- ``kind``: latents, features or experts
- ``ensemble``: as it is called; none for latents
- ``expert``: its number, 1 = least noise; none for latents
- ``timestep``: t of the x_t that was seen; none for the clean data
- ``own``: whether t lies in the interval of that expert; none for latents
- ``layer``: such as ``enc 3 iFormer 32x4x4``, channels and space of the stage's output; ``x_t`` or ``data`` for latents
- ``depth``: the layer's place in the order of execution, from 1; 0 for latents
- ``frequency``: in units of pi, from 0; every layer has those of its size
- ``log_amplitude``, ``relative_log_amplitude``: natural logarithms, see ``meme.analysis.spectrum``
- ``images``: how many were averaged over

Noise is common: image i is given the same epsilon at every timestep, layer, expert and ensemble.

Shapes: ``B`` batch, ``C`` channels, ``H W`` space.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Protocol

import numpy as np
import pandas as pd
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from meme.analysis.spectrum import MeanSpectrum, Spectrum
from meme.config.schema import Config, DiffusionConfig
from meme.diffusion.ensemble import Ensemble, expert_at
from meme.diffusion.process import forward_process
from meme.errors import UserError
from meme.network.blocks import AttentionBlock, Downsample, ResidualBlock, Upsample
from meme.network.iformer import IFormerBlock
from meme.network.transformer import SpatialTransformer
from meme.network.unet import Denoiser
from meme.support.devices import calculating_in
from meme.support.precision import Precision
from meme.support.seeding import generator

BATCH = 64  # images in memory at once; the result does not depend on it
COLUMNS = {
    "kind": "string",
    "ensemble": "string",
    "expert": "Int64",
    "timestep": "Int64",
    "own": "boolean",
    "layer": "string",
    "depth": "int64",
    "frequency": "float64",
    "log_amplitude": "float64",
    "relative_log_amplitude": "float64",
    "images": "int64",
}
_BLOCKS = {
    IFormerBlock: "iFormer",
    ResidualBlock: "residual",
    AttentionBlock: "attention",
    Downsample: "down",
    Upsample: "up",
    SpatialTransformer: "transformer",
}

OnProgress = Callable[[int, int], None]
"""Called after every batch with the number of images done and the number of all images. An image counts once for each timestep
and expert."""


class Data(Protocol):
    """Analysed data: images as ``meme.data.images`` has them, or latents of a first stage."""

    def __len__(self) -> int: ...

    def tensor(self, indices: Sequence[int]) -> Tensor:
        """Return float32 (B, C, H, W), in the range that the networks see."""


def _silent(done: int, total: int) -> None:
    del done, total


@torch.inference_mode()
def latents(
    data: Data,
    diffusion: DiffusionConfig,
    timesteps: Sequence[int] | None = None,
    *,
    count: int = 10_000,
    seed: int = 0,
    device: torch.device | str = "cpu",
    on_progress: OnProgress = _silent,
) -> pd.DataFrame:
    """Figure 2: return the spectra of the clean data and of x_t (Eq. 1) at ``timesteps`` (None: eleven over all of T).

    They are averaged over ``count`` images drawn by ``seed``, or over all images where there are fewer. Raises ``UserError``
    for a timestep outside the schedule, or a count below 1.
    """
    times = _checked(timesteps, diffusion)
    process = forward_process(diffusion)
    images = _Images(data, count, seed)
    seen = _Counter(len(images) * (1 + len(times)), on_progress)
    spectra = {t: MeanSpectrum() for t in (None, *times)}
    for x_0, epsilon in images.batches(device):
        for t, mean in spectra.items():
            mean.add(x_0 if t is None else _noised(process, x_0, epsilon, t))
            seen.add(len(x_0))
    labels = {"kind": "latents", "ensemble": None, "expert": None, "own": None, "depth": 0}
    return _table(
        _curve(mean.result(), **labels, timestep=t, layer="data" if t is None else "x_t") for t, mean in spectra.items()
    )


def features(
    ensemble: Ensemble,
    data: Data,
    timesteps: Sequence[int] | None = None,
    *,
    name: str | None = None,
    count: int = 10_000,
    seed: int = 0,
    on_progress: OnProgress = _silent,
) -> pd.DataFrame:
    """Figure 3: return the spectra of every layer's features at ``timesteps`` (None: eleven over all of T). Each t is given to
    the expert whose interval holds it.

    ``name`` is the ensemble's name in the table (None: the name in its config). Images, noise and errors are those of
    ``latents``.
    """
    config = ensemble.config
    asked: dict[int, list[int]] = {}
    for t in _checked(timesteps, config.diffusion):
        asked.setdefault(expert_at(config, t), []).append(t)
    task = _Task("features", name or config.name, ensemble, asked)
    return _run([task], _Images(data, count, seed), on_progress)


def experts(
    ensembles: Mapping[str, Ensemble],
    data: Data,
    timesteps: Sequence[int] | None = None,
    *,
    per_interval: int = 3,
    count: int = 10_000,
    seed: int = 0,
    on_progress: OnProgress = _silent,
) -> pd.DataFrame:
    """Figure 6: return the spectra of every layer's features for every expert, in its own interval and, given the same input,
    in all others.

    Each expert's interval contributes ``per_interval`` timesteps, spread evenly, unless ``timesteps`` names others. Raises
    ``UserError`` for ensembles that differ in what they denoise, since they cannot be given the same input. Everything else is
    as for ``features``.
    """
    configs = [ensemble.config for ensemble in ensembles.values()]
    if not configs:
        raise UserError("experts: name at least one trained ensemble")
    denoised = [(config.image, config.first_stage, config.diffusion) for config in configs]
    if any(each != denoised[0] for each in denoised):
        raise UserError("experts: ensembles that are compared must agree in their image, first_stage and diffusion settings")
    times = _checked(timesteps or _own_timesteps(configs, per_interval), configs[0].diffusion)
    tasks = [
        _Task("experts", name, ensemble, dict.fromkeys(range(1, len(ensemble.config.experts) + 1), times))
        for name, ensemble in ensembles.items()
    ]
    return _run(tasks, _Images(data, count, seed), on_progress)


def expert_distances(table: pd.DataFrame) -> pd.DataFrame:
    """Return how far apart the experts of a table of ``experts`` are when given the same input.

    There is one row for every ensemble, timestep and layer. Its ``distance`` is the root mean square, over all pairs of experts
    and all frequencies except 0, of the difference of their relative log amplitudes. Ensembles of one expert, and layers of one
    pixel, have no rows.
    """
    place = ["ensemble", "timestep", "depth", "layer"]
    curves = table[table["frequency"] > 0].pivot_table(
        index=[*place, "frequency"], columns="expert", values="relative_log_amplitude"
    )
    squares = [(curves[one] - curves[other]) ** 2 for one, other in combinations(curves.columns, 2)]
    if not squares:
        return pd.DataFrame(columns=[*place, "distance"])
    known = pd.concat(squares).dropna()  # not every ensemble has all of the pairs
    return np.sqrt(known.groupby(level=place).mean()).rename("distance").reset_index()


def even_timesteps(timesteps: int, count: int = 10) -> list[int]:
    """Return the timesteps 0, T / count, 2 T / count ... and the last one, T - 1."""
    return sorted({number * timesteps // count for number in range(count)} | {timesteps - 1})


def layers_of(network: Denoiser) -> list[tuple[str, nn.Module]]:
    """Return the stages of a network in the order of execution, named by part, number and blocks: ``enc 3 iFormer``."""
    encoder = [(f"enc {number}", stage) for number, stage in enumerate(network.encoder, start=1)]
    decoder = [(f"dec {number}", stage) for number, stage in enumerate(network.decoder, start=1)]
    stages = [*encoder, ("middle", network.middle), *decoder]
    return [(f"{place} {_blocks(stage)}", stage) for place, stage in stages]


@contextmanager
def listening(network: Denoiser, on_output: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call ``on_output(depth, features)`` with every stage's output (B, C, H, W) within the context. The network is unchanged
    afterwards."""

    def hook(depth: int) -> Callable:
        def tell(stage: nn.Module, inputs: tuple, output: Tensor) -> None:  # what a hook returns would replace the output
            on_output(depth, output)

        return tell

    handles = [stage.register_forward_hook(hook(depth)) for depth, (_, stage) in enumerate(layers_of(network), start=1)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Images:
    """The images that are analysed, and their noise, as functions of (seed, place in the data)."""

    def __init__(self, data: Data, count: int, seed: int):
        if count < 1:
            raise UserError(f"images: must be at least 1, not {count}")
        order = torch.randperm(len(data), generator=generator(seed, "analysed images"))
        self._data, self._seed = data, seed
        self._indices = sorted(order[:count].tolist())

    def __len__(self) -> int:
        return len(self._indices)

    def batches(self, device: torch.device | str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of images and of standard normal noise, both (B, C, H, W)."""
        for first in range(0, len(self), BATCH):
            indices = self._indices[first : first + BATCH]
            x_0 = self._data.tensor(indices)
            epsilon = torch.stack([self._noise(index, x_0.shape[1:]) for index in indices])
            x_0, epsilon = (each.to(device, memory_format=torch.channels_last) for each in (x_0, epsilon))
            yield x_0, epsilon

    def _noise(self, index: int, shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=generator(self._seed, "analysis noise", index))


class _Layers:
    """The mean spectrum of every layer of one expert at every timestep."""

    def __init__(self, network: Denoiser):
        self._names = [name for name, _ in layers_of(network)]
        self._shapes: dict[int, str] = {}  # by depth
        self._spectra: dict[tuple[int, int], MeanSpectrum] = {}  # by timestep and depth

    def at(self, t: int) -> Callable[[int, Tensor], None]:
        """Return a function that adds the features of a layer at timestep ``t``."""

        def take(depth: int, output: Tensor) -> None:
            self._shapes[depth] = "x".join(str(length) for length in output.shape[1:])
            self._spectra.setdefault((t, depth), MeanSpectrum()).add(output)

        return take

    def curves(self, own: range, **labels) -> Iterator[dict]:
        """Yield one curve per timestep and layer, in this order; ``own`` is the expert's interval."""
        for (t, depth), mean in sorted(self._spectra.items(), key=lambda item: item[0]):
            layer = f"{self._names[depth - 1]} {self._shapes[depth]}"
            yield _curve(mean.result(), **labels, timestep=t, own=t in own, layer=layer, depth=depth)


class _Counter:
    """Reports the number of images done."""

    def __init__(self, total: int, on_progress: OnProgress):
        self._done, self._total, self._on_progress = 0, total, on_progress

    def add(self, images: int) -> None:
        self._done += images
        self._on_progress(self._done, self._total)


@dataclass(frozen=True)
class _Task:
    """The timesteps at which each expert of one ensemble is run."""

    kind: str
    name: str
    ensemble: Ensemble
    asked: Mapping[int, Sequence[int]]  # by the expert's number

    @property
    def passes(self) -> int:
        return sum(len(times) for times in self.asked.values())


def _run(tasks: Sequence[_Task], images: _Images, on_progress: OnProgress) -> pd.DataFrame:
    """Return the spectra of all layers. Experts are the outer loop, since an ensemble may have to load each one."""
    seen = _Counter(len(images) * sum(task.passes for task in tasks), on_progress)
    curves: list[dict] = []
    for task in tasks:
        for number, times in task.asked.items():
            layers = _spectra_of(task.ensemble, number, times, images, seen)
            own = range(*task.ensemble.config.expert(number).interval)
            curves += layers.curves(own, kind=task.kind, ensemble=task.name, expert=number)
    return _table(curves)


@torch.inference_mode()
def _spectra_of(ensemble: Ensemble, number: int, times: Sequence[int], images: _Images, seen: _Counter) -> _Layers:
    """Return the spectra of one expert's layers at some timesteps."""
    expert = ensemble.experts[number - 1]
    process = forward_process(ensemble.config.diffusion)
    layers = _Layers(expert)
    for x_0, epsilon in images.batches(next(expert.parameters()).device):
        for t in times:
            with listening(expert, layers.at(t)):
                _forward(expert, _noised(process, x_0, epsilon, t), t, ensemble.config.sampling.precision)
            seen.add(len(x_0))
    return layers


def _forward(expert: Denoiser, x: Tensor, t: int, precision: Precision) -> None:
    """Run an expert on x_t (B, C, H, W) as ``Ensemble.denoise`` does. Nothing else in this module calls an expert."""
    timesteps = torch.full((x.shape[0],), t, device=x.device)
    labels = () if expert.classes is None else (torch.full_like(timesteps, expert.classes.num_embeddings - 1),)  # no class
    with calculating_in(x.device, precision):
        expert(x, timesteps, *labels)


def _noised(process: DDPMScheduler, x_0: Tensor, epsilon: Tensor, t: int) -> Tensor:
    """Eq. 1: return x_t of all images."""
    return process.add_noise(x_0, epsilon, torch.tensor([t]))


def _blocks(stage: nn.Module) -> str:
    """Name the layers of a stage, such as ``residual+attention``, each kind once."""
    return "+".join(dict.fromkeys(_BLOCKS.get(type(block), type(block).__name__) for block in stage.children()))


def _own_timesteps(configs: Sequence[Config], per_interval: int) -> list[int]:
    """Return ``per_interval`` timesteps of every expert's interval: the middles of ``per_interval`` equal parts."""
    if per_interval < 1:
        raise UserError(f"per_interval: must be at least 1, not {per_interval}")
    intervals = [expert.interval for config in configs for expert in config.experts]
    parts = 2 * per_interval
    return [first + (2 * part + 1) * (end - first) // parts for first, end in intervals for part in range(per_interval)]


def _checked(timesteps: Sequence[int] | None, diffusion: DiffusionConfig) -> list[int]:
    """Return the timesteps in order, without repeats."""
    total = diffusion.timesteps
    for t in timesteps or ():
        if not 0 <= t < total:
            raise UserError(f"timesteps: must be 0 to {total - 1}, not {t}")
    return sorted(set(timesteps or even_timesteps(total)))


def _curve(spectrum: Spectrum, **labels) -> dict:
    """Return one curve with its labels as a row of lists."""
    return labels | {
        "frequency": spectrum.frequencies.tolist(),
        "log_amplitude": spectrum.log_amplitude.tolist(),
        "relative_log_amplitude": spectrum.relative_log_amplitude.tolist(),
        "images": spectrum.count,
    }


def _table(curves: Iterable[dict]) -> pd.DataFrame:
    """Return the curves as one table with a row for every frequency."""
    per_frequency = ["frequency", "log_amplitude", "relative_log_amplitude"]
    return pd.DataFrame(curves).explode(per_frequency, ignore_index=True)[list(COLUMNS)].astype(COLUMNS)
