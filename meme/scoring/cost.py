"""Parameters and MACs of an ensemble, attention counted, weighted by the sampler steps each expert takes."""

import contextlib
import io
import time
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from meme.config.architecture import Mixing
from meme.config.schema import Config, ExpertConfig, ImageConfig, NetworkConfig
from meme.diffusion.sampler import sampling_timesteps
from meme.network.blocks import Downsample, Upsample, channels_last, doubled
from meme.network.iformer import LowMixer
from meme.network.unet import Denoiser
from meme.support.devices import calculating_in, resolved, wait_for
from meme.support.precision import Precision
from meme.support.torchvision_compat import make_torchvision_importable

LATENCY_PASSES = 4
LATENCY_IMAGES = 64  # at a time on a CPU, which is busy with them; a GPU gets the whole batch
PAPER_IMAGES = 3  # its printed MACs are those of three images, which the released networks show


@dataclass(frozen=True)
class ExpertCost:
    """The cost of one network: parameters, and multiply-accumulates for denoising one image once."""

    params: int
    macs: int
    class_params: int = 0
    """The part of ``params`` that is embeddings of classes, which latent diffusion counts separately."""


@dataclass(frozen=True)
class Cost:
    """The cost of a whole ensemble."""

    experts: tuple[ExpertCost, ...]
    macs: float
    """Mean over the sampler's steps of one image's MACs a step."""

    @property
    def params(self) -> int:
        """Sum over the experts."""
        return sum(expert.params for expert in self.experts)


def ensemble_cost(config: Config) -> Cost:
    """Return the cost of ``config``, without building its weights. It takes milliseconds and is cached by architecture.

    With classifier-free guidance an expert runs twice a step, and ``macs`` counts both.
    """
    experts = tuple(expert_cost(config.image, config.network, expert) for expert in config.experts)
    return Cost(experts, sum(expert.macs * share for expert, share in zip(experts, step_shares(config), strict=True)))


@lru_cache(maxsize=1_000)
def _steps_taken(intervals: tuple[tuple[int, int], ...], timesteps: tuple[int, ...]) -> tuple[int, ...]:
    taken = Counter(next(place for place, (first, end) in enumerate(intervals) if first <= t < end) for t in timesteps)
    return tuple(taken[place] for place in range(len(intervals)))


def steps_taken(config: Config) -> tuple[int, ...]:
    """Return the number of sampler steps of each expert."""
    intervals = tuple(expert.interval for expert in config.experts)
    return _steps_taken(intervals, tuple(sampling_timesteps(config.diffusion, config.sampling)))


def step_shares(config: Config) -> tuple[float, ...]:
    """Return the number of runs of each expert per sampler step, averaged over the sampler's steps. Guidance doubles it."""
    taken, asked = steps_taken(config), 1 if config.sampling.guidance_scale == 1 else 2
    return tuple(asked * steps / sum(taken) for steps in taken)


def sampler_passes(config: Config) -> int:
    """Return the number of passes of one image through one expert that a score's samples take, twice a step with guidance."""
    asked = 1 if config.sampling.guidance_scale == 1 else 2
    return config.evaluation.samples * asked * len(sampling_timesteps(config.diffusion, config.sampling))


def expert_cost(image: ImageConfig, network: NetworkConfig, expert: ExpertConfig) -> ExpertCost:
    """Return the cost of one expert's network. Its interval and p do not change it."""
    return _cost(image, network, expert.network_alone(network))


@lru_cache(maxsize=100_000)
def _cost(image: ImageConfig, network: NetworkConfig, expert: ExpertConfig) -> ExpertCost:
    """Return the cost of an expert as a sum over levels.

    An expert's split at one level does not change the cost of the others. So of the thousands of networks that a search meets,
    only those with a split at a single level are counted.
    """
    if not network.splits_channels:
        return _counted(image, network, expert)
    unmixed = _counted(image, network, _mixing_at(0, expert, network))
    levels = [_counted(image, network, _mixing_at(level, expert, network)) for level in range(1, network.levels + 1)]
    return ExpertCost(
        unmixed.params + sum(level.params - unmixed.params for level in levels),
        unmixed.macs + sum(level.macs - unmixed.macs for level in levels),
        unmixed.class_params,
    )


def _mixing_at(level: int, expert: ExpertConfig, network: NetworkConfig) -> ExpertConfig:
    """Return ``expert`` with its own split at ``level``, and all convolution at the others."""
    unmixed = Mixing(0, 1, "average", "max")
    levels = range(1, network.levels + 1)
    mixings = [expert.mixing(network, level) if each == level else unmixed for each in levels]
    low_channels, strides, low_pools, high_pools = zip(*mixings, strict=True)
    update = {"low_channels": low_channels, "pool_strides": strides, "low_pools": low_pools, "high_pools": high_pools}
    return expert.model_copy(update=update).network_alone(network)


@lru_cache(maxsize=100_000)
def _counted(image: ImageConfig, network: NetworkConfig, expert: ExpertConfig) -> ExpertCost:
    denoiser, inputs = _on_meta(image, network, expert)
    params = sum(weight.numel() for weight in denoiser.parameters())
    return ExpertCost(params, count_macs(denoiser, inputs), 0 if denoiser.classes is None else denoiser.classes.weight.numel())


