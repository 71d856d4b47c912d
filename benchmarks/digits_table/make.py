"""Table of all trained candidates of a small space on digits, on which searches are compared.

    python benchmarks/digits_table/make.py train  [--bank FOLDER] [--workers 2]
    python benchmarks/digits_table/make.py score  [--bank FOLDER] [--workers 2]

Every expert of digits-meme has 27 candidates: 3 splits at each of two levels and 3 expertization probabilities. ``train`` trains
all of them with 3 seeds to 125 and on to 250 steps, and with the first seed to 62. ``score`` scores 324 cascades at 125 steps
with every training seed, the same at 62 steps with the first, and 36 of them at 125 and 250 steps with 3 sampling seeds. Noise is
common to all cascades. Results are written to ``experts.csv`` and ``cascades.csv`` beside this file. An interrupted command
resumes when it is run again.
"""

import argparse
import csv
import itertools
import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from meme.config.presets import preset
from meme.config.schema import Config, ExpertConfig
from meme.data.images import open_images
from meme.support.files import write_text
from meme.training.interval_loss import hold_out
from meme_nas.record.tasks import Task
from meme_nas.worker.bank import Banked, ExpertBank
from meme_nas.worker.objective import Objective

FOLDER = Path(__file__).parent
LEVEL_1, LEVEL_2, PROBABILITIES = (0, 8, 16), (0, 16, 32), (0.2, 0.6, 1.0)
SEEDS, STEPS, SAMPLING_SEEDS = (0, 1, 2), (125, 250), (0, 1, 2)
HALF = 62  # steps, half of the first length; trained with the first seed only
TRAININGS = ((HALF, SEEDS[0]), *itertools.product(STEPS, SEEDS))
PAIRS, CROSSED = 54, 36  # pairs of candidates of experts 4 and 3; cascades scored with all combinations of seeds
CANDIDATES = tuple(itertools.product(LEVEL_1, LEVEL_2, PROBABILITIES))
"""Candidates as (C_l at level 1, C_l at level 2, p). A candidate's number is its index."""


def config_of(cascade: tuple[int, ...], seed: int, steps: int) -> Config:
    """Return the config of the cascade with candidate ``cascade[n - 1]`` as expert n."""
    base = preset("digits-meme")
    experts = [
        ExpertConfig(interval=expert.interval, low_channels=CANDIDATES[place][:2], p=CANDIDATES[place][2])
        for expert, place in zip(base.experts, cascade, strict=True)
    ]
    return base.with_(experts=experts, training={"seed": seed, "steps": steps})


def open_bank(folder: Path) -> ExpertBank:
    images = open_images("digits", size=8, channels=1)
    return ExpertBank(folder, *hold_out(images))


def trained(folder: Path, number: int, place: int, seed: int, steps: int) -> tuple[int, int, int, int, Banked]:
    """Train one expert, or find it in the bank. It runs in a worker."""
    torch.set_num_threads(1)
    banked = open_bank(folder).obtain(config_of((place,) * 4, seed, steps), number)
    return number, place, seed, steps, banked


def train_all(folder: Path, workers: int) -> None:
    wanted = [
        (folder, number, place, seed, steps)
        for steps, seed in TRAININGS
        for place in range(len(CANDIDATES))
        for number in range(1, 5)
    ]
    rows = []
    with ProcessPoolExecutor(workers) as pool:
        for count, found in enumerate(pool.map(trained, *zip(*wanted, strict=True)), start=1):
            number, place, seed, steps, banked = found
            rows.append((number, *CANDIDATES[place], seed, steps, f"{banked.loss:.6g}", f"{banked.loss_error:.3g}", banked.macs))
            if count % 27 == 0:
                print(f"{count}/{len(wanted)} experts", flush=True)
    header = ("expert", "level1_low", "level2_low", "p", "training_seed", "steps", "loss", "loss_error", "macs")
    write_csv(FOLDER / "experts.csv", header, rows)


def design() -> list[tuple[int, ...]]:
    """Return cascades in which every candidate occurs equally often, and many of which share their experts for noisy steps."""
    source = random.Random(0)

    def deck(length: int) -> list[int]:
        decks = [source.sample(range(len(CANDIDATES)), len(CANDIDATES)) for _ in range(-(-length // len(CANDIDATES)))]
        return [place for each in decks for place in each][:length]

    fourth, third, second, first = (deck(length) for length in (PAIRS, PAIRS, 3 * PAIRS, 6 * PAIRS))
    return [(first[i], second[i // 2], third[i // 6], fourth[i // 6]) for i in range(6 * PAIRS)]


def scored(folder: Path, cascade: tuple[int, ...], seed: int, steps: int, sampling_seed: int) -> tuple:
    """Score one cascade as a trial of a search does. It runs in a worker."""
    torch.set_num_threads(1)
    config = config_of(cascade, seed, steps).with_(evaluation={"seed": sampling_seed})
    task = Task(0, config, "candidate", seeds=(seed,))
    objective = Objective(folder.parent, folder, "cpu")
    basis, bank = objective._open(config)
    found = [bank.obtain(config, number) for number in range(1, 5)]
    return *cascade, seed, steps, sampling_seed, f"{objective._score(task, seed, found, basis, bank).fid:.6g}"


def score_all(folder: Path, workers: int) -> None:
    cascades = design()
    wanted = [(cascade, seed, steps, 0) for steps, seed in TRAININGS if steps <= STEPS[0] for cascade in cascades]
    wanted += [
        (cascade, seed, steps, sampling_seed)
        for steps in STEPS
        for seed in SEEDS
        for sampling_seed in SAMPLING_SEEDS
        for cascade in cascades[:CROSSED]
        if (steps, sampling_seed) != (STEPS[0], 0)
    ]
    rows = list(read_csv(FOLDER / "cascades.csv"))
    done = {tuple(map(int, row[:7])) for row in rows}
    missing = [(folder, *each) for each in wanted if (*each[0], *each[1:]) not in done]
    print(f"{len(wanted)} scores, {len(missing)} missing", flush=True)
    header = (*(f"expert{number}" for number in range(1, 5)), "training_seed", "steps", "sampling_seed", "fid")
    with ProcessPoolExecutor(workers) as pool:
        for count, row in enumerate(pool.map(scored, *zip(*missing, strict=True), chunksize=6) if missing else (), start=1):
            rows.append(row)
            if count % 50 == 0 or count == len(missing):
                write_csv(FOLDER / "cascades.csv", header, rows)
                print(f"{count}/{len(missing)} cascades", flush=True)


def read_csv(path: Path) -> list[tuple]:
    """Return the rows without the header; empty if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [tuple(row) for row in list(csv.reader(file))[1:]]


def write_csv(path: Path, header: tuple[str, ...], rows: list[tuple]) -> None:
    class Lines(list):
        write = list.append

    lines = Lines()
    csv.writer(lines, lineterminator="\n").writerows([header, *rows])
    write_text(path, "".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("train", "score"))
    parser.add_argument("--bank", type=Path, default=Path("results/digits-table/bank"))
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    {"train": train_all, "score": score_all}[options.step](options.bank.absolute(), options.workers)


if __name__ == "__main__":
    main()
