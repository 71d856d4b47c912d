"""Grids of images for people to look at."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from meme.support.files import written_whole

GAP = 1  # pixels between images
LEGIBLE_SIZE = 512  # pixels a side that a grid of small images is enlarged to, by whole factors


def grid(images: Tensor, columns: int | None = None) -> Tensor:
    """Arrange uint8 (N, C, H, W) as one image (H', W', C), row by row, with a white line between images. Empty places are
    white."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    missing = -len(images) % columns
    images = torch.cat([images, images.new_full((missing, *images.shape[1:]), 255)])
    images = F.pad(images, (0, GAP, 0, GAP), value=255)
    return rearrange(images, "(rows columns) c h w -> (rows h) (columns w) c", columns=columns)


def save_grid(path: Path, images: Tensor, columns: int | None = None) -> None:
    """Write uint8 (N, C, H, W) as a PNG. Small images are enlarged without smoothing."""
    pixels = grid(images.cpu(), columns).numpy()
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    factor = max(1, LEGIBLE_SIZE // max(picture.size))
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    with written_whole(path) as partial:
        picture.save(partial, format="PNG")
