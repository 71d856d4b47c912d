"""Speed of training several small experts of one shape in one batch, against one after the other.

    python benchmarks/batched_experts.py [--preset digits-meme] [--experts 4] [--turns 9] [--threads 1] [--device cpu]

Candidates that differ in p, interval or seed but not in splits are networks of one shape. ``in_turn`` makes the steps of
``meme.training.trainer`` one network after the other (forward, backward, fused AdamW on one vector). ``at_once`` stacks their
weights, maps forward and gradient over them with ``torch.func``, which gives grouped convolutions and batched matrix products,
and makes one AdamW step for all. Both have the same images, timesteps and noise. Gradients are compared first. On a GPU, a third
way gives every expert a CUDA stream of its own.

``at_once`` is the median over turns of the wall time of ``in_turn`` over that of ``at_once``, with quartiles. Above 1, batching
is faster. The last line is one JSON object.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from statistics import median, quantiles

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from meme.config.presets import preset
from meme.config.schema import Config
from meme.network.initialization import initialize
from meme.network.unet import build_expert
from meme.support.devices import wait_for
from meme.training.trainer import in_one_piece

EXPERT = 2
WARM_STEPS = 2
Batch = tuple[Tensor, Tensor, Tensor]


def networks(config: Config, count: int, device: str) -> list[nn.Module]:
    built = []
    for seed in range(count):
        network = build_expert(config, EXPERT)
        initialize(network, seed)
        built.append(network.to(device).train())
    return built


def batch(config: Config, count: int, device: str) -> Batch:
    """Return images (experts, B, C, H, W), timesteps (experts, B) and noise (experts, B, C, H, W)."""
    shape = (count, config.training.batch_size, config.image.channels, config.image.size, config.image.size)
    x, epsilon = torch.randn(2, *shape)
    return x.to(device), torch.randint(config.diffusion.timesteps, shape[:2]).to(device), epsilon.to(device)


class InTurn:
    def __init__(self, built: list[nn.Module]):
        self.networks = built
        self.weights = [in_one_piece(network, gradients=True) for network in built]
        self.optimizers = [torch.optim.AdamW([weights], lr=1e-4, fused=True) for weights in self.weights]

    def gradients(self, inputs: Batch) -> None:
        for network, x, t, epsilon in zip(self.networks, *inputs, strict=True):
            F.mse_loss(network(x.contiguous(memory_format=torch.channels_last), t), epsilon).backward()

    def step(self, inputs: Batch) -> None:
        for network, optimizer, x, t, epsilon in zip(self.networks, self.optimizers, *inputs, strict=True):
            F.mse_loss(network(x.contiguous(memory_format=torch.channels_last), t), epsilon).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)


class OnStreams(InTurn):
    def step(self, inputs: Batch) -> None:
        streams = [torch.cuda.Stream() for _ in self.networks]
        for stream, network, optimizer, x, t, epsilon in zip(streams, self.networks, self.optimizers, *inputs, strict=True):
            with torch.cuda.stream(stream):
                F.mse_loss(network(x.contiguous(memory_format=torch.channels_last), t), epsilon).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)


class AtOnce:
    def __init__(self, built: list[nn.Module]):
        plain = [network.to(memory_format=torch.contiguous_format) for network in built]  # torch.func supports no other layout
        self.parameters, self.buffers = stack_module_state(plain)
        self.network = copy.deepcopy(plain[0])
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=1e-4, fused=True)
        self._gradients = vmap(grad(self._loss))

    def _loss(self, parameters: dict, buffers: dict, x: Tensor, t: Tensor, epsilon: Tensor) -> Tensor:
        return F.mse_loss(functional_call(self.network, (parameters, buffers), (x, t)), epsilon)

    def gradients(self, inputs: Batch) -> dict[str, Tensor]:
        detached = {name: parameter.detach() for name, parameter in self.parameters.items()}
        return self._gradients(detached, self.buffers, *inputs)

    def step(self, inputs: Batch) -> None:
        for name, gradient in self.gradients(inputs).items():
            self.parameters[name].grad = gradient
        self.optimizer.step()


def largest_difference(config: Config, count: int, device: str) -> float:
    """Return the largest difference between the gradients of both ways, relative to the largest gradient of each weight."""
    inputs, built = batch(config, count, device), networks(config, count, device)
    stacked = AtOnce(networks(config, count, device)).gradients(inputs)
    InTurn(built).gradients(inputs)
    differences = []
    for place, network in enumerate(built):
        for name, weight in network.named_parameters():
            largest = weight.grad.abs().max().clamp(min=1e-8)
            differences.append(float((stacked[name][place] - weight.grad).abs().max() / largest))
    return max(differences)


def seconds(step: Callable[[Batch], None], inputs: Batch, steps: int) -> float:
    begun = time.perf_counter()
    for _ in range(steps):
        step(inputs)
    wait_for(inputs[0].device)
    return (time.perf_counter() - begun) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="digits-meme")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--steps", type=int, default=10, help="training steps of each way in a turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config, device = preset(options.preset), options.device
    print(f"gradients differ by at most {largest_difference(config, options.experts, device):.1e} of a weight's largest")
    ways = {"in_turn": InTurn, "at_once": AtOnce} | ({"on_streams": OnStreams} if device.startswith("cuda") else {})
    running = {name: way(networks(config, options.experts, device)) for name, way in ways.items()}
    inputs = batch(config, options.experts, device)
    for way in running.values():
        seconds(way.step, inputs, WARM_STEPS)
    took = [{name: seconds(way.step, inputs, options.steps) for name, way in running.items()} for _ in range(options.turns)]
    result: dict[str, object] = {"step_ms": {name: round(1e3 * median(turn[name] for turn in took), 1) for name in running}}
    for name in running:
        if name != "in_turn":
            ratios = [turn["in_turn"] / turn[name] for turn in took]
            result[name] = round(median(ratios), 2)
            result[f"{name}_quartiles"] = [round(quartile, 2) for quartile in quantiles(ratios, n=4)[::2]]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
