"""Training steps a second: ours against diffusers' and denoising-diffusion-pytorch's U-Nets, each with its own ordinary step.

    python benchmarks/training_speed.py [--sizes digits cifar10] [--turns 9] [--threads 1] [--peers-keep-memory]
    # needs pip install -e '.[bench]'

All train on the same images (scikit-learn's digits, enlarged to three channels of 32x32 pixels for cifar10's size) with the
preset's batch, in float32, in turn, each in a process of its own. Our training makes its process keep the memory that it frees
(``meme.support.memory``). The peers do so only with ``--peers-keep-memory``. The peers' networks have the number of parameters of
ours, to a few percent, and diffusers' also the levels, widths and attention. Every side draws noise and timesteps, computes loss
and gradients, clips them, makes an optimiser step and averages weights, like ``meme.training.trainer``, like diffusers' script
for unconditional training with ``--use_ema``, and like denoising-diffusion-pytorch's Trainer (which averages every tenth step).
Only their data loaders are left out: a batch is an index into a tensor.

Ratios are medians over turns, with quartiles, of wall time and of CPU time, which other work on the machine disturbs less.
``matmul_share`` is three times the floating-point operations of the forward pass (``meme.scoring.cost``, including attention)
over CPU time, as a share of the rate of a 1024 x 1024 matrix product in the same turns. ``products_share`` is the share of our
step in convolutions, matrix products and attention by torch's profiler, all of which are library code. If the rest took no time,
the ratios would be the measured ones divided by it (``if_all_else_were_free``). The last line is one JSON object.
``vs_diffusers`` and ``vs_ddpm_pytorch`` are the smallest wall-time ratios over the sizes.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from statistics import median, quantiles

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

from meme.config.presets import preset
from meme.config.schema import Config
from meme.data.images import Images, open_images
from meme.network.unet import build_expert
from meme.scoring.cost import expert_cost
from meme.support.memory import keep_freed_memory
from meme.support.torchvision_compat import make_torchvision_importable
from meme.training import trainer

make_torchvision_importable()
from denoising_diffusion_pytorch import GaussianDiffusion, Unet  # noqa: E402
from diffusers import DDPMScheduler, UNet2DModel  # noqa: E402
from diffusers.training_utils import EMAModel  # noqa: E402
from ema_pytorch import EMA  # noqa: E402

EXPERT = 2
WARM_STEPS, MATRIX = 2, 1024
PRODUCTS = ("mkldnn_convolution", "convolution_backward", "aten::mm", "aten::addmm", "aten::bmm", "flash_attention")
Seconds = tuple[float, float]  # wall and CPU time of a step


@dataclass(frozen=True)
class Size:
    """Size of a comparison: our preset, the peers' networks, and the number of steps of a side in one turn."""

    preset: str
    diffusers: dict
    ddpm_pytorch: dict
    steps: int


SIZES = {
    "digits": Size(
        "digits-meme",
        {
            "block_out_channels": (16, 32),
            "down_block_types": ("DownBlock2D",) * 2,
            "up_block_types": ("UpBlock2D",) * 2,
            "norm_num_groups": 2,
            "attention_head_dim": 8,
        },
        {"dim": 12, "dim_mults": (1, 2), "attn_dim_head": 42},
        steps=20,
    ),
    "cifar10": Size(
        "cifar10-meme",
        {
            "block_out_channels": (32, 64, 64),
            "down_block_types": ("DownBlock2D",) * 3,
            "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),  # as in the iU-Net: the decoder attends
            "norm_num_groups": 16,
            "attention_head_dim": 16,
        },
        {"dim": 28, "dim_mults": (1, 2, 2)},
        steps=2,
    ),
}


