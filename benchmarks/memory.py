"""Peak memory of sampling with all experts resident, and with one at a time, against a single expert's run.

    python benchmarks/memory.py [--preset ffhq-meme] [--experts 2 4 6]

Every run is a fresh process that loads an ensemble of the preset's network from disk and draws the same images. Its peak is that
of the resident set of the whole process (on a GPU also the allocator's). The last line is JSON. ``swap_vs_single`` is the largest
ratio of a one-at-a-time run to the run of a single expert.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from meme.config.presets import experts_of, preset
from meme.data.images import open_images
from meme.network.unet import build_expert
from meme.pipeline import draw, load_ensemble, pick_device
from meme.training.trainer import expert_file, save_expert


def main() -> None:
    arguments = parsed()
    if arguments.worker:
        print(json.dumps(measure(arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(compare(arguments, Path(folder))))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="ffhq-meme", help="preset of the experts' network (without its first stage)")
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 4, 6])
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10, help="sampler steps; must divide the timesteps")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--one-at-a-time", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(arguments: argparse.Namespace, folder: Path) -> dict:
    """Measure a single expert, then each number of experts, resident and one at a time, and print a line after each run."""
    single = run(arguments, written(folder, arguments, 1), one_at_a_time=False)
    report("one expert alone", single, single)
    ratios, resident = {}, {}
    for count in arguments.experts:
        ensemble = written(folder, arguments, count)
        kept, swapped = (run(arguments, ensemble, one_at_a_time=each) for each in (False, True))
        report(f"{count} experts resident", kept, single)
        report(f"{count} experts, one at a time", swapped, single)
        if kept["images"] != swapped["images"]:
            raise SystemExit(f"the images of {count} experts differ between the two modes")
        resident[count] = kept["peak_mib"] / single["peak_mib"]
        ratios[count] = swapped["peak_mib"] / single["peak_mib"]
    return {
        "swap_vs_single": round(max(ratios.values()), 3),
        "by_experts": {count: round(ratio, 3) for count, ratio in ratios.items()},
        "resident_vs_single": {count: round(ratio, 3) for count, ratio in resident.items()},
        "single_mib": round(single["peak_mib"]),
        "preset": arguments.preset,
        "device": str(pick_device(arguments.device)),
    }


def written(folder: Path, arguments: argparse.Namespace, count: int) -> Path:
    """Write an ensemble of ``count`` experts with initial weights, which need the memory of trained ones; return its folder."""
    base, path = preset(arguments.preset), folder / f"{count}-experts"
    experts = experts_of(base.network, (1.0,) * count, base.diffusion.timesteps)
    config = base.with_(
        first_stage=None,
        experts=[expert.model_dump() for expert in experts],
        sampling={"steps": arguments.steps, "batch_size": arguments.batch_size},
    )
    config.save(path / "config.yaml")
    digits = open_images("digits", size=8, channels=1)  # only its name goes into the files
    for number in range(1, count + 1):
        expert = build_expert(config, number)
        with torch.no_grad():  # without this, the output would be 0 for every expert
            expert.conv_out.weight.normal_(std=1e-3, generator=torch.Generator().manual_seed(number))
        save_expert(expert, config, number, digits, expert_file(path, number))
    return path


def run(arguments: argparse.Namespace, ensemble: Path, one_at_a_time: bool) -> dict:
    command = [sys.executable, __file__, "--worker", str(ensemble), "--images", str(arguments.images)]
    command += ["--device", arguments.device] + (["--one-at-a-time"] if one_at_a_time else [])
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def measure(arguments: argparse.Namespace) -> dict:
    """Load, draw and return the peak memory. It runs in a process of its own."""
    device = pick_device(arguments.device)
    ensemble = load_ensemble(arguments.worker, device, one_at_a_time=arguments.one_at_a_time)
    images = torch.cat([batch.cpu() for batch in draw(ensemble, arguments.images, 0, device)])
    peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else resident_mib()
    return {"peak_mib": peak, "images": images.long().sum(dim=(1, 2, 3)).tolist()}


def resident_mib() -> float:
    """Return the peak resident set of this process, including file-backed pages.

    ``getrusage`` is no substitute: on Linux, a process inherits the peak of the one that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def report(name: str, measured: dict, single: dict) -> None:
    print(f"{name:<30} {measured['peak_mib']:8.0f} MiB  {measured['peak_mib'] / single['peak_mib']:.3f} x", flush=True)


if __name__ == "__main__":
    main()
