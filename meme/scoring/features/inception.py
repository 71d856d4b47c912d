"""The feature space of papers: Inception-v3 as the TorchScript file that clean-fid and StyleGAN use, behind clean-fid's resizing.

Shapes: ``B`` images, ``C`` channels, ``H W`` space.
"""

import http.client
import os
import platform
import shutil
import tempfile
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from meme.errors import UserError
from meme.scoring.features.resize import INCEPTION_SIDE, resized
from meme.scoring.features.space import SPATIAL_CHANNELS, FeatureSpace, Views, file_sha256
from meme.support.files import INCEPTION_VARIABLE, NO_FILE, cache_folder, expanded, written_whole
from meme.support.seeding import generator
from meme.support.torchvision_compat import make_torchvision_importable

INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
CLEAN_FID_PLACE = Path("." if platform.system() == "Windows" else "/tmp") / INCEPTION_FILE
FETCH_TIMEOUT_S = 10
HOW_TO_PROVIDE = f"give clean-fid's {INCEPTION_FILE} by inception_weights or the variable MEME_INCEPTION"

DIM = 2048
SPATIAL_BLOCK, SPATIAL_SIDE = "mixed_6", 17
TOLERANCE = 1e-4  # relative: by how much the rearranged network may differ from the file's, which is some 1e-6


class _Inception(nn.Module):
    """Resizing and network of clean-fid's "clean" mode: what it computes for the same PNG files."""

    def __init__(self, trunk: nn.Module, spatial: bool, to_classes: Tensor | None):
        super().__init__()
        self.trunk = trunk
        self.spatial = spatial
        self.to_classes = to_classes  # (K, 2048)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.views(pixels).pooled

    def views(self, pixels: Tensor) -> Views:
        x = resized(pixels).sub_(128).div_(128)  # as clean-fid, which follows the file
        x = x.expand(-1, 3, -1, -1)  # grey as three equal channels, like PIL's convert("RGB")
        pooled, spatial = self.trunk(x.contiguous(memory_format=torch.channels_last))
        return Views(pooled, spatial if self.spatial else None, self._probabilities(pooled))

    def _probabilities(self, pooled: Tensor) -> Tensor | None:
        # Without the bias, as in the original inception score's network, and as ADM and StyleGAN have it.
        return None if self.to_classes is None else (pooled @ self.to_classes.T).softmax(dim=1)


class _Trunk(nn.Module):
    """(B, 3, 299, 299) in [-1, 1] -> pooled features (B, 2048) and the first few channels of what lies between the two halves."""

    def __init__(self, before: nn.Module, after: nn.Module, channels: int):
        super().__init__()
        self.before = before
        self.after = after
        self.channels = channels

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.before(x)
        pooled = self.after(x)
        return pooled.view(pooled.shape[0], 2048), x[:, : self.channels].flatten(1)


def inception_space(weights: Path | None, device: torch.device) -> FeatureSpace:
    """Return the space of this TorchScript file, with spatial features and classes if they are found in it.

    Raises UserError where there is no file, or it is not Inception's.
    """
    if weights is None:
        raise UserError(f"features: Inception's weights are neither in place nor to be fetched; {HOW_TO_PROVIDE}")
    try:
        network = _network(_clean_fid_inception(weights), device)
    except (RuntimeError, AttributeError, ValueError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"inception_weights: {weights} is not Inception as TorchScript ({reason})") from error
    return FeatureSpace(
        kind="inception",
        name="inception-v3 (clean-fid)",
        feature_id=f"inception-{file_sha256(weights)[:16]}",
        dim=DIM,
        network=network,
        device=device,
        spatial_dim=SPATIAL_CHANNELS * SPATIAL_SIDE**2 if network.spatial else None,
        classes=None if network.to_classes is None else len(network.to_classes),
    )


def _clean_fid_inception(weights: Path) -> Any:
    make_torchvision_importable()
    from cleanfid.inception_torchscript import InceptionV3W

    # The class wants a folder in which the file has one certain name.
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / INCEPTION_FILE).symlink_to(weights.resolve())
        return InceptionV3W(folder, download=False).eval().requires_grad_(False)


@torch.no_grad()
def _network(inception: Any, device: torch.device) -> _Inception:
    probe = torch.rand(2, 3, INCEPTION_SIDE, INCEPTION_SIDE, generator=generator(0, "probe")) * 2 - 1
    pooled = inception.layers(probe).view(len(probe), DIM)
    trunk = _trunk_with_middle(inception.layers, probe, pooled)
    spatial = trunk is not None
    trunk = trunk or torch.jit.script(_Trunk(nn.Identity(), inception.layers, 0).eval())
    # Elsewhere than on CPUs the rearrangement is not measured.
    trunk = _rearranged(trunk, probe) if device.type == "cpu" else trunk.to(device)
    weight = getattr(getattr(inception.base, "output", None), "weight", None)
    to_classes = weight.to(device) if isinstance(weight, Tensor) and weight.shape[1:] == (DIM,) else None
    return _Inception(trunk, spatial, to_classes)


