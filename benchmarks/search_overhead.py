"""What a search costs beside the work it is for: the share of the workers' time not spent in training, sampling or scoring.

    python benchmarks/search_overhead.py [--quick]

Runs the default search on digits in a folder of its own. Counted from the moment the first trial's work begins (Ray started,
workers up, data open) to the moment the last trial is recorded: proposals, hand-over, records on disk, and workers that wait.
The last line is one JSON object; ``overhead`` is a share of wall time.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from meme_nas.settings import SearchSettings
from meme_nas.run import workers_for
from meme_nas.study import TrialRecord, read_trials

ROOT = Path(__file__).parent.parent


def overhead(trials: list[TrialRecord], workers: int) -> float:
    """1 - work / (workers x wall time)."""
    ran = [trial for trial in trials if trial.outcome and trial.outcome.begun_at]
    wall = max(trial.ended_at for trial in ran) - min(trial.outcome.begun_at for trial in ran)
    return 1 - sum(trial.outcome.seconds for trial in ran) / (workers * wall)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10 trials of 40 steps instead of 50 at proxy length")
    parser.add_argument("--engine", default="ray", choices=("ray", "local"))
    arguments = parser.parse_args()
    options = ["--budget", "10", "--proxy-steps", "40"] if arguments.quick else ["--budget", "50"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "run_search.py", *options, "--engine", arguments.engine, "--study", folder]
        print(" ".join(command), flush=True)
        subprocess.run(command, cwd=ROOT, check=True)
        trials, workers = read_trials(Path(folder)), workers_for(SearchSettings(budget=int(options[1])))
    print(json.dumps({"overhead": round(overhead(trials, workers), 4), "trials": len(trials), "workers": workers}))


if __name__ == "__main__":
    main()
