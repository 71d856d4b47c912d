"""Initial weights as a function of (seed, parameter name), so that two candidates start equal wherever their architectures agree.

Where a split changes a shape, the tensor is a slice of the largest one that any split could have, so that the luck of the
draw is common to the candidates that are compared.
"""

import math

import torch
from torch import Tensor, nn

from meme.support.seeding import generator


@torch.no_grad()
def initialize(network: nn.Module, seed: int) -> None:
    """Overwrite all weights of convolutions, linear layers and embeddings. Norms and LayerScale keep their constants.

    The distribution is PyTorch's default: uniform within 1 / sqrt(fan-in) of the largest version, or standard normal for
    embeddings. Layers marked ``starts_at_zero`` get zeros.
    """
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Embedding):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator(seed, "weights", name)))
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        largest = getattr(layer, "slice_of", {})
        full = largest["weight"][0] if largest else layer.weight.shape
        bound = 0.0 if getattr(layer, "starts_at_zero", False) else 1.0 / math.sqrt(math.prod(full[1:]))
        for kind, tensor in layer.named_parameters(recurse=False):
            shape, index = largest.get(kind, (tensor.shape, ()))
            tensor.copy_(_uniform(shape, bound, seed, f"{name}.{kind}")[index])


def _uniform(shape: tuple[int, ...], bound: float, seed: int, name: str) -> Tensor:
    if not bound:
        return torch.zeros(shape)
    return torch.empty(shape).uniform_(-bound, bound, generator=generator(seed, "weights", name))
