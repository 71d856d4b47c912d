"""Images a second from samples to FID: ours, from tensors in memory, against clean-fid's pipeline over a folder of PNG files.

    python benchmarks/evaluation_speed.py [--data cifar10-train.zip] [--networks random classifier inception-cost] [--repeats 5]

Both pipelines run the same feature network on the same images with the same number of threads, in turn. Figures are medians over
the turns. The time includes the features of all samples and their mean and covariance. It excludes the distance to the reference,
which is the same function on both sides and independent of the number of images, and the reference, which either side needs only
once. clean-fid runs with the defaults of its ``compute_fid`` (12 workers, batches of 32).

``classifier`` and ``random`` take pixels without resizing, on both sides. ``inception-cost`` is Inception-v3 with random weights
in the interface of clean-fid's TorchScript file, each side with its own resizing to 299 pixels. It has Inception's time, not its
features. ``network_share`` is the network's share of a side's CPU time, which no pipeline can reduce.

The run fails if the two sides' FIDs differ by more than a thousandth. The last line is one JSON object. ``vs_cleanfid`` is our
images/s over clean-fid's for each network, without the time to write PNG files. ``vs_cleanfid_and_png`` includes it. On a shared
machine, the ratio of CPU seconds varies less.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from meme.data.images import Images, open_images
from meme.scoring.features import FeatureSpace, choose_features
from meme.scoring.features.resize import resized
from meme.scoring.features.space import file_sha256
from meme.scoring.metrics import Statistics, frechet_distance, statistics
from meme.support.torchvision_compat import make_torchvision_importable

make_torchvision_importable()
from cleanfid import fid as clean_fid  # noqa: E402
from cleanfid.features import InceptionV3W  # noqa: E402
from torchvision.models import inception_v3  # noqa: E402

BATCH = 256  # images in a batch of the sampler
CLEAN_FID_WORKERS, CLEAN_FID_BATCH = 12, 32
AGREEMENT = 1e-3
INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_LAYERS = {  # names in the file and in torchvision, in the order of the layers
    "conv": "Conv2d_1a_3x3",
    "conv_1": "Conv2d_2a_3x3",
    "conv_2": "Conv2d_2b_3x3",
    "pool0": "maxpool1",
    "conv_3": "Conv2d_3b_1x1",
    "conv_4": "Conv2d_4a_3x3",
    "pool1": "maxpool2",
    "mixed": "Mixed_5b",
    "mixed_1": "Mixed_5c",
    "mixed_2": "Mixed_5d",
    "mixed_3": "Mixed_6a",
    "mixed_4": "Mixed_6b",
    "mixed_5": "Mixed_6c",
    "mixed_6": "Mixed_6d",
    "mixed_7": "Mixed_6e",
    "mixed_8": "Mixed_7a",
    "mixed_9": "Mixed_7b",
    "mixed_10": "Mixed_7c",
    "pool2": "avgpool",
}


@dataclass
class Contest:
    """One feature network, run by both sides."""

    space: FeatureSpace
    clean_fid_model: Callable[[Tensor], Tensor]
    clean_fid_resize: Callable[[np.ndarray], np.ndarray] | None
    """Replacement of clean-fid's resizing; None for its own, to 299 pixels."""
    network_only: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]
    """Network of each side, with a batch of samples in its input format."""


class _Inception(nn.Module):
    def __init__(self):
        super().__init__()
        network = inception_v3(weights=None, aux_logits=False, transform_input=False, init_weights=False)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        self.layers = nn.Sequential(OrderedDict((name, getattr(network, theirs)) for name, theirs in INCEPTION_LAYERS.items()))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def inception_cost(images: Images, folder: Path) -> Contest:
    torch.manual_seed(0)
    torch.jit.script(_Inception().eval()).save(str(folder / INCEPTION_FILE))
    os.environ["MEME_INCEPTION_SHA256"] = file_sha256(folder / INCEPTION_FILE)  # a stand-in of random weights
    space = choose_features("inception", images, inception_weights=folder / INCEPTION_FILE)
    theirs = InceptionV3W(str(folder), download=False).eval()
    batch = resized(torch.tensor(images.pixels[:CLEAN_FID_BATCH])).expand(-1, 3, -1, -1) / 128 - 1
    networks = {
        "ours": (space.network.trunk, batch.contiguous(memory_format=torch.channels_last)),
        "clean-fid": (theirs.layers, batch.contiguous()),
    }
    return Contest(space, theirs, None, networks)


def small(kind: str, images: Images) -> Contest:
    space = choose_features(kind, images, on_message=print)
    channels = images.pixels.shape[1]
    network = lambda batch: space.network(batch[:, :channels])  # noqa: E731  (a PNG file is read as three channels)
    batch = torch.tensor(images.pixels[:CLEAN_FID_BATCH])
    networks = {"ours": (network, batch), "clean-fid": (network, batch.float())}
    return Contest(space, network, lambda image: image.astype(np.float32), networks)


