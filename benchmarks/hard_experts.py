"""Effect of expertization probabilities near 1 on FID, by length of training, with and without a trunk.

    python benchmarks/hard_experts.py --data PATH [--preset tiny-meme] [--lengths 182 364 750 1500 4000] [--trunks 0 4000] ...
    python benchmarks/hard_experts.py --report [--records FILE] [--figure FILE]

The hand-made pattern is trained with the paper's p (soft) and with p = 1 (hard), from scratch and from trunks of ``--trunks``
steps, to each of ``--lengths``. Cascades replace soft experts by hard ones: none, each alone, all. Each cascade is scored with
sampling seeds common to all, with 20 and with ``--sampling-steps`` steps of DDIM.

A row of the CSV has FID (the mean over the sampling seeds), each expert's held-out loss in its own interval, and for every
hand-over the standard deviation of the sampler's states over that of the forward process, less 1. Existing rows are kept.
``--quick`` is a run of minutes on digits. The last line is one JSON object. It has, for each trunk and length, the change of log
FID when an expert is made hard.
"""

import argparse
import csv
import itertools
import json
import math
import statistics
from pathlib import Path

import torch

from meme.config.presets import preset
from meme.config.schema import Config
from meme.diffusion.ensemble import Ensemble
from meme.diffusion.process import forward_process
from meme.diffusion.sampler import pass_through, sampling_timesteps, starting_noise
from meme.pipeline import evaluate
from meme_nas.worker.bank import Banked, ExpertBank
from meme_nas.worker.objective import Basis, open_basis

ROOT = Path(__file__).parent.parent
SAMPLING_SEEDS = (6_001, 6_002)
COLUMNS = ("preset", "training_seed", "trunk_steps", "steps", "hard", "sampling_steps", "fid", "losses", "hand_overs")
Row = dict[str, str]


def patterns(experts: int) -> list[tuple[int, ...]]:
    """Return for each cascade a tuple with 1 for hard and 0 for soft experts: none hard, each alone, all."""
    alone = [tuple(int(place == number) for place in range(experts)) for number in range(experts)]
    return [(0,) * experts, *alone, (1,) * experts]


def hand_over_ratios(ensemble: Ensemble, basis: Basis, seed: int) -> list[float]:
    """Return, for every hand-over, the deviation of the sampler's states over the forward process's, less 1."""
    config = ensemble.config
    runs = ensemble.hand_overs(sampling_timesteps(config.diffusion, config.sampling))
    process, indices = forward_process(config.diffusion), range(config.evaluation.samples)
    x_0 = basis.data.tensor(range(min(len(basis.data), len(indices))))
    x, ratios = starting_noise(config.image, seed, 0, len(indices)), []
    for run, following in itertools.pairwise(runs):
        x = pass_through(ensemble.denoise, x, indices, run, config, seed)
        t = torch.full((len(x_0),), following[0])
        noised = process.add_noise(x_0, torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed)), t)
        ratios.append(float(x.std() / noised.std()) - 1)
    return ratios


def scored(
    config: Config, found: list[Banked], bank: ExpertBank, configs: list[Config], basis: Basis
) -> tuple[float, list[float]]:
    """Return the FID of a cascade and its hand-over ratios. ``configs`` are the training configs of its experts."""
    experts = [bank.load(own, number, each) for number, (own, each) in enumerate(zip(configs, found, strict=True), start=1)]
    ensemble = Ensemble(config, experts)
    fids = [evaluate(ensemble, basis.images, basis.space, seed=seed).fid for seed in SAMPLING_SEEDS]
    return statistics.fmean(fids), hand_over_ratios(ensemble, basis, SAMPLING_SEEDS[0])


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, row: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def measure(base: Config, arguments: argparse.Namespace, records: Path, bank_folder: Path) -> None:
    """Train and score all rows that the records lack."""
    basis = open_basis(base, "cpu", None)
    bank = ExpertBank(bank_folder, basis.data, basis.held_out)
    known = {tuple(row[name] for name in COLUMNS[:6]) for row in read(records)}
    hard = base.with_(experts=[expert.model_dump() | {"p": 1.0} for expert in base.experts])
    for trunk, steps in ((trunk, steps) for trunk in arguments.trunks for steps in arguments.lengths):
        training = {"trunk_steps": trunk, "steps": steps, "seed": arguments.training_seed}
        both = [config.with_(training=training) for config in (base, hard)]
        for pattern in patterns(len(base.experts)):
            configs = [both[is_hard] for is_hard in pattern]
            for sampling_steps in arguments.sampling_steps:
                key = (base.name, arguments.training_seed, trunk, steps, "".join(map(str, pattern)), sampling_steps)
                if tuple(map(str, key)) in known:
                    continue
                found = [bank.obtain(config, number) for number, config in enumerate(configs, start=1)]
                config = both[0].with_(sampling={"steps": sampling_steps})
                fid, ratios = scored(config, found, bank, configs, basis)
                losses = " ".join(f"{each.loss:.5f}" for each in found)
                said = " ".join(f"{ratio:+.4f}" for ratio in ratios)
                row = dict(zip(COLUMNS, map(str, (*key, f"{fid:.5f}", losses, said)), strict=True))
                append(records, row)
                print(*row.values(), sep="  ", flush=True)