def paper_macs(image: ImageConfig, network: NetworkConfig, expert: ExpertConfig) -> int:
    """Return MACs as the paper prints them: those of three images, by ptflops's count of layers. That count leaves out latent
    diffusion's attention and includes that of iFormer blocks."""
    return _paper_macs(image, network, expert.network_alone(network))


@dataclass(frozen=True)
class TimedNetwork:
    """All that determines how long one network takes for an image on a device of a given kind."""

    image: ImageConfig
    network: NetworkConfig
    expert: ExpertConfig
    """Its interval and p are placeholders, the same for all experts of one network."""
    images: int
    """In a batch."""
    precision: Precision
    """Never auto."""

    def facts(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        parts = {name: getattr(self, name).model_dump(mode="json") for name in ("image", "network", "expert")}
        return parts | {"images": self.images, "precision": self.precision}


def timed_network(config: Config, number: int, device_type: str) -> TimedNetwork:
    """Return the network of expert ``number`` as it is timed: in batches of the sampling's size, on a CPU of at most
    ``LATENCY_IMAGES``."""
    expert, size = config.expert(number).network_alone(config.network), config.sampling.batch_size
    images = min(size, LATENCY_IMAGES) if device_type == "cpu" else size
    return TimedNetwork(config.image, config.network, expert, images, resolved(device_type, config.sampling.precision))


def passes_of(config: Config, number: int) -> float:
    """Return the passes through expert ``number`` that an image takes in all sampler steps."""
    return len(sampling_timesteps(config.diffusion, config.sampling)) * step_shares(config)[number - 1]


@torch.inference_mode()
def measure_pass_ms(timed: TimedNetwork, device: torch.device | str) -> float:
    """Measure how many milliseconds one pass through a network, with initial weights, takes for an image of a batch.

    It is the quickest of a few passes, as what disturbs them only makes them slower. The scheduler is left out.
    """
    device, image, batch_size = torch.device(device), timed.image, timed.images
    denoiser = channels_last(Denoiser(image, timed.network, timed.expert).to(device).eval())
    x = torch.zeros(batch_size, image.channels, image.size, image.size, device=device)
    inputs = [x.contiguous(memory_format=torch.channels_last), torch.zeros(batch_size, device=device)]
    inputs += [torch.zeros(batch_size, dtype=torch.long, device=device)] if timed.network.classes else []
    took = []
    with calculating_in(device, timed.precision):
        for _ in range(LATENCY_PASSES):
            begun = time.perf_counter()
            denoiser(*inputs)
            wait_for(device)
            took.append(time.perf_counter() - begun)
    return 1000 * min(took) / batch_size


@lru_cache(maxsize=1_000)
def _paper_macs(image: ImageConfig, network: NetworkConfig, expert: ExpertConfig) -> int:
    denoiser, inputs = _on_meta(image, network, expert)
    attention = []

    def count_products(qkv: torch.nn.Module, arguments: tuple[torch.Tensor], output: torch.Tensor) -> None:
        _, tokens, channels = arguments[0].shape
        attention.append(2 * tokens * tokens * channels)

    for layer in denoiser.modules():
        if isinstance(layer, LowMixer):
            layer.qkv.register_forward_hook(count_products)
    return PAPER_IMAGES * (_count_layers(denoiser, inputs) + sum(attention))


def _on_meta(image: ImageConfig, network: NetworkConfig, expert: ExpertConfig) -> tuple[Denoiser, dict[str, torch.Tensor]]:
    """Return a network without memory, and the inputs of one image."""
    with torch.device("meta"):
        denoiser = Denoiser(image, network, expert)
        inputs = {"x": torch.empty(1, image.channels, image.size, image.size), "t": torch.empty(1)}
        if network.classes:
            inputs["labels"] = torch.empty(1, dtype=torch.long)
    return denoiser, inputs


def count_macs(module: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """Count the MACs of ``module(**inputs)`` by ptflops, with attention.

    ptflops counts matrix products and convolutions, but the fused attention call as nothing, which would bias a search toward
    attention. So attention runs here as the products it consists of.
    """
    with sdpa_kernel(SDPBackend.MATH):
        return _ptflops(module, inputs, backend="aten")


def _count_layers(module: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """Count the MACs of the layers alone. ptflops recognises a layer by its exact type, so our subclasses of convolutions must
    be named."""
    make_torchvision_importable()
    from ptflops.pytorch_ops import conv_flops_counter_hook

    def upsample(layer: Upsample, arguments: tuple[torch.Tensor], output: torch.Tensor) -> None:
        conv_flops_counter_hook(layer, (doubled(arguments[0]),), output)

    hooks = {Downsample: conv_flops_counter_hook, Upsample: upsample}
    layers_only = {"count_functional": False}  # or linear layers would count twice, as module and as function
    return _ptflops(module, inputs, backend="pytorch", custom_modules_hooks=hooks, backend_specific_config=layers_only)


def _ptflops(module: torch.nn.Module, inputs: dict[str, torch.Tensor], **options: Any) -> int:
    make_torchvision_importable()
    import ptflops

    remarks = io.StringIO()  # it prints that inputs by keyword are a batch of one, which they are
    with torch.no_grad(), contextlib.redirect_stdout(remarks):
        macs, _ = ptflops.get_model_complexity_info(
            module, (1,), input_constructor=lambda _: inputs, as_strings=False, print_per_layer_stat=False, **options
        )
    if macs is None:
        raise RuntimeError(f"ptflops could not run the network: {remarks.getvalue()}")
    return int(macs)
