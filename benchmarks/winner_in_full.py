"""FID of a search's winner after its full training, compared with the yardsticks.

    python benchmarks/winner_in_full.py --data PATH [--preset tiny-meme] [--search-seeds 3] [--training-seeds 3] [-- OPTION ...]
    python benchmarks/winner_in_full.py --report [--records FILE]

For every search seed the default search runs, with the options after ``--``. Then its recommended config, the best it found if
that is another one, ``--finalists`` others of its Pareto front, the hand-made pattern, the Multi-Expert and the single model are
trained in full. Training and sampling seeds are those that no search has used. A score is the mean FID over ``SAMPLING_SEEDS``.

Differences are of log FID, so negative is better. They are paired: both sides have the same training seed. ``_low`` and ``_high``
are the ends of the 95 % interval over search and training seeds (``meme.support.intervals.crossed``). The hand-made pattern is
trained with the preset's settings. In ``winner_vs_hand_made_alike`` it has the winner's trunk too.

Records are rows of a CSV, written one by one. A repeated command resumes from them and from the trained experts. ``--report``
only prints the records. ``--quick`` is a test run of minutes on digits. The last line is one JSON object.
"""

import argparse
import csv
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from meme.config.presets import preset, yardsticks
from meme.config.schema import Config
from meme.diffusion.ensemble import Ensemble, OneAtATime
from meme.pipeline import evaluate
from meme.support.intervals import Interval, crossed
from meme_nas.worker.bank import ExpertBank
from meme_nas.worker.objective import Basis, open_basis

ROOT = Path(__file__).parent.parent
FIRST_TRAINING_SEED = 101  # a seed that no search trains with
SAMPLING_SEEDS = (5_001, 5_002, 5_003)
QUICK = ["--budget", "4", "--proxy-steps", "10", "--samples", "64", "--trunk-share", "0.01"]
QUICK += ["--p-share", "0.02", "--confirm-share", "0.02"]
ALIKE = "hand-made-alike"
RIVALS = ("hand-made", "multi-expert", "single-model", ALIKE)


@dataclass(frozen=True)
class Record:
    """One config trained in full with one training seed."""

    preset: str
    row: str
    """``winner``, ``best-of-search``, ``finalist-K``, ``hand-made-alike``, or a kind of yardstick (``hand-made``, ...)."""
    search_seed: str
    """Seed of the search that found the config; empty for yardsticks."""
    training_seed: int
    architecture: str
    steps: int
    """Training steps of an expert."""
    trunk_steps: int
    macs: float
    """MACs for one image and step."""
    fid: float
    """Mean over the sampling seeds."""
    fids: str
    choices: str
    """C_l at every level and p of each expert."""
    search_minutes: str
    date: str


def read_records(path: Path) -> list[Record]:
    """Return the records, in order; empty if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [Record(**{name: _TYPES[name](value) for name, value in row.items()}) for row in csv.DictReader(file)]


_TYPES = {field.name: {"int": int, "float": float}.get(getattr(field.type, "__name__", ""), str) for field in fields(Record)}


def write_record(path: Path, record: Record) -> None:
    """Append one row, with the header before the first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Record)], lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(asdict(record))


@dataclass(frozen=True)
class Wanted:
    """Config to be trained in full, with the name of its row."""

    row: str
    search_seed: str
    config: Config
    search_minutes: str = ""


def search(seed: int, out: Path, preset_name: str, data: str | None, options: list[str]) -> tuple[Path, str]:
    """Run or resume one search, and return its folder and its minutes, which are recorded at its end."""
    study = out / f"search-{seed}"
    noted = study / "minutes.txt"
    if not noted.exists():
        words = [
            "--preset",
            preset_name,
            "--seed",
            str(seed),
            "--study",
            str(study),
            *(["--data", data] if data else []),
            *options,
        ]
        begun = time.monotonic()
        subprocess.run([sys.executable, str(ROOT / "run_search.py"), *words], cwd=ROOT, check=True, stdout=sys.stderr)
        noted.write_text(f"{(time.monotonic() - begun) / 60:.2f}")
    return study, noted.read_text()


def found_by(study: Path, seed: int, minutes: str, finalists: int) -> Iterator[Wanted]:
    """Yield the configs of a search: the recommended one, the best that it found, and others of its front."""
    winner = Config.load(study / "winner.yaml")
    yield Wanted("winner", str(seed), winner, minutes)
    seen = {winner.architecture_id}
    others = [study / "best-of-search.yaml", *sorted((study / "front").glob("*.yaml"))]
    for path in others:
        config = Config.load(path) if path.exists() else winner
        if config.architecture_id not in seen and len(seen) <= finalists:
            seen.add(config.architecture_id)
            yield Wanted(path.stem if path.stem == "best-of-search" else f"finalist-{len(seen) - 1}", str(seed), config, minutes)


