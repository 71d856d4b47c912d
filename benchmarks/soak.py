"""Growth of the driver's memory and of its CPU time per trial in a long search of a small space.

    python benchmarks/soak.py [--trials 500] [--engine local] [--strategy joint] [--study FOLDER]

Runs a real search of the expertization probabilities on digits, with trainings of 1 step and scores of 2 samples. Points are
proposed at random, so that no sampler's cost is in the figures. The driver is measured from outside, without its workers. For
each quarter of the trials, without the yardsticks, ``rss_mib`` is its mean resident memory, and ``driver_ms`` its CPU time per
trial, as the median over windows of 10 trials. ``memory_growth`` and ``cost_growth`` are the ratios of the last quarter to the
second. The last line is one JSON object. The status is 1 if memory grew by more than a tenth or trials are missing.
"""

import argparse
import bisect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from meme_nas.record.study import read_trials

ROOT = Path(__file__).parent.parent
MOST_GROWTH = 1.1  # largest ratio of memory, last quarter to second
WINDOW = 10  # trials; the time of a single one is below the clock's resolution
EVERY_SECONDS = 0.25


@dataclass(frozen=True)
class Moment:
    """Memory and CPU time of the driver at one moment."""

    at: float
    """Unix time."""
    cpu_seconds: float
    rss_mib: float


def watched(command: list[str]) -> list[Moment]:
    """Run ``command`` to its end and return regular measurements of its driver."""
    running, moments = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"MEME_INCEPTION": "off"}), []
    driver = psutil.Process(running.pid)
    while running.poll() is None:
        times = driver.cpu_times()
        moments.append(Moment(time.time(), times.user + times.system, driver.memory_info().rss / 2**20))
        time.sleep(EVERY_SECONDS)
    if running.returncode:
        sys.exit(running.returncode)
    return moments


def quarters(moments: list[Moment], ends: list[float]) -> dict[str, list[float]]:
    """Return the figures of each quarter of the trials. ``ends`` are the Unix times at which trials were recorded."""
    when = [moment.at for moment in moments]
    at = [moments[min(bisect.bisect(when, end), len(moments) - 1)] for end in ends]
    spans = [(first.cpu_seconds, later.cpu_seconds) for first, later in zip(at, at[WINDOW:], strict=False)]
    costs = [1000 * (later - first) / WINDOW for first, later in spans]
    return {
        "rss_mib": [round(statistics.fmean(moment.rss_mib for moment in part), 1) for part in _in_four(at)],
        "driver_ms": [round(statistics.median(part), 1) for part in _in_four(costs)],
    }


def _in_four(values: list) -> list[list]:
    size = len(values) // 4
    return [values[quarter * size : (quarter + 1) * size] for quarter in range(4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--engine", default="local", choices=("ray", "local"))
    parser.add_argument("--strategy", default="joint", choices=("joint", "factorised"))
    parser.add_argument("--study", type=Path, help="folder for the study (default: a temporary one)")
    arguments = parser.parse_args()
    options = {"--budget": arguments.trials, "--engine": arguments.engine, "--strategy": arguments.strategy, "--workers": 2}
    options |= {"--dimensions": "p", "--sampler": "random", "--proxy-steps": 1, "--samples": 2, "--audit-factor": 0}
    options |= {"--trunk-share": 0, "--p-share": 0, "--confirm-share": 0}
    with tempfile.TemporaryDirectory() as scratch:
        study, begun = arguments.study or Path(scratch) / "study", time.monotonic()
        words = [str(word) for option in options.items() for word in option]
        moments = watched([sys.executable, "run_search.py", *words, "--study", str(study.absolute())])
        trials = read_trials(study)
        ends = sorted(trial.ended_at for trial in trials if trial.kind == "candidate" and trial.ended_at)
    found = quarters(moments, ends)
    growth = {
        "memory_growth": found["rss_mib"][3] / found["rss_mib"][1],
        "cost_growth": found["driver_ms"][3] / found["driver_ms"][1],
    }
    figures = {"trials": len(trials), "complete": sum(trial.state == "complete" for trial in trials), **found}
    figures |= {name: round(value, 3) for name, value in growth.items()} | {"minutes": round((time.monotonic() - begun) / 60, 1)}
    print(json.dumps(figures))
    sys.exit(growth["memory_growth"] > MOST_GROWTH or figures["complete"] < arguments.trials)


if __name__ == "__main__":
    main()
