"""Variance components of a proxy score: architecture, training seed, sampling seed, and their interactions.

    python benchmarks/score_variance.py

The data are 36 cascades of benchmarks/digits_table, each scored with 3 training seeds x 3 sampling seeds at 125 and at 250 steps
an expert. Logarithms of FID are decomposed as a crossed random-effects design without replication (expected mean squares). Seeds
are common to all candidates, so the main effect of a seed cannot change their order. ``architecture_share`` is the variance
between architectures, over that plus the interactions with seeds, which is the noise of a ranking. It is given for one training
seed, and for the mean of 2 and 3. ``split_share`` is the same for splits alone: their part of the variance between architectures
by additive least squares over all 324 cascades of each seed, against the same noise. The last line is one JSON object.
"""

import itertools
import json

import numpy as np
import pandas as pd
from digits_table.make import CANDIDATES, CROSSED, FOLDER, SAMPLING_SEEDS, SEEDS, STEPS, design

FACTORS = ("architecture", "training_seed", "sampling_seed")


def crossed(scores: pd.DataFrame, steps: int) -> np.ndarray:
    """Return log FID (architectures, training seeds, sampling seeds) at ``steps`` training steps."""
    place = {cascade: index for index, cascade in enumerate(design()[:CROSSED])}
    values = np.full((CROSSED, len(SEEDS), len(SAMPLING_SEEDS)), np.nan)
    for row in scores[scores["steps"] == steps].itertuples():
        cascade = (row.expert1, row.expert2, row.expert3, row.expert4)
        if cascade in place:
            values[place[cascade], row.training_seed, row.sampling_seed] = np.log(row.fid)
    if np.isnan(values).any():
        raise SystemExit("the table is not complete: run benchmarks/digits_table/make.py score")
    return values


def components(values: np.ndarray) -> dict[frozenset[int], float]:
    """Return the variance component of every set of factors, from mean squares. Estimates below 0 are set to 0."""
    axes = range(values.ndim)
    squares = {}
    for size in range(1, values.ndim + 1):
        for kept in itertools.combinations(axes, size):
            squares[frozenset(kept)] = _mean_square(values, kept)
    found: dict[frozenset[int], float] = {}
    for kept in sorted(squares, key=len, reverse=True):  # E[MS] = sum over supersets of (levels left out) x component
        above = sum(found[other] * _left_out(values, other) for other in found if kept < other)
        found[kept] = max(0.0, (squares[kept] - above) / _left_out(values, kept))
    return found


def _left_out(values: np.ndarray, kept: frozenset[int]) -> int:
    return int(np.prod([length for axis, length in enumerate(values.shape) if axis not in kept]))


def _mean_square(values: np.ndarray, kept: tuple[int, ...]) -> float:
    """Return the mean square of the interaction of the axes ``kept``: means over the others, less effects of lower order."""
    effect = values.mean(axis=tuple(axis for axis in range(values.ndim) if axis not in kept), keepdims=True)
    for axis in kept:
        effect = effect - effect.mean(axis=axis, keepdims=True)
    freedom = np.prod([values.shape[axis] - 1 for axis in kept])
    return float((effect**2).sum() * _left_out(values, frozenset(kept)) / freedom)


def share(found: dict[frozenset[int], float], signal: float, seeds: int) -> float:
    """Return ``signal`` over ``signal`` plus the interactions with architecture, for the mean of ``seeds`` training seeds."""
    noise = sum(value / (seeds if 1 in kept else 1) for kept, value in found.items() if 0 in kept and len(kept) > 1)
    return signal / (signal + noise)


def split_variance(scores: pd.DataFrame) -> tuple[float, float]:
    """Return the variances of log FID over the table's cascades that splits and that p explain, averaged over training seeds."""
    parts = []
    for seed in SEEDS:
        rows = scores[(scores["steps"] == STEPS[0]) & (scores["sampling_seed"] == 0) & (scores["training_seed"] == seed)]
        target, columns = np.log(rows["fid"].values), {"split": [], "p": []}
        for number in range(1, 5):
            chosen = [CANDIDATES[place] for place in rows[f"expert{number}"]]
            columns["split"].append(pd.get_dummies([f"{a} {b}" for a, b, _ in chosen]).values.astype(float))
            columns["p"].append(pd.get_dummies([p for *_, p in chosen]).values.astype(float))
        blocks = {kind: np.hstack(each) for kind, each in columns.items()}
        design_matrix = np.hstack([np.ones((len(target), 1)), blocks["split"], blocks["p"]])
        weights = np.linalg.lstsq(design_matrix, target, rcond=None)[0]
        middle = 1 + blocks["split"].shape[1]
        parts.append((np.var(blocks["split"] @ weights[1:middle]), np.var(blocks["p"] @ weights[middle:])))
    return tuple(np.mean(parts, axis=0))


def main() -> None:
    scores = pd.read_csv(FOLDER / "cascades.csv")
    split, probabilities = split_variance(scores)
    result = {"split_percent_of_explained": round(100 * split / (split + probabilities), 1)}
    for steps in STEPS:
        found = components(crossed(scores, steps))
        names = {" x ".join(FACTORS[axis] for axis in sorted(kept)): 1e4 * value for kept, value in found.items()}
        print(f"{steps} steps: variance of log FID, in units of 0.0001")
        for name, value in sorted(names.items(), key=lambda pair: -pair[1]):
            print(f"  {name:<48} {value:9.2f}")
        architecture = found[frozenset({0})]
        only_split = architecture * split / (split + probabilities)
        result[str(steps)] = {
            "architecture_share": {seeds: round(share(found, architecture, seeds), 3) for seeds in (1, 2, 3)},
            "split_share": {seeds: round(share(found, only_split, seeds), 3) for seeds in (1, 2, 3)},
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
