"""The feature space of a fixed random network: for images without labels, away from ImageNet.

Shapes: ``B`` images, ``C`` channels, ``H W`` space, ``D`` features, ``S`` spatial features.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meme.data.images import Images
from meme.scoring.features.space import SPATIAL_CHANNELS, FeatureSpace, Views
from meme.support.seeding import generator

RANDOM_RECIPE = "random-conv-v1"
SLOPE = 0.2  # of the leaky ReLU
SPATIAL_LEVEL = 1
SPATIAL_SIDE = 8  # larger maps are averaged down to it, so that S does not grow with the image


class _RandomConvolutions(nn.Module):
    """Four levels of 3x3 convolutions, each half the size of the last; the spatial means of all levels, D = 128."""

    WIDTHS = (16, 32, 32, 48)

    def __init__(self, channels: int):
        super().__init__()
        draw = generator(0, RANDOM_RECIPE, channels)
        for level, width in enumerate(self.WIDTHS):
            # He et al. 2015: keeps the variance through the leaky ReLU, which unlike ReLU leaves no feature constant.
            weight = torch.randn(width, channels, 3, 3, generator=draw) * (2 / (1 + SLOPE**2) / (9 * channels)) ** 0.5
            self.register_buffer(f"weight{level}", weight)
            channels = width

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.cat([level.mean(dim=(2, 3)) for level in self._levels(pixels)], dim=1)

    def views(self, pixels: Tensor) -> Views:
        levels = self._levels(pixels)
        middle = levels[SPATIAL_LEVEL][:, :SPATIAL_CHANNELS]
        height, width = (min(side, SPATIAL_SIDE) for side in middle.shape[2:])
        spatial = F.adaptive_avg_pool2d(middle, (height, width)).flatten(1)
        return Views(torch.cat([level.mean(dim=(2, 3)) for level in levels], dim=1), spatial, None)

    def _levels(self, pixels: Tensor) -> list[Tensor]:
        x, levels = pixels.float() / 127.5 - 1, []
        for level in range(len(self.WIDTHS)):
            x = F.conv2d(x, self.get_buffer(f"weight{level}"), stride=1 if level == 0 else 2, padding=1)
            x = F.leaky_relu(x, SLOPE)
            levels.append(x)
        return levels


def random_space(images: Images, device: torch.device) -> FeatureSpace:
    """Return the same network for all data with the same number of channels; it has no classes."""
    channels, *sides = images.pixels.shape[1:]
    network = _RandomConvolutions(channels).to(device)
    blank = torch.zeros(1, channels, *sides, dtype=torch.uint8, device=device)
    return FeatureSpace(
        kind="random",
        name="random-conv",
        feature_id=f"{RANDOM_RECIPE}-{channels}-channels",
        dim=sum(network.WIDTHS),
        network=network,
        device=device,
        spatial_dim=network.views(blank).known_spatial.shape[1],
    )
