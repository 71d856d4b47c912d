"""Training steps a second: ours against diffusers' and denoising-diffusion-pytorch's U-Nets, each with its own ordinary step.

    python benchmarks/training_speed.py [--sizes digits cifar10] [--turns 9] [--threads 1]      # needs pip install -e '.[bench]'

All train on the same images (scikit-learn's digits, enlarged to three channels of 32x32 pixels for cifar10's size) with the
preset's batch, in float32, in turn in this one process. The peers' networks have as many parameters as ours, to a few percent,
and for diffusers the same levels, widths and attention. Every side draws noise and timesteps, computes its loss and gradients,
clips them, takes an optimiser's step and averages weights: as ``meme.trainer`` has it, as diffusers' script for unconditional
training with ``--use_ema``, and as denoising-diffusion-pytorch's Trainer (which averages every tenth step) do. Only their loaders
are left out: a batch of theirs costs an index.

Ratios are medians over turns, with the quartiles beside them, of wall time and of CPU time, which other work on the machine
disturbs less. ``matmul_share`` is three times the forward pass's floating-point operations (``meme.cost``, attention counted)
over CPU time, as a share of what a 1024 x 1024 matrix product reaches in the same turns. The last line is one JSON object:
``vs_diffusers`` and ``vs_ddpm_pytorch`` are the smallest wall-time ratios over the sizes.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles

import torch
import torch.nn.functional as F
from torch import nn

from meme import trainer
from meme.config import Config
from meme.cost import expert_cost
from meme.data import Images, open_images
from meme.denoiser import build_expert
from meme.presets import preset
from meme.torchvision_compat import make_torchvision_importable

make_torchvision_importable()
from denoising_diffusion_pytorch import GaussianDiffusion, Unet  # noqa: E402
from diffusers import DDPMScheduler, UNet2DModel  # noqa: E402
from diffusers.training_utils import EMAModel  # noqa: E402
from ema_pytorch import EMA  # noqa: E402

EXPERT = 2
WARM_STEPS, MATRIX = 2, 1024
Seconds = tuple[float, float]  # a step's wall and CPU time


@dataclass(frozen=True)
class Size:
    """Of what is trained: our preset, the peers' networks, and how many steps a side takes in one turn."""

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
    """``meme.trainer`` itself, from the report of its first step to that of its last."""
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
    """Of examples/unconditional_image_generation/train_unconditional.py; ``images`` in [-1, 1]."""
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
    """Of denoising_diffusion_pytorch.Trainer; ``images`` in [0, 1]."""
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
    """Floating-point operations a CPU second in a large matrix product."""
    a = torch.randn(MATRIX, MATRIX)
    return 2 * MATRIX**3 / timed(lambda: a @ a, 4)[1]


def params(network: nn.Module) -> int:
    return sum(weight.numel() for weight in network.parameters())


def contend(size: Size, turns: int) -> dict:
    config = preset(size.preset)
    side, channels = config.image.size, config.image.channels
    images = open_images("digits", size=side, channels=channels)
    pixels = images.tensor(range(len(images)))
    theirs = UNet2DModel(
        sample_size=side, in_channels=channels, out_channels=channels, layers_per_block=1, **size.diffusers
    ).train()
    lucid = Unet(channels=channels, **size.ddpm_pytorch).train()
    steps = {
        "diffusers": diffusers_step(config, theirs, pixels),
        "ddpm_pytorch": ddpm_pytorch_step(config, lucid, pixels / 2 + 0.5),
    }
    sides = {"ours": ours(config, images)} | {name: lambda k, step=step: timed(step, k) for name, step in steps.items()}
    took, rates = {name: [] for name in sides}, []
    for turn in range(turns + 1):
        for name, run in sides.items():
            seconds = run(size.steps if turn else WARM_STEPS)
            if turn:
                took[name].append(seconds)
        rates.append(matmul_rate())
    operations = 6 * config.training.batch_size * expert_cost(config.image, config.network, config.expert(EXPERT)).macs
    networks = {"ours": build_expert(config, EXPERT), "diffusers": theirs, "ddpm_pytorch": lucid}
    return {
        "wall": {name: against(took, name, 0) for name in steps},
        "cpu": {name: against(took, name, 1) for name in steps},
        "images_per_s": {name: round(config.training.batch_size / median(s[0] for s in took[name]), 1) for name in sides},
        "cpu_ms_per_step": {name: round(1000 * median(s[1] for s in took[name]), 1) for name in sides},
        "matmul_gflops": round(median(rates) / 1e9, 1),
        "matmul_share": round(operations / median(s[1] for s in took["ours"]) / median(rates), 2),
        "params": {name: params(network) for name, network in networks.items()},
    }


def against(took: dict[str, list[Seconds]], peer: str, clock: int) -> dict[str, float | list[float]]:
    """How many times our throughput is the peer's: median and quartiles of the turns' ratios."""
    ratios = [slow[clock] / fast[clock] for fast, slow in zip(took["ours"], took[peer], strict=True)]
    low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"median": round(median(ratios), 2), "quartiles": [round(low, 2), round(high, 2)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {}
    for name in options.sizes:
        results[name] = contend(SIZES[name], options.turns)
        print(name, json.dumps(results[name]), flush=True)
    smallest = {f"vs_{peer}": min(r["wall"][peer]["median"] for r in results.values()) for peer in ("diffusers", "ddpm_pytorch")}
    print(json.dumps(smallest | {"threads": options.threads, "turns": options.turns, "sizes": results}))


if __name__ == "__main__":
    main()
