"""Training effort of search strategies, replayed on a table of trained experts with many seeds each.

    python benchmarks/search_efficiency.py [--seeds 20] [--budget 50] [--out results/search-efficiency] [--quick]

The table (benchmarks/digits_table) has 27 candidates for every expert of digits-meme, trained with three seeds, and the FID of
some of their 531,441 cascades. For each training seed, the other cascades get the prediction of a surrogate fitted to the scored
ones, plus noise that is fixed for each cascade. The noise has the size of the error in cross-validation, which ``truth`` states.
Each strategy is the product's own code, two tasks at a time. Only the training is looked up. Search seed s uses training seed
s mod 3.

Effort is counted in trainings of one expert at proxy length. Each ratio is the median over seeds of joint TPE's total effort,
over the effort of factorised search until its best score is as good as joint TPE's last. A run that never reaches it counts as
twice joint TPE's effort. ``steps_ratio`` charges joint TPE every training, which plain Optuna would make. ``made_ratio`` charges
only different trainings, as ours takes the others from the bank. ``passes_ratio`` counts passes of an image through an expert, a
training step's gradient as two, and adds those of scoring as if cascades shared no sampler steps. ``regret`` is the excess of the
best score over that of the table's best cascade, in percent. The last line is one JSON object. Curves with bands over seeds are
written to --out as CSV and PNG. ``--quick``: 3 seeds.
"""

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from digits_table.make import CANDIDATES, FOLDER, LEVEL_1, LEVEL_2, PROBABILITIES, SEEDS, STEPS, config_of
from real_efficiency import ratio
from scipy.stats import kendalltau

from meme.config.schema import Config
from meme.scoring.cost import sampler_passes
from meme.support.files import written_whole
from meme.training.trainer import PASSES_A_STEP
from meme_nas.record.ranking import hypervolumes
from meme_nas.record.study import Study
from meme_nas.record.tasks import Outcome, Task
from meme_nas.settings import SearchSettings
from meme_nas.strategies.base import Strategy
from meme_nas.strategies.factorised import Factorised
from meme_nas.strategies.joint import Joint
from meme_nas.surrogate.kernel import Candidates
from meme_nas.surrogate.model import Surrogate
from search_spaces.domain import Choices, Integer, Real

EXPERTS = range(1, 5)
BASE_CANDIDATES = ((8, 16, 0.6), (8, 16, 0.6), (8, 32, 0.2), (8, 32, 0.2))  # the hand-made pattern on the table's grid
FOLDS = 5
P_STEP = 0.4  # between the table's probabilities
STRATEGIES = {
    "random": ("joint", "random", False),
    "joint TPE": ("joint", "tpe", False),
    "joint NSGA-II": ("joint", "nsga2", False),
    "joint TPE with bank": ("joint", "tpe", True),
    "factorised TPE": ("factorised", "tpe", True),
    "factorised": ("factorised", "model", True),
}
"""Strategy, sampler, and True if an expert that was trained before is free."""
RATIOS = {"steps": "ratio_median", "made": "made_ratio_median", "passes": "passes_ratio_median"}


@dataclass(frozen=True)
class TableSpace:
    """Search space of the table's cascades."""

    base: Config

    @property
    def domains(self) -> dict:
        found = {}
        for number in EXPERTS:
            found[f"expert{number}.level1.low"] = Integer(LEVEL_1[0], LEVEL_1[-1], LEVEL_1[1])
            found[f"expert{number}.level2.low"] = Integer(LEVEL_2[0], LEVEL_2[-1], LEVEL_2[1])
            found[f"expert{number}.p"] = Real(PROBABILITIES[0], PROBABILITIES[-1], P_STEP)
        return found

    def config(self, choices: Choices, name: str) -> Config:
        return config_of(self.cascade(choices), 0, STEPS[0]).with_(name=name)

    shared = ()

    def experts_domains(self, number: int) -> dict:
        return {name: domain for name, domain in self.domains.items() if name.startswith(f"expert{number}.")}

    def expert_choices(self, config: Config, number: int) -> Choices:
        return {name: value for name, value in self.choices(config).items() if name.startswith(f"expert{number}.")}

    def with_expert(self, config: Config, number: int, expert_choices: Choices) -> Config:
        return self.config(self.choices(config) | expert_choices, config.name)

    def cascade(self, choices: Choices) -> tuple[int, ...]:
        parts = ("level1.low", "level2.low", "p")
        return tuple(CANDIDATES.index(tuple(choices[f"expert{number}.{part}"] for part in parts)) for number in EXPERTS)

    def choices(self, config: Config) -> Choices:
        found: Choices = {}
        for number, expert in enumerate(config.experts, start=1):
            low = {f"expert{number}.level{level}.low": width for level, width in enumerate(expert.low_channels, start=1)}
            found |= low | {f"expert{number}.p": expert.p}
        return found


