"""Stand-ins for the Inception file that clean-fid downloads, and images to run them on."""

from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from meme.data.images import Images
from meme.scoring.features.space import file_sha256


def noise_images(count=24, size=32, channels=3, labels=True) -> Images:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, channels, size, size), dtype=np.uint8)
    return Images(
        name="noise",
        pixels=pixels,
        labels=np.arange(count) % 2 if labels else None,
        classes=("a", "b") if labels else (),
        content_id=f"{size:08x}{channels:08x}",
        skipped=(),
    )


class _Convolution(nn.Module):
    """As in the file clean-fid downloads: weights cast to the image's type, a batch norm without weight."""

    def __init__(self, channels: int, width: int, kernel: int, stride: int = 1):
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.randn(width, channels, kernel, kernel) * (2 / channels) ** 0.5 / kernel)
        self.beta, self.mean = nn.Parameter(torch.randn(width) / 9), nn.Parameter(torch.randn(width) / 9)
        self.var = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.conv2d(x, self.weight.to(x.dtype), stride=self.stride)
        return torch.relu(nn.functional.batch_norm(x, self.mean, self.var, bias=self.beta, eps=1e-3))


class _Mixed(nn.Module):
    """Branches side by side, the 1x1 convolution first unless ``turned``."""

    def __init__(self, channels: int, turned: bool):
        super().__init__()
        self.conv = _Convolution(channels, 8, kernel=1)
        self.tower = nn.Sequential(OrderedDict(conv=_Convolution(channels, 8, kernel=1)))
        self.turned = turned

    def forward(self, x: Tensor) -> Tensor:
        branches = [self.conv(x).contiguous(), self.tower(x).contiguous()]
        return torch.cat(branches[::-1] if self.turned else branches, dim=1)


class _Detour(nn.Module):
    """Layers that do not simply follow each other."""

    def __init__(self, layers: nn.Sequential):
        super().__init__()
        for name, layer in layers.named_children():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool2(self.mixed_7(self.mixed_6(self.conv(x) + 1)))


class TinyInception(nn.Module):
    """The interface of the TorchScript file clean-fid downloads, without its weights."""

    def __init__(self, *, block: str = "mixed_6", turned: bool = False, stride: int = 17, detour: bool = False):
        super().__init__()
        blocks = {"conv": _Convolution(3, 6, 17, stride), block: _Mixed(6, turned), "mixed_7": _Convolution(16, 2048, 1)}
        layers = nn.Sequential(OrderedDict(blocks | {"pool2": nn.AvgPool2d(289 // stride)}))
        self.layers = _Detour(layers) if detour else layers
        self.output = nn.Linear(2048, 11)

    def forward(self, x: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        features = self.layers(x.to(torch.float32).sub(128).div(128)).reshape([-1, 2048])
        if return_features:
            return features
        logits = nn.functional.linear(features, self.output.weight) if no_output_bias else self.output(features)
        return torch.softmax(logits, dim=1)


class BareInception(nn.Module):
    """No more of the interface than FID needs."""

    def __init__(self):
        super().__init__()
        self.layers = TinyInception(block="middle").layers

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def saved(path: Path, model: nn.Module) -> Path:
    torch.manual_seed(1)
    torch.jit.script(model.eval()).save(str(path))
    return path


def trusted(path: Path, monkeypatch) -> Path:
    """``path``, whose content may be opened from now on beside the published file."""
    monkeypatch.setenv("MEME_INCEPTION_SHA256", file_sha256(path).upper())
    return path