def report(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Return, for each trunk and length, log FID with an expert hard less that with all soft, at the paper's sampler steps."""
    fewest = min((int(row["sampling_steps"]) for row in rows), default=0)
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if int(row["sampling_steps"]) == fewest:
            fids = found.setdefault(f"{row['trunk_steps']}+{row['steps']}", {})
            fids[row["hard"]] = float(row["fid"])
    return {
        length: {pattern: round(math.log(fid / fids[soft]), 3) for pattern, fid in fids.items() if pattern != soft}
        for length, fids in found.items()
        if (soft := "0" * len(next(iter(fids)))) in fids
    }


def draw(result: dict[str, dict[str, float]], path: Path) -> None:
    """Plot the effect of one hard expert over the training length, one panel for each trunk."""
    import matplotlib.pyplot as plt

    trunks = sorted({int(length.split("+")[0]) for length in result})
    figure, panels = plt.subplots(
        1, len(trunks), figsize=(4 * len(trunks), 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, trunk in zip(panels[0], trunks, strict=True):
        lengths = sorted(int(length.split("+")[1]) for length in result if int(length.split("+")[0]) == trunk)
        names = [name for name in result[f"{trunk}+{lengths[0]}"] if name.count("1") == 1]
        for name in names:
            found = {steps: result[f"{trunk}+{steps}"].get(name) for steps in lengths}
            values = {steps: 100 * math.expm1(value) for steps, value in found.items() if value is not None}
            panel.plot(list(values), list(values.values()), marker="o", label=f"expert {name.index('1') + 1}")
        panel.axhline(0, color="grey", linewidth=0.8)
        panel.set(xscale="log", xlabel="steps an expert", title=f"from a trunk of {trunk:,} steps" if trunk else "from scratch")
        panel.set_xticks(lengths, [f"{steps:,}" for steps in lengths])
        panel.minorticks_off()
    panels[0][0].set_ylabel("change of FID with p = 1, %")
    panels[0][-1].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a folder or zip of images (default: the preset's)")
    parser.add_argument("--preset", default="tiny-meme")
    parser.add_argument("--lengths", type=int, nargs="+", default=[182, 364, 750, 1500, 4000])
    parser.add_argument("--trunks", type=int, nargs="+", default=[0])
    parser.add_argument("--training-seed", type=int, default=0)
    parser.add_argument("--sampling-steps", type=int, nargs="+", default=[20])
    parser.add_argument("--bank", type=Path, default=ROOT / "results" / "hard-experts", help="folder of the trained experts")
    parser.add_argument("--records", type=Path, default=ROOT / "results" / "hard-experts.csv")
    parser.add_argument("--figure", type=Path, help="file for a plot of the effects")
    parser.add_argument("--report", action="store_true", help="print the records and train nothing")
    parser.add_argument("--quick", action="store_true", help="digits, two short lengths, records in the bank's folder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    name, records = arguments.preset, arguments.records
    if arguments.quick:
        name, records = "digits-meme", arguments.bank / "quick.csv"
        arguments.lengths, arguments.trunks, arguments.bank = [10, 20], [0, 20], arguments.bank / "quick"
    base = preset(name)
    if arguments.data:
        base = base.with_(data=str(Path(arguments.data).absolute()), evaluation={"features": "auto"})
    if arguments.quick:
        base = base.with_(evaluation={"samples": 64})
    if not arguments.report:
        measure(base, arguments, records, arguments.bank)
    seed = str(arguments.training_seed)
    result = report([row for row in read(records) if (row["preset"], row["training_seed"]) == (name, seed)])
    if arguments.figure:
        draw(result, arguments.figure)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