class Table:
    """Losses and MACs of every expert, and the FID of every cascade, with one training seed."""

    def __init__(self, seed: int, steps: int = STEPS[0]):
        experts = pd.read_csv(FOLDER / "experts.csv").query("training_seed == @seed and steps == @steps")
        places = {candidate: place for place, candidate in enumerate(CANDIDATES)}
        experts["place"] = [places[row] for row in zip(experts.level1_low, experts.level2_low, experts.p, strict=True)]
        self.losses, self.macs = (experts.pivot(index="expert", columns="place", values=name).values for name in ("loss", "macs"))
        scored = pd.read_csv(FOLDER / "cascades.csv")
        scored = scored.query("training_seed == @seed and steps == @steps and sampling_seed == 0")
        self.cascades, self.fids = scored[[f"expert{n}" for n in EXPERTS]].values, scored["fid"].values
        self.model = Surrogate(self.candidates(), self.cascades, self.fids)
        predicted = self._cross_validated()
        self.residual = float(np.std(np.log(self.fids / predicted)))
        self.truth = {
            "scored": len(self.fids),
            "tau_unseen": round(float(kendalltau(predicted, self.fids).statistic), 3),
            "r2_unseen": round(1 - float(((predicted - self.fids) ** 2).mean() / self.fids.var()), 4),
            "residual_percent": round(100 * self.residual, 2),
        }
        self.parts = [self.model.contributions(number)[0] for number in EXPERTS]
        self.best = min(self.fid(cascade) for cascade in self._promising())

    def candidates(self) -> list[Candidates]:
        rows = [[LEVEL_1.index(a) / 2, LEVEL_2.index(b) / 2, PROBABILITIES.index(p) / 2] for a, b, p in CANDIDATES]
        grid = np.array(rows)
        return [Candidates(grid, losses) for losses in self.losses]

    def _cross_validated(self) -> np.ndarray:
        order, predicted = np.random.default_rng(0).permutation(len(self.fids)), np.empty(len(self.fids))
        for fold in np.array_split(order, FOLDS):
            rest = np.setdiff1d(order, fold)
            predicted[fold] = Surrogate(self.candidates(), self.cascades[rest], self.fids[rest]).predict(self.cascades[fold])
        return predicted

    def fid(self, cascade: tuple[int, ...]) -> float:
        """Return the predicted FID with the noise of this cascade."""
        noise = np.random.default_rng([11, *cascade]).standard_normal()
        return float(self.model.predict([cascade])[0] * np.exp(self.residual * noise))

    def _promising(self, count: int = 9) -> Iterator[tuple[int, ...]]:
        best = [np.argsort(part)[:count] for part in self.parts]
        return (tuple(map(int, cascade)) for cascade in itertools.product(*best))


def objective(task: Task, table: Table, space: TableSpace) -> Outcome:
    cascade = space.cascade(space.choices(task.config))
    macs = float(np.mean([table.macs[n - 1, place] for n, place in zip(EXPERTS, cascade, strict=True)]))
    if task.expert:
        place = cascade[task.expert - 1]
        return Outcome(task.number, task.expert, loss=table.losses[task.expert - 1, place], loss_error=0.0, macs=macs)
    return Outcome(task.number, fid=table.fid(cascade), macs=macs)


def replay(name: str, seed: int, budget: int, table: Table) -> pd.DataFrame:
    """Replay one search, and return effort, best FID and hypervolume after every scored cascade."""
    strategy, sampler, has_bank = STRATEGIES[name]
    space = TableSpace(config_of(tuple(CANDIDATES.index(each) for each in BASE_CANDIDATES), 0, STEPS[0]))
    settings = SearchSettings(strategy=strategy, sampler=sampler, budget=budget, seed=seed, device="cpu")
    kind = Factorised if strategy == "factorised" else Joint
    search: Strategy = kind(settings, Study.in_memory(settings.objectives), space=space, yardsticks=[("hand-made", space.base)])
    spent, trained, rows, running = 0, set(), [], []
    own, scored = space.base.training, 0
    while not search.done:
        while len(running) < 2 and (task := search.next_task()):
            running.append(task)
        task = running.pop(0)
        cascade = space.cascade(space.choices(task.config))
        for number in (task.expert,) if task.expert else EXPERTS:
            spent += not has_bank or (number, cascade[number - 1]) not in trained
            trained.add((number, cascade[number - 1]))
        outcome = objective(task, table, space)
        search.record(outcome)
        if not task.expert:
            scored += 1
            passes = spent * PASSES_A_STEP * own.steps * own.batch_size + scored * sampler_passes(settings.as_proxy(space.base))
            rows.append((spent, passes, outcome.fid))
    volumes = hypervolumes(sorted(search.study.trials, key=lambda trial: trial.number), ("fid", "macs"), (4.0, table.macs.max()))
    frame = pd.DataFrame(rows, columns=["trainings", "passes", "fid"])
    frame["best"], frame["hypervolume"] = frame["fid"].cummin(), volumes[: len(frame)]
    frame["regret_percent"] = 100 * (frame["best"] / table.best - 1)
    return frame.assign(strategy=name, seed=seed)


