"""Variance components of a proxy score on any images and preset, and rank correlation with longer trainings.

    python benchmarks/proxy_variance.py [--preset thumbnails-meme --data PATH] [--steps 125 2000] [--dimensions split p] ...

Every expert gets some candidates, the hand-made pattern's and random ones, which are trained to each of ``--steps`` with every
training seed. Cascades in which all candidates occur equally often are scored with every sampling seed, like trials of a search.
Seeds are common to all cascades.

For each length, log FID is decomposed as in benchmarks/score_variance.py. ``architecture_share`` is the variance between
architectures, over that plus its interactions with seeds, for one training seed and for the mean of 2, 3 and so on. ``tau`` is
Kendall's tau between the cascades' mean scores at the first length and at each later one, with a 95 % bootstrap interval over
cascades. ``tau_of_one_seed`` is the mean tau between the scores of one training seed at the first length and the mean scores of
all others at the later one. Scores are written to --out as cascades.csv, beside the bank. An interrupted command resumes when it
is run again. The last line is one JSON object.
"""

import argparse
import json
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from digits_table.make import read_csv, write_csv
from scipy.stats import kendalltau
from score_variance import FACTORS, components, share

from meme.config.schema import Config
from meme_nas.record.tasks import Task, attempt
from meme_nas.settings import SearchSettings
from meme_nas.worker.objective import Objective
from search_spaces.domain import draw, size
from search_spaces.space import PAPER, build_space

BOOTSTRAPS = 2_000
ENSEMBLE_ONLY = 1  # a rung below the search's, at which only the score is kept


@dataclass(frozen=True)
class Design:
    """Candidates to train and cascades to score."""

    config: Config
    candidates: list[list[Config]]
    """Configs for every expert: the hand-made pattern with the candidate in the expert's place."""
    cascades: list[tuple[int, ...]]
    """Index of one candidate for every expert."""

    def cascade(self, places: tuple[int, ...]) -> Config:
        chosen = [
            configs[place].experts[index] for index, (configs, place) in enumerate(zip(self.candidates, places, strict=True))
        ]
        return self.config.with_(experts=[expert.model_dump() for expert in chosen])


def design(config: Config, dimensions: tuple[str, ...], candidates: int, cascades: int) -> Design:
    space, source = build_space(config, dimensions), random.Random(0)
    experts = range(1, len(config.experts) + 1)
    if cascades > candidates ** len(experts) or candidates > min(size(space.experts_domains(number)) for number in experts):
        raise SystemExit(f"there are not {candidates} candidates an expert, or not {cascades} cascades of them")
    found: list[list[Config]] = []
    for number in experts:
        drawn = {config.architecture_id: config}
        while len(drawn) < candidates:
            other = space.with_expert(config, number, draw(space.experts_domains(number), source))
            drawn.setdefault(other.architecture_id, other)
        found.append(list(drawn.values()))
    chosen = {(0,) * len(found): None}
    while len(chosen) < cascades:
        decks = [source.sample(range(candidates), candidates) for _ in found]
        chosen |= dict.fromkeys(zip(*decks, strict=True))
    return Design(config, found, list(chosen)[:cascades])


def outcome(folder: Path, task: Task) -> float | None:
    """Run a task and return its score, or None if it only trains one expert. It runs in a worker."""
    ended = attempt(Objective(folder, folder / "bank"), task)
    if ended.failure:
        raise SystemExit(ended.failure)
    return ended.fid


def train_all(folder: Path, plan: Design, steps: list[int], seeds: range, pool: ProcessPoolExecutor) -> None:
    wanted = [
        Task(0, config.with_(training={"steps": length}), "expert", expert=number, seeds=(seed,))
        for length in steps
        for seed in seeds
        for number, configs in enumerate(plan.candidates, start=1)
        for config in configs
    ]
    for count, _ in enumerate(pool.map(outcome, [folder] * len(wanted), wanted), start=1):
        if count % 10 == 0 or count == len(wanted):
            print(f"{count}/{len(wanted)} experts", flush=True)