def write_pngs(pixels: np.ndarray, folder: Path) -> float:
    """Write one PNG file for each image, and return the seconds."""
    begun = time.perf_counter()
    for index, image in enumerate(pixels):
        Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(folder / f"{index:06}.png")
    return time.perf_counter() - begun


def ours(contest: Contest, pixels: Tensor) -> Statistics:
    return statistics(contest.space(batch) for batch in pixels.split(BATCH))


def theirs(contest: Contest, folder: Path) -> Statistics:
    features = clean_fid.get_folder_features(
        str(folder),
        contest.clean_fid_model,
        num_workers=CLEAN_FID_WORKERS,
        batch_size=CLEAN_FID_BATCH,
        device=torch.device("cpu"),
        custom_fn_resize=contest.clean_fid_resize,
        verbose=False,
    )
    return Statistics(features.mean(axis=0), np.cov(features, rowvar=False), len(features))


def timed(function: Callable[[], object]) -> tuple[object, float, float]:
    """Return the function's result, its wall seconds, and the CPU seconds of this process and of its finished workers."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    result = function()
    return result, time.perf_counter() - wall, cpu_seconds() - cpu


def cpu_seconds() -> float:
    workers = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + workers.ru_utime + workers.ru_stime


@torch.no_grad()
def network_cpu_seconds(network: Callable[[Tensor], Tensor], batch: Tensor) -> float:
    """Return the CPU seconds per image of the network alone."""
    runs = [timed(partial(network, batch))[2] for _ in range(12)]
    return median(runs[2:]) / len(batch)  # TorchScript optimises itself in the first two


def contend(contest: Contest, data: np.ndarray, repeats: int, folder: Path) -> dict:
    samples = 255 - data  # other images than the reference, so that the FID is not 0
    png_seconds = write_pngs(samples, folder)
    pixels, turns = torch.tensor(samples), {"ours": [], "clean-fid": []}
    reference = ours(contest, torch.tensor(data))  # this also warms
    for _ in range(repeats):
        turns["ours"].append(timed(partial(ours, contest, pixels)))
        turns["clean-fid"].append(timed(partial(theirs, contest, folder)))
    fids = {side: frechet_distance(runs[0][0], reference) for side, runs in turns.items()}
    if abs(fids["ours"] - fids["clean-fid"]) > AGREEMENT * abs(fids["clean-fid"]):
        sys.exit(f"the FIDs of the same images differ: {fids}")
    wall = {side: median(run[1] for run in runs) for side, runs in turns.items()}
    cpu = {side: median(run[2] for run in runs) for side, runs in turns.items()}
    paired = [slow[1] / fast[1] for fast, slow in zip(turns["ours"], turns["clean-fid"], strict=True)]
    alone = {side: len(samples) * network_cpu_seconds(*contest.network_only[side]) for side in wall}
    return {
        "vs_cleanfid": round(wall["clean-fid"] / wall["ours"], 2),
        "range": [round(min(paired), 2), round(max(paired), 2)],
        "vs_cleanfid_and_png": round((wall["clean-fid"] + png_seconds) / wall["ours"], 2),
        "vs_cleanfid_cpu_seconds": round(cpu["clean-fid"] / cpu["ours"], 2),
        "images": len(samples),
        "images_per_s": {side: round(len(samples) / seconds, 1) for side, seconds in wall.items()},
        "cpu_ms_per_image": {side: round(1000 * seconds / len(samples), 3) for side, seconds in cpu.items()},
        "network_share": {side: round(alone[side] / cpu[side], 2) for side in wall},
        "fid": {side: round(value, 5) for side, value in fids.items()},
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="a folder or zip of images, or digits")
    parser.add_argument("--size", type=int, help="pixels a side (default: 8 for digits, else 32)")
    parser.add_argument("--networks", nargs="+", default=["random", "classifier", "inception-cost"])
    parser.add_argument("--samples", type=int, default=10_000, help="images for the small networks")
    parser.add_argument("--inception-samples", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    digits = options.data == "digits"
    images = open_images(options.data, size=options.size or (8 if digits else 32), channels=1 if digits else 3, on_message=print)
    results = {}
    for name in options.networks:
        with tempfile.TemporaryDirectory() as scratch:
            (folder := Path(scratch) / "png").mkdir()
            contest = inception_cost(images, Path(scratch)) if name == "inception-cost" else small(name, images)
            count = min(options.inception_samples if name == "inception-cost" else options.samples, len(images))
            results[name] = contend(contest, images.pixels[:count], options.repeats, folder)
        print(name, json.dumps(results[name]), flush=True)
    ratios = {name: result["vs_cleanfid"] for name, result in results.items()}
    facts = {"data": images.name, "threads": options.threads, "repeats": options.repeats}
    print(json.dumps({"vs_cleanfid": ratios} | facts | {"networks": results}))


if __name__ == "__main__":
    main()