def summary(runs: pd.DataFrame) -> dict:
    by = dict(list(runs.groupby(["strategy", "seed"])))
    seeds = sorted(runs["seed"].unique())
    result = {}
    for name in STRATEGIES:
        ratios = [ratio(by["joint TPE", seed], by[name, seed], "trainings") for seed in seeds]
        with_bank = {
            count: [ratio(by["joint TPE with bank", s], by[name, s], count) for s in seeds] for count in ("trainings", "passes")
        }
        last = [by[name, seed].iloc[-1] for seed in seeds]
        result[name] = {
            "ratio_median": round(float(np.median(ratios)), 2),
            "ratio_quartiles": [round(float(q), 2) for q in np.quantile(ratios, (0.25, 0.75))],
            "made_ratio_median": round(float(np.median(with_bank["trainings"])), 2),
            "passes_ratio_median": round(float(np.median(with_bank["passes"])), 2),
            "final_regret_percent": round(float(np.median([row["regret_percent"] for row in last])), 2),
            "final_hypervolume": round(float(np.median([row["hypervolume"] for row in last])), 4),
        }
    return result


def _at(run: pd.DataFrame, column: str, effort: np.ndarray) -> np.ndarray:
    """Return the values of ``column`` after the efforts ``effort``; NaN before the first score."""
    place = np.searchsorted(run["trainings"].values, effort, side="right") - 1
    return np.where(place >= 0, run[column].values[place], np.nan)


def draw_curves(runs: pd.DataFrame, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5), constrained_layout=True)
    grid = np.arange(4, runs["trainings"].max() + 1, 2)
    for axis, column, label in zip(axes, ("regret_percent", "hypervolume"), ("regret, %", "hypervolume"), strict=True):
        for name in STRATEGIES:
            curves = [_at(run, column, grid) for _, run in runs[runs["strategy"] == name].groupby("seed")]
            low, middle, high = np.nanquantile(curves, (0.25, 0.5, 0.75), axis=0)
            (line,) = axis.plot(grid, middle, label=name)
            axis.fill_between(grid, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set(xlabel="trainings of one expert at proxy length", ylabel=label)
    axes[0].set_yscale("symlog", linthresh=0.1)
    axes[0].legend(frameon=False)
    figure.suptitle("Median over seeds, band between the quartiles")
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=110, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--budget", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("results/search-efficiency"))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    options.seeds = 3 if options.quick else options.seeds
    begun, tables = time.monotonic(), {seed: Table(seed) for seed in SEEDS}
    print(json.dumps({"truth": {seed: table.truth for seed, table in tables.items()}}), flush=True)
    runs = []
    for name in STRATEGIES:
        started = time.monotonic()
        runs += [replay(name, seed, options.budget, tables[seed % len(SEEDS)]) for seed in range(options.seeds)]
        print(f"{name}: {options.seeds} searches in {time.monotonic() - started:.0f} s", flush=True)
    runs = pd.concat(runs, ignore_index=True)
    options.out.mkdir(parents=True, exist_ok=True)
    runs.to_csv(options.out / "runs.csv", index=False)
    draw_curves(runs, options.out / "curves.png")
    found = summary(runs)
    for name, row in found.items():
        print(f"{name:<20} {row}", flush=True)
    facts = {"seeds": options.seeds, "budget": options.budget, "minutes": round((time.monotonic() - begun) / 60, 1)}
    own = found["factorised"]
    ratios = {f"{name}_ratio": own[key] for name, key in RATIOS.items()}
    print(json.dumps(ratios | {"strategies": found} | facts))


if __name__ == "__main__":
    main()