def _trunk_with_middle(layers: nn.Module, probe: Tensor, pooled: Tensor) -> nn.Module | None:
    """Return the file's layers one after the other, with access to ``mixed_6``. Return None unless that is the layer that ADM's
    evaluator uses.

    ADM uses the 1x1 convolution ``mixed_6/conv`` at 17 x 17 (Dhariwal and Nichol 2021), which is first in the block's
    concatenation. The probe tests whether it is so here, and whether the layers do follow each other.
    """
    blocks: dict[str, Any] = dict(layers.named_children())
    if SPATIAL_BLOCK not in blocks:
        return None
    cut = list(blocks).index(SPATIAL_BLOCK)
    before, (block, *after) = nn.Sequential(*list(blocks.values())[:cut]), list(blocks.values())[cut:]
    trunk = torch.jit.script(_Trunk(nn.Sequential(before, block), nn.Sequential(*after), SPATIAL_CHANNELS).eval())
    try:
        found, spatial = trunk(probe)
        branch = block.conv(before(probe))
    except (RuntimeError, AttributeError):
        return None
    is_middle = branch.shape[2:] == (SPATIAL_SIDE, SPATIAL_SIDE) and _agree(spatial, branch[:, :SPATIAL_CHANNELS].flatten(1))
    return trunk if is_middle and _agree(found, pooled) else None


def _agree(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and (found - expected).norm() <= TOLERANCE * expected.norm()


def _rearranged(trunk: nn.Module, probe: Tensor) -> nn.Module:
    """Return the same function, faster by a third on a CPU, or ``trunk`` itself where that is not possible.

    Batch norms are folded into convolutions, and nothing forces activations out of the channels-last layout.
    """
    expected = trunk(probe)
    try:
        frozen = torch.jit.freeze(trunk, optimize_numerics=False)
        for node in [*frozen.graph.findAllNodes("aten::to"), *frozen.graph.findAllNodes("aten::contiguous")]:
            source = next(node.inputs())
            # The file casts its weights to the type of the image, float32 like them; folding needs constants.
            if node.kind() == "aten::contiguous" or source.node().kind() == "prim::Constant":
                node.output().replaceAllUsesWith(source)
        torch.jit.run_frozen_optimizations(frozen)
        agrees = all(map(_agree, frozen(probe), expected))
    except (RuntimeError, AttributeError):
        return trunk
    return frozen if agrees else trunk


def find_inception(given: Path | None) -> Path | None:
    """Find the published weights where someone named them or in a known place; return None if there are none.

    TorchScript is a program, so no other file is opened. ``$MEME_INCEPTION_SHA256`` may name the digest of one more trusted
    file, such as a conversion of one's own. Raises UserError where the file named, as an argument or by $MEME_INCEPTION, is
    missing or is another file.
    """
    setting = os.environ.get(INCEPTION_VARIABLE)
    if given is not None:
        return _existing(expanded(given), "inception_weights")
    if setting == NO_FILE:
        return None
    if setting:
        return _existing(expanded(setting), "inception_weights (from MEME_INCEPTION)")
    kept = cache_folder() / INCEPTION_FILE
    for place in (CLEAN_FID_PLACE, kept):
        # clean-fid's own download leaves half a file when it is cut off, and anyone may write to /tmp.
        if place.is_file() and file_sha256(place) in _trusted():
            return place
    return _fetch(kept)


def _trusted() -> set[str]:
    return {INCEPTION_SHA256, os.environ.get("MEME_INCEPTION_SHA256", "").lower()}


def _existing(path: Path, field: str) -> Path:
    if not os.path.isfile(path):  # which says no, where a Path raises, to a name that is too long
        raise UserError(f"{field}: there is no file {path}")
    if (found := file_sha256(path)) not in _trusted():
        raise UserError(
            f"{field}: {path} is not Inception's published file (its SHA-256 is {found}, must be {INCEPTION_SHA256}), and "
            "TorchScript is a program; MEME_INCEPTION_SHA256 may name the digest of another file to trust"
        )
    return path


def _fetch(target: Path) -> Path | None:
    """Try once to download the weights to ``target``; None where the network or the content fails."""
    make_torchvision_importable()
    from cleanfid.downloads_helper import inception_url

    with suppress(OSError, http.client.HTTPException), written_whole(target) as partial:
        with urllib.request.urlopen(inception_url, timeout=FETCH_TIMEOUT_S) as response, partial.open("wb") as file:
            shutil.copyfileobj(response, file)
        if file_sha256(partial) != INCEPTION_SHA256:
            raise OSError("not the published file")
        return target
    return None
