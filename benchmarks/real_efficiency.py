"""Training effort of joint and factorised search until both have an equally good cascade, in real searches.

    python benchmarks/real_efficiency.py [--seeds 3] [--budget 50] [--share 0.4] [--at-once 2] [--out FOLDER]
        [--quick] [-- OPTION ...]

For every search seed, ``run_search.py`` runs twice with an empty study, one trial at a time and without its audit: TPE on whole
configurations with the budget, and the default factorised search with a share of it. Options after ``--`` go to both, such as
``--data PATH --proxy-steps 40``. ``--at-once`` is the number of searches that run at the same time. Trials count in the order in
which they ended. Scores are those of the search, with the same sampling noise for both searches of a seed. Yardsticks other than
the hand-made pattern are outside the space and do not count as candidates.

Each ratio is the median over seeds of the effort of joint search, over the effort of factorised search until its best score is as
good as joint search's last. If it never is, its effort counts as twice that of joint search. Effort is counted in three ways, by
``meme_nas.record.effort``. ``steps_ratio`` counts trainings of one expert that are charged, which plain Optuna without a bank
would make. ``made_ratio`` counts trainings that were made, as both strategies reuse experts of the bank. ``passes_ratio`` counts
passes of an image through an expert in training and in scoring, as reported by workers. An existing study is resumed.
``--quick``: one seed and a budget of 8, with trainings of 2 steps.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd

from meme_nas.record.effort import effort_of
from meme_nas.record.folder import APART
from meme_nas.record.study import read_everything

ROOT = Path(__file__).parent.parent
COUNTS = {"steps_ratio": "charged", "made_ratio": "made", "passes_ratio": "passes"}
QUICK = ["--proxy-steps", "2", "--samples", "32", "--trunk-share", "0.001"]


def searched(folder: Path, strategy: str, budget: int, seed: int, options: list[str]) -> pd.DataFrame:
    """Run or resume a search, and return effort and best score so far, one row per scored ensemble of the space."""
    words = {"--study": folder, "--strategy": strategy, "--budget": budget, "--seed": seed, "--audit-factor": 0}
    words |= {"--p-share": 0, "--confirm-share": 0}
    words |= {"--engine": "local", "--workers": 1}
    command = [sys.executable, str(ROOT / "run_search.py"), *(str(word) for pair in words.items() for word in pair), *options]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    rows, best = [], float("inf")
    ended = sorted((trial for trial in read_everything(folder) if trial.ended_at), key=lambda trial: trial.ended_at)
    for place, trial in enumerate(ended, start=1):
        if trial.state == "complete" and trial.in_space and not trial.expert and trial.kind not in APART:
            best = min(best, trial.outcome.values(("fid",))[0])
            effort = effort_of(ended[:place])
            rows.append({count: getattr(effort, count) for count in COUNTS.values()} | {"best": best})
    return pd.DataFrame(rows)


def ratio(joint: pd.DataFrame, factorised: pd.DataFrame, count: str) -> float:
    """Return joint search's total effort, the column ``count``, over that of factorised search until its ``best`` is as good."""
    spent, as_good = joint[count].iloc[-1], factorised[factorised["best"] <= joint["best"].iloc[-1]]
    return float(spent / (as_good[count].iloc[0] if len(as_good) else 2 * spent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", type=int, default=50, help="budget of the joint search, in whole ensembles")
    parser.add_argument("--share", type=float, default=0.4, help="share of that budget for the factorised search")
    parser.add_argument("--at-once", type=int, default=1, help="searches that run at the same time")
    parser.add_argument("--out", type=Path, default=Path("results/real-efficiency"), help="folder for the studies and curves.csv")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("options", nargs="*", help="options of run_search.py for both searches, after --")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.budget, arguments.options = 1, 8, [*arguments.options, *QUICK]
        arguments.out = Path(tempfile.mkdtemp())
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
    ratios: dict[str, list[float]] = {name: [] for name in COUNTS}
    for seed in range(arguments.seeds):
        for name, count in COUNTS.items():
            ratios[name].append(ratio(found["joint", seed], found["factorised", seed], count))
        spent = {strategy: found[strategy, seed].iloc[-1].round(3).to_dict() for strategy in budgets}
        print(f"seed {seed}: {spent}, ratios {[round(each[-1], 2) for each in ratios.values()]}", flush=True)
    curves = [curve.assign(strategy=strategy, seed=seed) for (strategy, seed), curve in found.items()]
    pd.concat(curves).to_csv(arguments.out / "curves.csv", index=False)
    medians = {name: round(statistics.median(each), 2) for name, each in ratios.items()}
    print(json.dumps(medians | {"of_seeds": {name: [round(one, 2) for one in each] for name, each in ratios.items()}}))


if __name__ == "__main__":
    main()