def timed(take_step: Callable[[], object], steps: int) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        take_step()
    return (time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps


def ours(config: Config, images: Images) -> Callable[[int], Seconds]:
    """Return a function that times ``meme.training.trainer``, from the report of its first step to that of its last."""
    trainer.REPORT_EVERY = 1

    def turn(steps: int) -> Seconds:
        stamps = []
        trainer.train_expert(
            config.with_(training={"steps": steps + 1}),
            EXPERT,
            images,
            on_progress=lambda _: stamps.append((time.perf_counter(), time.process_time())),
        )
        return tuple((last - first) / steps for first, last in zip(stamps[0], stamps[-1], strict=True))

    return turn


def diffusers_step(config: Config, network: nn.Module, images: torch.Tensor) -> Callable[[], None]:
    """Return the step of examples/unconditional_image_generation/train_unconditional.py, for ``images`` in [-1, 1]."""
    schedule = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    averaged = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4)

    def take_step() -> None:
        clean = images[torch.randint(len(images), (config.training.batch_size,))]
        noise, t = torch.randn(clean.shape), torch.randint(0, 1000, (len(clean),))
        loss = F.mse_loss(network(schedule.add_noise(clean, noise, t), t).sample.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        averaged.step(network.parameters())

    return take_step


def ddpm_pytorch_step(config: Config, network: nn.Module, images: torch.Tensor) -> Callable[[], None]:
    """Return the step of denoising_diffusion_pytorch.Trainer, for ``images`` in [0, 1]."""
    diffusion = GaussianDiffusion(network, image_size=config.image.size)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
    averaged = EMA(diffusion, beta=0.995, update_every=10)

    def take_step() -> None:
        loss = diffusion(images[torch.randint(len(images), (config.training.batch_size,))])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        averaged.update()

    return take_step


def matmul_rate() -> float:
    """Return the floating-point operations per CPU second of a large matrix product."""
    a = torch.randn(MATRIX, MATRIX)
    return 2 * MATRIX**3 / timed(lambda: a @ a, 4)[1]


def products_share(size: Size) -> float:
    """Return the share of our step's time in convolutions, matrix products and attention."""
    turn, _ = prepare_ours(size)
    turn(WARM_STEPS)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        turn(size.steps)
    took = {row.key: row.self_cpu_time_total for row in profiled.key_averages()}
    return sum(took[name] for name in took if any(word in name for word in PRODUCTS)) / sum(took.values())


def params(network: nn.Module) -> int:
    return sum(weight.numel() for weight in network.parameters())


class Side:
    """Training of one network in a process of its own, which waits between its turns."""

    def __init__(self, prepare: Callable[..., tuple[Callable[[int], Seconds], int]], size: Size, options: argparse.Namespace):
        spawning = multiprocessing.get_context("spawn")
        self._here, there = spawning.Pipe()
        self._process = spawning.Process(target=_take_turns, args=(there, prepare, size, options), daemon=True)
        self._process.start()
        there.close()  # so that the end of the process is noticed
        self.params: int = self._here.recv()

    def turn(self, steps: int) -> Seconds:
        self._here.send(steps)
        return self._here.recv()

    def end(self) -> None:
        self._here.send(0)
        self._process.join()


def _take_turns(parent: Connection, prepare: Callable, size: Size, options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    if options.peers_keep_memory:
        keep_freed_memory()
    turn, weights = prepare(size)
    parent.send(weights)
    while steps := parent.recv():
        parent.send(turn(steps))


def prepare_ours(size: Size) -> tuple[Callable[[int], Seconds], int]:
    config, images = at(size)
    return ours(config, images), params(build_expert(config, EXPERT))


def prepare_diffusers(size: Size) -> tuple[Callable[[int], Seconds], int]:
    config, images = at(size)
    side, channels = config.image.size, config.image.channels
    network = UNet2DModel(
        sample_size=side, in_channels=channels, out_channels=channels, layers_per_block=1, **size.diffusers
    ).train()
    return partial(timed, diffusers_step(config, network, pixels(images))), params(network)


def prepare_ddpm_pytorch(size: Size) -> tuple[Callable[[int], Seconds], int]:
    config, images = at(size)
    network = Unet(channels=config.image.channels, **size.ddpm_pytorch).train()
    return partial(timed, ddpm_pytorch_step(config, network, pixels(images) / 2 + 0.5)), params(network)


SIDES = {"ours": prepare_ours, "diffusers": prepare_diffusers, "ddpm_pytorch": prepare_ddpm_pytorch}


def at(size: Size) -> tuple[Config, Images]:
    """Return the preset and its images."""
    config = preset(size.preset)
    return config, open_images("digits", size=config.image.size, channels=config.image.channels)


def pixels(images: Images) -> torch.Tensor:
    """Return all images in [-1, 1]."""
    return images.tensor(range(len(images)))


def contend(size: Size, options: argparse.Namespace) -> dict:
    sides = {name: Side(prepare, size, options) for name, prepare in SIDES.items()}
    took, rates = {name: [] for name in sides}, []
    for turn in range(options.turns + 1):
        for name, side in sides.items():
            seconds = side.turn(size.steps if turn else WARM_STEPS)
            if turn:
                took[name].append(seconds)
        rates.append(matmul_rate())
    for side in sides.values():
        side.end()
    config = preset(size.preset)
    operations = 6 * config.training.batch_size * expert_cost(config.image, config.network, config.expert(EXPERT)).macs
    peers, share = [name for name in sides if name != "ours"], products_share(size)
    return {
        "wall": {name: against(took, name, 0) for name in peers},
        "cpu": {name: against(took, name, 1) for name in peers},
        "images_per_s": {name: round(config.training.batch_size / median(s[0] for s in took[name]), 1) for name in sides},
        "cpu_ms_per_step": {name: round(1000 * median(s[1] for s in took[name]), 1) for name in sides},
        "matmul_gflops": round(median(rates) / 1e9, 1),
        "matmul_share": round(operations / median(s[1] for s in took["ours"]) / median(rates), 2),
        "products_share": round(share, 2),
        "if_all_else_were_free": {name: round(against(took, name, 0)["median"] / share, 2) for name in peers},
        "params": {name: side.params for name, side in sides.items()},
    }


def against(took: dict[str, list[Seconds]], peer: str, clock: int) -> dict[str, float | list[float]]:
    """Return our throughput over the peer's: median and quartiles of the turns' ratios."""
    ratios = [slow[clock] / fast[clock] for fast, slow in zip(took["ours"], took[peer], strict=True)]
    low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"median": round(median(ratios), 2), "quartiles": [round(low, 2), round(high, 2)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peers-keep-memory", action="store_true", help="make all sides keep freed memory, not only ours")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {}
    for name in options.sizes:
        results[name] = contend(SIZES[name], options)
        print(name, json.dumps(results[name]), flush=True)
    smallest = {f"vs_{peer}": min(r["wall"][peer]["median"] for r in results.values()) for peer in ("diffusers", "ddpm_pytorch")}
    print(json.dumps(smallest | vars(options) | {"sizes": results}))


if __name__ == "__main__":
    main()
