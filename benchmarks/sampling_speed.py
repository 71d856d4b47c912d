"""Wall time of a sampling step: the cascade of ffhq-meme against the one large network ffhq-ldm-l, at 3x64x64, by DDIM.

    python benchmarks/sampling_speed.py [--steps 8] [--repeats 3] [--batch 1] [--threads 2]

Both have initial weights, which take as long as trained ones, and denoise the same noise. Steps of the cascade and of the large
network alternate, so that other work of the machine slows both. All experts are in memory (needs 4 GiB). ``vs_ldm_l`` is the
median over steps of the large network's time over the cascade's, with quartiles. ``vs_ldm_l_cpu`` is the same ratio of CPU time.
``macs_ratio`` is the ratio of MACs by our count, including attention. The paper prints 3.19.

``hand_over_ms`` is the time of a hand-over to another expert, measured as a step of experts that do nothing. ``hand_over_share``
is its share of a step. ``after_hand_over`` is the CPU time of real steps after a hand-over, over that of other steps. The last
line is one JSON object.
"""

import argparse
import json
import time
from collections.abc import Callable
from statistics import median, quantiles

import torch
from torch import Tensor, nn

from meme.config.presets import preset
from meme.config.schema import Config
from meme.diffusion.ensemble import Ensemble
from meme.diffusion.sampler import pass_through, sampling_timesteps, starting_noise
from meme.network.unet import build_expert
from meme.scoring.cost import ensemble_cost

IDLE_STEPS = 2_000
Seconds = tuple[float, float]  # wall and CPU


class Idle(nn.Module):
    """Expert that does nothing."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x


def resident(config: Config) -> Ensemble:
    return Ensemble(config, [build_expert(config, number + 1).eval() for number in range(len(config.experts))])


def one_step(ensemble: Ensemble, x: Tensor, t: int) -> tuple[Tensor, Seconds]:
    wall, cpu = time.perf_counter(), time.process_time()
    x = pass_through(ensemble.denoise, x, range(len(x)), [t], ensemble.config, 0)
    return x, (time.perf_counter() - wall, time.process_time() - cpu)


def turn(sides: dict[str, Ensemble], batch: int, timesteps: list[int]) -> dict[str, list[Seconds]]:
    """Run both sides through all ``timesteps``, with alternating steps, and return the times of all steps."""
    states = {name: starting_noise(ensemble.config.image, 0, 0, batch) for name, ensemble in sides.items()}
    took = {name: [] for name in sides}
    for t in timesteps:
        for name, ensemble in sides.items():
            states[name], seconds = one_step(ensemble, states[name], t)
            took[name].append(seconds)
    return took


@torch.inference_mode()
def hand_over_seconds(config: Config) -> float:
    """Return the seconds of one call that goes to another expert than the call before."""
    idle, x = Ensemble(config, [Idle() for _ in config.experts]), torch.zeros(1)
    begun, edges = time.perf_counter(), [expert.interval[0] for expert in config.experts]
    for call in range(IDLE_STEPS):
        idle.denoise(x, edges[call % len(edges)])
    return (time.perf_counter() - begun) / IDLE_STEPS


def ratio(numerators: list[Seconds], denominators: list[Seconds], clock: Callable[[Seconds], float]) -> tuple[float, list[float]]:
    """Return the median and the quartiles of the ratios."""
    found = [clock(a) / clock(b) for a, b in zip(numerators, denominators, strict=True)]
    low, middle, high = (round(each, 3) for each in quantiles(found, n=4))
    return middle, [low, high]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="DDIM steps over all timesteps; must divide 1000")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    configs = {name: preset(name).with_(sampling={"steps": options.steps}) for name in ("ffhq-meme", "ffhq-ldm-l")}
    sides = {name: resident(config) for name, config in configs.items()}
    meme = configs["ffhq-meme"]
    timesteps = sampling_timesteps(meme.diffusion.process, meme.sampling)
    first = [run[0] for run in sides["ffhq-meme"].hand_overs(timesteps)]
    turn(sides, options.batch, timesteps[:1])  # warms
    runs = [turn(sides, options.batch, timesteps) for _ in range(options.repeats)]
    cascade, large = ([seconds for run in runs for seconds in run[name]] for name in sides)
    wall, wall_quartiles = ratio(large, cascade, lambda seconds: seconds[0])
    cpu, cpu_quartiles = ratio(large, cascade, lambda seconds: seconds[1])
    at = timesteps * options.repeats
    taken_over, gone_on = ([s[1] for s, t in zip(cascade, at, strict=True) if (t in first) == new] for new in (True, False))
    hand_over, step = hand_over_seconds(meme), median(seconds[0] for seconds in cascade)
    costs = {name: ensemble_cost(config).macs for name, config in configs.items()}
    figures = {
        "vs_ldm_l": wall,
        "quartiles": wall_quartiles,
        "vs_ldm_l_cpu": cpu,
        "quartiles_cpu": cpu_quartiles,
        "macs_ratio": round(costs["ffhq-ldm-l"] / costs["ffhq-meme"], 3),
        "step_s": {"ffhq-meme": round(step, 3), "ffhq-ldm-l": round(median(seconds[0] for seconds in large), 3)},
        "hand_over_ms": round(1000 * hand_over, 4),
        "hand_over_share": round(hand_over / step, 7),
        "after_hand_over": round(median(taken_over) / median(gone_on), 3),
    }
    print(json.dumps(figures | vars(options)))


if __name__ == "__main__":
    main()
