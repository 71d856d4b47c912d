"""Parameters and MACs of an ensemble, attention counted, weighted by the sampler steps each expert takes."""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from meme.config import Config, ExpertConfig, ImageConfig, NetworkConfig
from meme.denoiser import Denoiser
from meme.ensemble import expert_at
from meme.sampler import sampling_timesteps
from meme.torchvision_compat import make_torchvision_importable


@dataclass(frozen=True)
class ExpertCost:
    """Of one network: parameters, and multiply-accumulates for denoising one image once."""

    params: int
    macs: int


@dataclass(frozen=True)
class Cost:
    """Of a whole ensemble."""

    experts: tuple[ExpertCost, ...]
    macs: float
    """Mean over the sampler's steps of one image's MACs a step."""

    @property
    def params(self) -> int:
        """Sum over the experts."""
        return sum(expert.params for expert in self.experts)


def ensemble_cost(config: Config) -> Cost:
    """Cost of ``config`` without building its weights: takes milliseconds, cached by architecture."""
    experts = tuple(expert_cost(config.image, config.network, expert.low_channels) for expert in config.experts)
    taken = Counter(expert_at(config, t) for t in sampling_timesteps(config.diffusion, config.sampling))
    macs = sum(experts[number - 1].macs * steps for number, steps in taken.items()) / taken.total()
    return Cost(experts, macs)


@lru_cache(maxsize=100_000)
def expert_cost(image: ImageConfig, network: NetworkConfig, low_channels: tuple[int, ...]) -> ExpertCost:
    """Cost of one expert's network, which its interval and p do not change."""
    with torch.device("meta"):
        expert = Denoiser(image, network, ExpertConfig(interval=(0, 1), low_channels=low_channels))
        inputs = {"x": torch.empty(1, image.channels, image.size, image.size), "t": torch.empty(1)}
    return ExpertCost(sum(weight.numel() for weight in expert.parameters()), count_macs(expert, inputs))


def count_macs(module: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """MACs of ``module(**inputs)`` by ptflops, with attention.

    ptflops knows matrix products and convolutions, not the fused attention call, which it would count as nothing: that would
    bias a search toward attention. So attention runs here as the products it consists of.
    """
    make_torchvision_importable()
    import ptflops

    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        macs, _ = ptflops.get_model_complexity_info(
            module,
            (1,),
            input_constructor=lambda _: inputs,
            backend="aten",
            as_strings=False,
            print_per_layer_stat=False,
        )
    if macs is None:
        raise RuntimeError("ptflops could not run the network")
    return int(macs)