def rivals(config: Config, winner: Config, kinds: Sequence[str]) -> Iterator[Wanted]:
    """Yield the configs that the winner is compared with, on the data and the image size of ``config``."""
    for kind, rival in yardsticks(config.name).items():
        if kind in kinds:
            yield Wanted(kind, "", rival.with_(data=config.data, image=config.image, evaluation=config.evaluation.model_dump()))
    trunk = {"steps": winner.training.steps, "trunk_steps": winner.training.trunk_steps}
    if trunk["trunk_steps"] and ALIKE in kinds:
        yield Wanted(ALIKE, "", config.with_(training=trunk))


@lru_cache(maxsize=1)
def opened(out: Path, config_json: str) -> tuple[Basis, ExpertBank]:
    """Return data, feature space and bank, opened once in each process."""
    torch.set_num_threads(1)
    basis = open_basis(Config.model_validate(json.loads(config_json)), "cpu", None)
    return basis, ExpertBank(out / "bank", basis.data, basis.held_out)


def train_one(out: Path, base: str, config: Config, number: int) -> None:
    """Train one expert in full, unless the bank has it. It runs in a worker."""
    _, bank = opened(out, base)
    bank.obtain(config, number)


def score(out: Path, base: str, config: Config) -> tuple[float, list[float]]:
    """Return MACs and the FID of each sampling seed of a trained config."""
    basis, bank = opened(out, base)
    found = [bank.obtain(config, number) for number in range(1, len(config.experts) + 1)]
    experts = OneAtATime(len(found), lambda number: bank.load(config, number, found[number - 1]))
    scores = [evaluate(Ensemble(config, experts), basis.images, basis.space, seed=seed) for seed in SAMPLING_SEEDS]
    return scores[0].macs, [each.fid for each in scores]


def choices_of(config: Config) -> str:
    """Return the choices as ``8/24@0.8 ...``, one group for each expert."""
    return " ".join(f"{'/'.join(map(str, expert.low_channels)) or '-'}@{expert.p:g}" for expert in config.experts)


def train_and_score(
    out: Path, records: Path, base: Config, wanted: list[Wanted], seeds: range, pool: ProcessPoolExecutor
) -> None:
    """Train the configs that are not recorded yet, one training seed after the other, and append their scores."""
    known = {(each.preset, each.row, each.search_seed, each.training_seed, each.architecture) for each in read_records(records)}
    missing = [
        (each, each.config.with_(training={"seed": seed}), seed)
        for seed in seeds
        for each in wanted
        if (base.name, each.row, each.search_seed, seed, each.config.architecture_id) not in known
    ]
    text = json.dumps(base.model_dump(mode="json"))
    jobs: list[tuple[Wanted, Config, int, list[Future]]] = []
    for count in range(len(missing) + 1):  # only the next config is trained while one is scored, so that rows are written early
        if count < len(missing):
            each, config, seed = missing[count]
            numbers = range(1, len(config.experts) + 1)
            jobs.append((each, config, seed, [pool.submit(train_one, out, text, config, number) for number in numbers]))
        if count == 0:
            continue
        each, config, seed, trained = jobs[count - 1]
        for job in trained:
            job.result()
        macs, fids = pool.submit(score, out, text, config).result()
        training = config.training
        record = Record(
            base.name,
            each.row,
            each.search_seed,
            seed,
            each.config.architecture_id,
            training.steps,
            training.trunk_steps,
            round(macs),
            round(statistics.fmean(fids), 5),
            " ".join(f"{fid:.5f}" for fid in fids),
            choices_of(config),
            each.search_minutes,
            time.strftime("%Y-%m-%d"),
        )
        write_record(records, record)
        print(f"{count}/{len(missing)} {each.row} {each.search_seed} seed {seed}: FID {record.fid:.4f}", flush=True)


def differences(records: list[Record], row: str, rival: str) -> np.ndarray:
    """Return log FID of ``row`` less that of ``rival`` (search seeds, training seeds), for the seeds that both have."""
    ours = {(each.search_seed, each.training_seed): math.log(each.fid) for each in records if each.row == row}
    theirs = {each.training_seed: math.log(each.fid) for each in records if each.row == rival}
    searches = sorted({search_seed for search_seed, _ in ours})
    seeds = [seed for seed in sorted(theirs) if all((search_seed, seed) in ours for search_seed in searches)]
    table = [[ours[search_seed, seed] - theirs[seed] for seed in seeds] for search_seed in searches]
    return np.array(table, dtype=float).reshape(len(searches), len(seeds))


