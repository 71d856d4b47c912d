"""Benefit of training candidates briefly first and continuing the better half, in searches replayed on the digits table.

    python benchmarks/halving.py [--seeds 12] [--budgets 6 8 12 16]

Compares factorised search with one rung (125 steps) and with two (62, then on to 125) on benchmarks/digits_table with its first
training seed. Both run the product's own code, two tasks at a time, and spend the same training steps. Training and scoring are
looked up. A cascade that the table lacks gets the prediction of a surrogate fitted to the others, plus noise (see
search_efficiency.py). ``regret_percent`` is the excess of the best cascade's FID at 125 steps over the table's best, as quartiles
over search seeds. The last line is one JSON object.
"""

import argparse
import json

import numpy as np
import pandas as pd
from digits_table.make import CANDIDATES, HALF, SEEDS, STEPS, config_of
from search_efficiency import BASE_CANDIDATES, EXPERTS, Table, TableSpace, objective

from meme_nas.record.study import Study
from meme_nas.record.tasks import attempt
from meme_nas.settings import SearchSettings
from meme_nas.strategies.rungs import factorised


def replay(rungs: int, seed: int, budget: int, tables: dict[int, Table]) -> dict:
    """Replay one search and return its result and its effort."""
    space = TableSpace(config_of(tuple(CANDIDATES.index(each) for each in BASE_CANDIDATES), SEEDS[0], STEPS[0]))
    settings = SearchSettings(strategy="factorised", rungs=rungs, budget=budget, seed=seed, device="cpu")
    search = factorised(settings, Study.in_memory(settings.objectives), space=space, yardsticks=[("hand-made", space.base)])
    trained: dict[tuple[int, int], int] = {}
    running, cascades = [], 0
    while not search.done:
        while len(running) < 2 and (task := search.next_task()):
            running.append(task)
        task = running.pop(0)
        steps, cascade = task.config.training.steps, space.cascade(space.choices(task.config))
        for number in (task.expert,) if task.expert else EXPERTS:
            key = number, cascade[number - 1]
            trained[key] = max(trained.get(key, 0), steps)
        cascades += not task.expert
        search.record(attempt(lambda each: objective(each, tables[each.config.training.steps], space), task))
    whole = tables[STEPS[0]]
    best = min(trial.outcome.fid for trial in search.study.trials if trial.state == "complete")
    return {
        "rungs": rungs,
        "seed": seed,
        "budget": budget,
        "regret_percent": 100 * (best / whole.best - 1),
        "trainings": sum(trained.values()) / STEPS[0],
        "candidates": len(trained),
        "cascades": cascades,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--budgets", type=int, nargs="+", default=[6, 8, 12, 16])
    options = parser.parse_args()
    tables, found = {steps: Table(SEEDS[0], steps) for steps in (HALF, STEPS[0])}, []
    for budget in options.budgets:
        runs = pd.DataFrame([replay(rungs, seed, budget, tables) for rungs in (1, 2) for seed in range(options.seeds)])
        by_seed = runs.pivot(index="seed", columns="rungs", values="regret_percent")
        for rungs, row in runs.groupby("rungs"):
            low, middle, high = np.quantile(row["regret_percent"], (0.25, 0.5, 0.75))
            found.append({"budget": budget, "rungs": rungs, "regret_percent": [round(float(q), 2) for q in (low, middle, high)]})
            found[-1] |= {name: round(float(row[name].mean()), 1) for name in ("trainings", "candidates", "cascades")}
        found[-1]["better_seeds"] = int((by_seed[2] < by_seed[1]).sum())
        for row in found[-2:]:
            print(row, flush=True)
    print(json.dumps({"seeds": options.seeds, "runs": found}))


if __name__ == "__main__":
    main()
