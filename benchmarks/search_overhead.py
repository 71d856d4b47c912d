"""Overhead of a search: time, memory, and the share of the workers' time not spent in training, sampling or scoring.

    python benchmarks/search_overhead.py [--budget 50] [--engine local] [--study FOLDER] [-- OPTION ...]

Runs the default search on digits in a folder of its own. Options after ``--`` go to run_search.py. ``overhead`` is a share of the
wall time from the start of the first trial's work (Ray started, workers up, data open) to the record of the last trial. It
includes proposals, hand-over, records on disk, and waiting workers. ``minutes`` is the time of the whole command. ``peak_gib`` is
the largest memory of all its processes together (proportional set size, sampled every second). ``cascades_per_minute`` is the
rate of workers that only score. ``before_audit`` has minutes and overhead of the trials alone, and ``seconds_a_training`` is the
time of one expert. The last line is one JSON object.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from meme_nas.engines.placement import workers_for
from meme_nas.record.folder import APART
from meme_nas.record.study import read_everything
from meme_nas.record.trial_log import TrialRecord
from meme_nas.settings import SearchSettings

ROOT = Path(__file__).parent.parent


def overhead(trials: list[TrialRecord], workers: int) -> float:
    """Return 1 - work / (workers x wall time)."""
    ran = [trial for trial in trials if trial.outcome and trial.outcome.begun_at]
    wall = max(trial.ended_at for trial in ran) - min(trial.outcome.begun_at for trial in ran)
    return 1 - sum(trial.outcome.seconds for trial in ran) / (workers * wall)


def before_audit(trials: list[TrialRecord], workers: int) -> dict:
    """Return minutes and overhead of the search without its audit, and the time of a training of a single expert in it."""
    ran = [trial for trial in trials if trial.kind not in APART and trial.outcome and trial.outcome.begun_at]
    minutes = (max(trial.ended_at for trial in ran) - min(trial.outcome.begun_at for trial in ran)) / 60
    figures: dict = {"before_audit": {"minutes": round(minutes, 2), "overhead": round(overhead(ran, workers), 4)}}
    trainings = [trial.outcome.seconds for trial in ran if trial.expert]
    return figures | ({"seconds_a_training": round(sum(trainings) / len(trainings), 2)} if trainings else {})


def memory_gib(process: psutil.Process) -> float:
    """Return the memory of a process and its descendants in GiB. Shared pages count once."""
    total = 0
    for member in [process, *process.children(recursive=True)]:
        try:
            total += member.memory_full_info().pss
        except psutil.Error:  # it has just ended
            continue
    return total / 2**30


def watched(command: list[str]) -> float:
    """Run ``command`` and return its peak memory in GiB."""
    running, peak = subprocess.Popen(command, cwd=ROOT), 0.0
    while running.poll() is None:
        peak = max(peak, memory_gib(psutil.Process(running.pid)))
        time.sleep(1.0)
    if running.returncode:
        sys.exit(running.returncode)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=int, default=50)
    parser.add_argument("--engine", default="ray", choices=("ray", "local"))
    parser.add_argument("--study", type=Path, help="folder for the study (default: a temporary one)")
    parser.add_argument("options", nargs="*", help="options of run_search.py, after --")
    arguments = parser.parse_args()
    options = ["--budget", str(arguments.budget), "--engine", arguments.engine, *arguments.options]
    with tempfile.TemporaryDirectory() as scratch:
        study = arguments.study or Path(scratch)
        command = [sys.executable, "run_search.py", *options, "--study", str(study.absolute())]
        print(" ".join(command), flush=True)
        begun = time.monotonic()
        peak = watched(command)
        minutes = (time.monotonic() - begun) / 60
        trials, workers = read_everything(study), workers_for(SearchSettings(budget=arguments.budget))
    cascades = [trial.outcome.seconds for trial in trials if trial.kind == "candidate" and trial.outcome]
    counts = Counter(trial.kind for trial in trials)
    figures = {"cascades_per_minute": round(60 * workers * len(cascades) / sum(cascades)), **counts} if cascades else dict(counts)
    figures |= {"overhead": round(overhead(trials, workers), 4), "minutes": round(minutes, 2), "peak_gib": round(peak, 2)}
    figures |= before_audit(trials, workers)
    print(json.dumps(figures | {"workers": workers}))


if __name__ == "__main__":
    main()