def score_all(
    folder: Path, plan: Design, steps: list[int], seeds: range, sampling_seeds: range, pool: ProcessPoolExecutor
) -> dict[tuple[int, ...], float]:
    """Return FID by (steps, training seed, sampling seed, cascade), scoring what is not recorded yet."""
    path, header = folder / "cascades.csv", ("steps", "training_seed", "sampling_seed", "cascade", "fid")
    known = {tuple(map(int, row[:4])): float(row[4]) for row in read_csv(path)}
    wanted = [
        (length, seed, sampling_seed, cascade)
        for length in steps
        for seed in seeds
        for sampling_seed in sampling_seeds
        for cascade in range(len(plan.cascades))
        if (length, seed, sampling_seed, cascade) not in known
    ]
    tasks = [
        Task(
            0,
            plan.cascade(plan.cascades[cascade]).with_(training={"steps": length}, evaluation={"seed": sampling_seed}),
            "candidate",
            seeds=(seed,),
            rung=ENSEMBLE_ONLY,
        )
        for length, seed, sampling_seed, cascade in wanted
    ]
    for count, fid in enumerate(pool.map(outcome, [folder] * len(tasks), tasks), start=1):
        known[wanted[count - 1]] = fid
        if count % 20 == 0 or count == len(tasks):
            write_csv(path, header, [(*key, f"{value:.6g}") for key, value in sorted(known.items())])
            print(f"{count}/{len(tasks)} cascades", flush=True)
    return known


def tau_between(first: np.ndarray, later: np.ndarray) -> dict[str, float]:
    """Return Kendall's tau and its interval between log FID (cascades, training seeds) at two lengths."""

    def of(pick: np.ndarray) -> float:
        return float(kendalltau(first[pick].mean(1), later[pick].mean(1)).statistic)

    source, everything = np.random.default_rng(0), np.arange(len(first))
    low, high = np.nanquantile([of(source.choice(everything, len(first))) for _ in range(BOOTSTRAPS)], (0.025, 0.975))
    seeds = range(first.shape[1])
    single = [kendalltau(first[:, seed], np.delete(later, seed, 1).mean(1)).statistic for seed in seeds] if len(seeds) > 1 else []
    found = {"tau": of(everything), "low": float(low), "high": float(high), "tau_of_one_seed": float(np.mean(single or [np.nan]))}
    return {name: round(value, 3) for name, value in found.items()}


def contributions(plan: Design, logs: np.ndarray) -> list[list[float]]:
    """Return each candidate's contribution to log FID (cascades, training seeds, sampling seeds), less its expert's mean."""
    chosen = np.array(plan.cascades)
    columns = np.concatenate([np.eye(len(own))[chosen[:, index]] for index, own in enumerate(plan.candidates)], axis=1)
    fitted = np.linalg.lstsq(columns, logs.mean(axis=(1, 2)), rcond=None)[0].reshape(len(plan.candidates), -1)
    return [[round(float(value), 3) for value in row - row.mean()] for row in fitted]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="digits-meme")
    parser.add_argument("--data")
    parser.add_argument("--steps", type=int, nargs="+", help="training lengths, rising (default: the preset's proxy)")
    parser.add_argument("--dimensions", nargs="+", default=list(PAPER))
    parser.add_argument("--candidates", type=int, default=4, help="candidates of every expert")
    parser.add_argument("--cascades", type=int, default=24)
    parser.add_argument("--training-seeds", type=int, default=3)
    parser.add_argument("--sampling-seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("results/proxy-variance"))
    options = parser.parse_args()
    settings = SearchSettings(preset=options.preset, data=options.data, features="auto" if options.data else None)
    config = settings.as_proxy(settings.full_config())
    plan = design(config, tuple(options.dimensions), options.candidates, options.cascades)
    steps, seeds = options.steps or [config.training.steps], range(options.training_seeds)
    with ProcessPoolExecutor(options.workers) as pool:
        train_all(options.out.absolute(), plan, steps, seeds, pool)
        scores = score_all(options.out.absolute(), plan, steps, seeds, range(options.sampling_seeds), pool)
    shape = (len(steps), len(seeds), options.sampling_seeds, len(plan.cascades))
    values = np.log([scores[steps[a], b, c, d] for a, b, c, d in np.ndindex(shape)]).reshape(shape).transpose(0, 3, 1, 2)
    result: dict[str, dict] = {}
    for length, logs in zip(steps, values, strict=True):
        found = components(logs)
        print(f"{length} steps: median FID {np.exp(np.median(logs)):.3f}; variance of log FID, in units of 0.0001")
        for kept, value in sorted(found.items(), key=lambda pair: -pair[1]):
            print(f"  {' x '.join(FACTORS[axis] for axis in sorted(kept)):<48} {1e4 * value:9.2f}")
        for number, (own, parts) in enumerate(zip(plan.candidates, contributions(plan, logs), strict=True), start=1):
            experts = [config.experts[number - 1] for config in own]
            told = [f"{expert.low_channels} @ {expert.p:g}: {part:+.3f}" for expert, part in zip(experts, parts, strict=True)]
            print(f"  expert {number}, what its candidates add to log FID: {', '.join(told)}")
        shares = {count: round(share(found, found[frozenset({0})], count), 3) for count in range(1, len(seeds) + 1)}
        result[str(length)] = {"architecture_share": shares}
        if length != steps[0]:
            result[str(length)] |= tau_between(values[0].mean(2), logs.mean(2))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