def report(records: list[Record]) -> dict[str, object]:
    """Print the rows and return the comparisons."""
    rows = dict.fromkeys((each.row, each.search_seed, each.choices, each.trunk_steps) for each in records)
    for row, search_seed, choices, trunk in rows:
        fids = [each.fid for each in records if (each.row, each.search_seed) == (row, search_seed)]
        name = f"{row} {search_seed}".strip()
        print(
            f"{name:<18} FID {statistics.fmean(fids):.4f}  ({', '.join(f'{fid:.4f}' for fid in fids)})  trunk {trunk}  {choices}"
        )
    result: dict[str, object] = {}
    for name, row, rival in _COMPARISONS:
        table = differences(records, row, rival)
        if table.size:
            result |= _said(name, crossed(table)) | {f"{name}_searches": len(table)}
    minutes = {each.search_seed: float(each.search_minutes) for each in records if each.search_minutes}
    if minutes:
        result["search_minutes"] = round(statistics.median(minutes.values()), 1)
    return result


_COMPARISONS = (
    ("winner_vs_hand_made", "winner", "hand-made"),
    ("winner_vs_hand_made_alike", "winner", "hand-made-alike"),
    ("winner_vs_multi_expert", "winner", "multi-expert"),
    ("winner_vs_single", "winner", "single-model"),
    ("hand_made_vs_single", "hand-made", "single-model"),
)


def _said(name: str, found: Interval) -> dict[str, float | int | None]:
    low, high = (round(end, 4) if math.isfinite(end) else None for end in (found.low, found.high))
    return {name: round(found.mean, 4), f"{name}_low": low, f"{name}_high": high, f"{name}_seeds": found.count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a folder or zip of images (default: the preset's)")
    parser.add_argument("--preset", default="tiny-meme")
    parser.add_argument("--search-seeds", type=int, default=3)
    parser.add_argument("--training-seeds", type=int, default=3)
    parser.add_argument("--finalists", type=int, default=2, help="number of other configs of each front to train")
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=RIVALS, help="configs that winners are compared with")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder for studies and bank (default: results/winner-in-full/ and the preset)")
    parser.add_argument("--records", type=Path, help="the CSV (default: results/winner-in-full.csv)")
    parser.add_argument("--report", action="store_true", help="print the records and run nothing")
    parser.add_argument("--quick", action="store_true", help="digits, one search of minutes, trainings of 20 steps")
    parser.add_argument("options", nargs="*", help="options of run_search.py, after --")
    arguments = parser.parse_args()
    name = "digits-meme" if arguments.quick else arguments.preset
    out = (arguments.out or ROOT / "results" / "winner-in-full" / (f"{name}-quick" if arguments.quick else name)).absolute()
    records = arguments.records or (out / "records.csv" if arguments.quick else ROOT / "results" / "winner-in-full.csv")
    if not arguments.report:
        run(arguments, name, out, records)
    print(json.dumps(report([each for each in read_records(records) if each.preset == name])))


def run(arguments: argparse.Namespace, name: str, out: Path, records: Path) -> None:
    """Run all searches, full trainings and scores that are not recorded yet."""
    quick = arguments.quick
    searches, seeds = (1, 2) if quick else (arguments.search_seeds, arguments.training_seeds)
    options = [*(QUICK if quick else []), *arguments.options]
    base = preset(name)
    if arguments.data:
        base = base.with_(data=str(Path(arguments.data).absolute()), evaluation={"features": "auto"})
    wanted: list[Wanted] = []
    for seed in range(searches):
        study, minutes = search(seed, out, name, arguments.data, options)
        wanted += found_by(study, seed, minutes, 0 if quick else arguments.finalists)
    wanted = [*rivals(base, wanted[0].config, arguments.rivals), *wanted]
    if quick:
        short: dict[str, Any] = {"training": {"steps": 20}, "evaluation": {"samples": 64}}
        wanted = [replace(each, config=each.config.with_(**short)) for each in wanted]
    training_seeds = range(FIRST_TRAINING_SEED, FIRST_TRAINING_SEED + seeds)
    with ProcessPoolExecutor(arguments.workers) as pool:
        train_and_score(out, records, base, wanted, training_seeds, pool)


if __name__ == "__main__":
    main()
