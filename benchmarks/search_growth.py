"""Growth of the search's own cost: CPU time of proposals and records per budgeted trial, with outcomes that need no training.

    python benchmarks/search_growth.py [--budgets 50 200 1000] [--experts 2 4 8] [--levels 2 3] [--strategy factorised]

A row is one search of the largest budget, measured also when it reaches the smaller ones. A trial is one training of a whole
ensemble, which means N candidates, one of each of N experts, with their cascades. ``ms_per_trial`` is the mean CPU time per trial
up to a budget. ``ms_last`` is the mean over the last tenth of the trials, at least 10. ``share`` is the latter over the time of a
trial's training on one core at proxy length (``--train-seconds``: 4 experts x 125 steps on digits; it scales with the experts).

A score is a sum over experts of the distance of each split from a pattern of the expert's own, with noise that is a function of
the architecture. The record is in memory. The last line is one JSON object.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

from meme.config.presets import experts_of, preset
from meme.config.schema import Config
from meme_nas.record.study import Study
from meme_nas.record.tasks import Outcome, Task
from meme_nas.run import STRATEGIES
from meme_nas.settings import SearchSettings
from meme_nas.strategies.base import Strategy
from search_spaces.space import build_space

LAST, FEWEST = 0.1, 10
NOISE = 0.02


def base(experts: int, levels: int) -> Config:
    """Return digits-meme with ``experts`` experts and ``levels`` levels. Images are 2^(levels + 1) pixels a side."""
    config = preset("digits-meme")
    multipliers, strides = (1, 2, 2, 2)[:levels], (2, 1, 1, 1)[:levels]
    network = config.network.model_copy(update={"multipliers": multipliers, "pool_strides": strides})
    probabilities = tuple(round(0.9 - 0.8 * number / experts, 1) for number in range(experts))  # the grid of p
    return config.with_(
        image={"size": 2 ** (levels + 1)},
        network=network.model_dump(),
        experts=[expert.model_dump() for expert in experts_of(network, probabilities, config.diffusion.timesteps)],
    )


def outcome(task: Task) -> Outcome:
    """Return an artificial outcome in place of training and scoring."""
    widths, experts = task.config.network.widths, task.config.experts
    parts = []
    for place, expert in enumerate(experts):
        wanted = (place + 1) / len(experts)
        share = sum(expert.low_channels) / sum(widths) if expert.low_channels else 0.5
        luck = random.Random(f"{place} {expert.low_channels} {expert.p}").gauss(0, NOISE)
        parts.append((share - wanted) ** 2 + 0.3 * (expert.p - wanted) ** 2 + luck)
    cost = 1e6 + sum(sum(expert.low_channels) for expert in experts)
    if task.expert:
        return Outcome(task.number, task.expert, loss=1 + parts[task.expert - 1], loss_error=0.01, macs=cost, params=7)
    return Outcome(task.number, fid=2 + sum(parts), macs=cost, params=7, latency_ms=0.1, features="none")


def spent(search: Strategy) -> float:
    """Return the number of finished trials, as the budget counts them."""
    done, every = search.spent
    return done * search.settings.budget / every


def times(search: Strategy) -> list[tuple[float, float]]:
    """Return (trials done, CPU seconds of the search itself) after every task."""
    found, taken = [], 0.0
    while not search.done:
        begun = time.process_time()
        task = search.next_task()
        taken += time.process_time() - begun
        result = outcome(task)
        begun = time.process_time()
        search.record(result)
        taken += time.process_time() - begun
        found.append((spent(search), taken))
    return found


def at(found: list[tuple[float, float]], trials: float) -> float:
    """Return the CPU seconds at the end of the last task of the first ``trials`` trials."""
    return max(seconds for done, seconds in found if done <= trials)


def grown(options: argparse.Namespace, experts: int, levels: int, folder: Path) -> list[dict]:
    settings = SearchSettings(budget=max(options.budgets), strategy=options.strategy, study=folder)
    config = base(experts, levels)
    space = build_space(settings.as_proxy(config), settings.searched)
    yardsticks = [("hand-made", settings.as_proxy(config))]
    found = times(
        STRATEGIES[options.strategy](settings, Study.in_memory(settings.objectives), space=space, yardsticks=yardsticks)
    )
    rows = []
    for budget in sorted(options.budgets):
        last = max(FEWEST, round(LAST * budget))
        marginal = (at(found, budget) - at(found, budget - last)) / last
        rows.append(
            {
                "experts": experts,
                "levels": levels,
                "budget": budget,
                "ms_per_trial": round(1000 * at(found, budget) / budget, 1),
                "ms_last": round(1000 * marginal, 1),
                "share": round(marginal / (options.train_seconds * experts / 4), 4),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=int, nargs="+", default=[50, 200, 1000])
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--levels", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--strategy", default="factorised", choices=("factorised", "joint"))
    parser.add_argument("--train-seconds", type=float, default=13.0)
    options = parser.parse_args()
    table = []
    for experts in options.experts:
        for levels in options.levels:
            with tempfile.TemporaryDirectory() as scratch:
                rows = grown(options, experts, levels, Path(scratch))
            table += rows
            for row in rows:
                print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    print(json.dumps({"largest_share": max(row["share"] for row in table), "strategy": options.strategy, "rows": table}))


if __name__ == "__main__":
    main()
