"""Portrait of a configuration: some of its images at several steps from noise to data, and the spectra of its experts."""

import io
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from PIL import Image
from torch import Tensor

from meme.analysis.spectra import Data, features
from meme.config.schema import Config
from meme.diffusion.ensemble import Ensemble, expert_at
from meme.diffusion.sampler import pass_through, sampling_timesteps, starting_noise, to_uint8
from meme.pipeline import decoder
from meme.scoring.cost import ensemble_cost
from meme.support.grids import grid
from meme_nas.record.trial_log import TrialRecord
from meme_nas.report.summary import Frame, Portrait, Spectrum

IMAGES = 5  # images shown from noise to data
FRAMES = 3  # frames of each expert, the last at its hand-over
ANALYSED = 256  # images over which spectra are averaged


def portrait(trial: TrialRecord, ensemble: Ensemble, data: Data, seed: int, device: torch.device | str = "cpu") -> Portrait:
    """Return the portrait of ``trial`` from its trained ``ensemble``. Its images are the first of those drawn with ``seed``."""
    return Portrait(trial, tuple(_film(ensemble, seed, device)), tuple(_spectra(ensemble, data, seed)))


def portrait_macs(config: Config) -> float:
    """Return the MACs of one portrait of ``config``."""
    passes = IMAGES * config.sampling.steps + ANALYSED * len(config.experts)
    return passes * ensemble_cost(config).macs


@torch.inference_mode()
def _film(ensemble: Ensemble, seed: int, device: torch.device | str) -> Iterator[Frame]:
    """Yield frames in the order of denoising: the noise, then a few states of every expert's run of steps."""
    config = ensemble.config
    timesteps = sampling_timesteps(config.diffusion, config.sampling)
    next_to = dict(pairwise([*timesteps, 0]))  # the noise level that a step leaves
    decode, indices = decoder(config, device), range(IMAGES)
    x = starting_noise(config.image, seed, 0, IMAGES).to(device)
    yield Frame(0, timesteps[0], _png(decode(x)))
    for run in ensemble.hand_overs(timesteps):
        for part in _parts(run, FRAMES):
            x = pass_through(ensemble.denoise, x, indices, part, config, seed, device)
            yield Frame(expert_at(config, part[0]), next_to[part[-1]], _png(decode(x)))


def _parts(run: Sequence[int], count: int) -> list[Sequence[int]]:
    """Return ``run`` cut into up to ``count`` parts of about equal length."""
    ends = sorted({round(len(run) * part / count) for part in range(count + 1)})
    return [run[first:end] for first, end in pairwise(ends)]


def _png(x: Tensor) -> bytes:
    """Return a PNG of images ``x`` (B, C, H, W) in [-1, 1], one below the other."""
    pixels = grid(to_uint8(x).cpu(), columns=1).numpy()
    target = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(target, format="PNG")
    return target.getvalue()


def _spectra(ensemble: Ensemble, data: Data, seed: int) -> Iterator[Spectrum]:
    """Yield the spectrum of every expert's last stage in the middle of the expert's interval."""
    middles = [sum(expert.interval) // 2 for expert in ensemble.config.experts]
    table = features(ensemble, data, middles, count=ANALYSED, seed=seed)
    last = table[table["depth"] == table["depth"].max()]
    for (number, t), curve in last.groupby(["expert", "timestep"]):
        yield Spectrum(int(number), int(t), tuple(curve["frequency"].tolist()), tuple(curve["relative_log_amplitude"].tolist()))
