"""Joint against factorised search for real: how much training each spends until it has a cascade as good.

    python benchmarks/real_efficiency.py [--seeds 3] [--budget 50] [--share 0.4] [--at-once 2] [--out FOLDER] [-- OPTION ...]

For every search seed ``run_search.py`` runs twice from nothing, one trial at a time and without its audit: TPE on whole
configurations with the budget, and the default factorised search with a share of it. What follows ``--`` goes to both, such as
``--data PATH --proxy-steps 40``; ``--at-once`` says how many of these searches run at the same time. Effort is counted in
trainings of one expert at proxy length, as the record of trials has them, in the order in which they ended; yardsticks count for
both. Scores are those of the search: the same sampling noise for both of a seed. Yardsticks other than the hand-made pattern are
outside the space, and no candidate of it.

``steps_ratio`` is the median over seeds of: what joint search spends in all, over what factorised search spends until its best
score is as good as joint search's last. Where it never is, the budget counts as spent twice. A study that is there goes on.
"""

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd

from meme_nas.record.study import read_everything
from meme_nas.record.tasks import FINALIST
from meme_nas.record.trial_log import TrialRecord

ROOT = Path(__file__).parent.parent
OUTSIDE = ("multi-expert", "single-model", FINALIST)


def searched(folder: Path, strategy: str, budget: int, seed: int, options: list[str]) -> pd.DataFrame:
    """Trainings spent and best score so far, a row for every scored ensemble of the space."""
    words = {"--study": folder, "--strategy": strategy, "--budget": budget, "--seed": seed, "--audit-factor": 0}
    words |= {"--p-share": 0, "--confirm-share": 0}
    words |= {"--engine": "local", "--workers": 1}
    command = [sys.executable, str(ROOT / "run_search.py"), *(str(word) for pair in words.items() for word in pair), *options]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    rows, spent, best = [], 0.0, float("inf")
    for trial in sorted(read_everything(folder), key=lambda trial: trial.ended_at or float("inf")):
        if trial.state != "complete" or trial.kind in OUTSIDE:
            continue
        spent += trainings(trial, strategy)
        if not trial.expert:
            best = min(best, trial.outcome.values(("fid",))[0])
            rows.append({"trainings": spent, "best": best})
    return pd.DataFrame(rows)


def trainings(trial: TrialRecord, strategy: str) -> int:
    """Of one expert each, that ``trial`` is charged with."""
    if trial.expert:
        return 1
    return len(trial.config.experts) if trial.is_yardstick or strategy == "joint" else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", type=int, default=50, help="of the joint search, in whole ensembles")
    parser.add_argument("--share", type=float, default=0.4, help="of that budget for the factorised search")
    parser.add_argument("--at-once", type=int, default=1, help="searches that run at the same time")
    parser.add_argument("--out", type=Path, default=Path("results/real-efficiency"), help="for the studies and curves.csv")
    parser.add_argument("options", nargs="*", help="of run_search.py, for both, after --")
    arguments = parser.parse_args()
    budgets = {"joint": arguments.budget, "factorised": round(arguments.budget * arguments.share)}
    with ThreadPoolExecutor(arguments.at_once) as pool:
        running = {
            (strategy, seed): pool.submit(
                searched, (arguments.out / f"{strategy}-{seed}").absolute(), strategy, budget, seed, arguments.options
            )
            for seed in range(arguments.seeds)
            for strategy, budget in budgets.items()
        }
        found = {key: run.result() for key, run in running.items()}
    ratios = []
    for seed in range(arguments.seeds):
        joint, factorised = found["joint", seed], found["factorised", seed]
        spent, target = joint.trainings.iloc[-1], joint.best.iloc[-1]
        as_good = factorised[factorised.best <= target]
        ratios.append(spent / (as_good.trainings.iloc[0] if len(as_good) else 2 * spent))
        last = {strategy: round(float(found[strategy, seed].best.iloc[-1]), 3) for strategy in budgets}
        print(f"seed {seed}: joint spends {spent:.0f}, ratio {ratios[-1]:.2f}, last scores {last}", flush=True)
    curves = [curve.assign(strategy=strategy, seed=seed) for (strategy, seed), curve in found.items()]
    pd.concat(curves).to_csv(arguments.out / "curves.csv", index=False)
    print(json.dumps({"steps_ratio": round(statistics.median(ratios), 2), "ratios": [round(ratio, 2) for ratio in ratios]}))


if __name__ == "__main__":
    main()
