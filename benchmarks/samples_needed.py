"""Number of samples, and of sampler steps, that orders cascades as well as large numbers do.

    python benchmarks/samples_needed.py [--bank results/digits-table/bank] [--cascades 36] [--samples 125 250 500 1000]

Draws samples of the first cascades of the digits table, trained 125 steps an expert with one training seed. The bank must have
been filled by ``benchmarks/digits_table/make.py train``. Their FID from the first n images is compared with the table's, which is
the mean over two other sampling seeds with 1,000 samples each. ``tau`` is Kendall's, with a bootstrap interval over cascades.
``residual`` is the standard deviation of log FID around the straight line through the table's: the noise of a candidate's score.
All is repeated with half the sampler's steps. The last line is JSON.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from digits_table.make import FOLDER, config_of, design, open_bank
from scipy.stats import kendalltau

from meme.diffusion.ensemble import Ensemble
from meme.pipeline import draw, evaluate
from meme_nas.worker.objective import Basis, open_basis

STEPS, SEED, OTHER_SAMPLING_SEEDS = 125, 0, (1, 2)
REDRAWS = 2_000


def fids(
    bank_folder: Path, basis: Basis, cascade: tuple[int, ...], sampler_steps: int, counts: list[int]
) -> tuple[dict[int, float], float]:
    """Return the FID of the first n images for every n of ``counts``, and the seconds of drawing the largest n."""
    config = config_of(cascade, SEED, STEPS).with_(sampling={"steps": sampler_steps}, evaluation={"samples": max(counts)})
    bank = open_bank(bank_folder)
    found = [bank.obtain(config, number) for number in range(1, 5)]
    ensemble = Ensemble(config, [bank.load(config, number, banked) for number, banked in enumerate(found, start=1)])
    begun = time.perf_counter()
    drawn = torch.cat(list(draw(ensemble, max(counts), config.evaluation.seed)))
    seconds = time.perf_counter() - begun
    scores = {n: _fid(ensemble, basis, drawn[:n]) for n in counts}
    return scores, seconds


def _fid(ensemble: Ensemble, basis: Basis, drawn: torch.Tensor) -> float:
    counted = Ensemble(ensemble.config.with_(evaluation={"samples": len(drawn)}), ensemble.experts)
    return evaluate(counted, basis.images, basis.space, metrics=("fid",), batches=iter(drawn.split(250))).fid


def reference(cascades: list[tuple[int, ...]]) -> np.ndarray:
    """Return log FID of the table, averaged over the sampling seeds that this command does not use."""
    table = pd.read_csv(FOLDER / "cascades.csv")
    table = table[(table.training_seed == SEED) & (table.steps == STEPS) & table.sampling_seed.isin(OTHER_SAMPLING_SEEDS)]
    means = table.groupby([f"expert{n}" for n in range(1, 5)]).fid.apply(lambda fid: np.log(fid).mean())
    return np.array([means[cascade] for cascade in cascades])


def agreement(scores: np.ndarray, truth: np.ndarray) -> dict[str, float | list[float]]:
    source, picks = np.random.default_rng(0), len(truth)
    redrawn = [source.integers(picks, size=picks) for _ in range(REDRAWS)]
    taus = [kendalltau(scores[pick], truth[pick]).statistic for pick in redrawn]
    line = np.polynomial.Polynomial.fit(truth, scores, 1)
    return {
        "tau": round(float(kendalltau(scores, truth).statistic), 3),
        "interval": [round(float(edge), 3) for edge in np.nanquantile(taus, (0.025, 0.975))],
        "residual": round(float(np.std(scores - line(truth), ddof=2)), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", type=Path, default=Path("results/digits-table/bank"))
    parser.add_argument("--cascades", type=int, default=36)
    parser.add_argument("--samples", type=int, nargs="+", default=[125, 250, 500, 1000])
    parser.add_argument("--sampler-steps", type=int, nargs="+", default=[20, 10])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cascades = design()[: arguments.cascades]
    truth, basis = reference(cascades), open_basis(config_of(cascades[0], SEED, STEPS), "cpu", None)
    results: dict[str, object] = {"spread": round(float(np.std(truth, ddof=1)), 4)}
    for steps in arguments.sampler_steps:
        drawn = [fids(arguments.bank.absolute(), basis, cascade, steps, arguments.samples) for cascade in cascades]
        rows, seconds = zip(*drawn, strict=True)
        for count in arguments.samples:
            found = agreement(np.array([math.log(row[count]) for row in rows]), truth)
            found["seconds"] = round(float(np.median(seconds)) * count / max(arguments.samples), 2)
            print(f"{steps:3d} steps, {count:5d} samples: {found}", flush=True)
            results[f"{steps} steps, {count} samples"] = found
    print(json.dumps(results))


if __name__ == "__main__":
    main()
