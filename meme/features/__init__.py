"""Feature spaces in which sets of images are compared; a score means nothing without the name of its space.

``inception``: clean-fid's Inception and resizing, the FID of papers. ``classifier``: a small network trained once on
the data's own labels. ``random``: a fixed random network, which ranks similarly away from ImageNet (Naeem et al.
2020, 2002.09797). Shapes: ``B`` images, ``C`` channels, ``H W`` space, ``D`` features.
"""

import hashlib
import http.client
import json
import os
import platform
import shutil
import tempfile
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional as F

from meme.data import Images
from meme.errors import UserError
from meme.files import cache_folder, write_text, written_whole
from meme.seeding import derive_seed, generator
from meme.torchvision_compat import make_torchvision_importable

FeatureKind = Literal["auto", "inception", "classifier", "random"]
OnMessage = Callable[[str], None]

INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
CLEAN_FID_PLACE = Path("." if platform.system() == "Windows" else "/tmp") / INCEPTION_FILE
SMALLEST_FOR_INCEPTION = 32  # pixels; below, its 299-pixel input is nearly all interpolation
FETCH_TIMEOUT_S = 10
HOW_TO_PROVIDE = f"give clean-fid's {INCEPTION_FILE} by inception_weights or the variable MEME_INCEPTION"

CLASSIFIER_RECIPE = "classifier-v1"  # part of the cache's key: raise it with any change of network or training
RANDOM_RECIPE = "random-conv-v1"


@dataclass(frozen=True)
class FeatureSpace:
    """A frozen network that turns images into features.

    kind: what was chosen, never ``auto``; name: shown beside every score; feature_id: hash of everything that determines the
    features; dim: D.
    """

    kind: FeatureKind
    name: str
    feature_id: str
    dim: int
    network: nn.Module
    device: torch.device

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (B, C, H, W) -> float32 (B, D) on this space's device."""
        # Without TF32 a GPU's features equal a CPU's up to float32 rounding, so cached statistics serve both.
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            return self.network(pixels.to(self.device)).float()


def choose_features(
    kind: FeatureKind,
    images: Images,
    *,
    inception_weights: Path | None = None,
    device: torch.device | str = "cpu",
    on_message: OnMessage = lambda _: None,
) -> FeatureSpace:
    """The feature space of this kind for these images.

    ``auto`` takes Inception when its weights are in place or can be fetched and images have at least 32 pixels a side,
    else a classifier when there are labels, else the random network, and says which and why in one message.

    Weights come from ``inception_weights``, else ``$MEME_INCEPTION`` ("off": neither looked for nor fetched), else
    clean-fid's fixed place, else our cache, else one download into our cache.

    Raises UserError for an unknown kind, weights that cannot be had or read, or a classifier without labels.
    """
    if kind not in get_args(FeatureKind):
        raise UserError(f"features: {kind!r} is not one of {', '.join(get_args(FeatureKind))}")
    device = torch.device(device)
    wants_inception = kind == "inception" or (kind == "auto" and _side(images) >= SMALLEST_FOR_INCEPTION)
    weights = _find_inception(inception_weights) if wants_inception else None
    if kind == "auto":
        kind, reason = _automatic_kind(images, weights)
        on_message(f"Features: {kind}, because {reason}")
    if kind == "inception":
        return _inception_space(weights, device)
    if kind == "classifier":
        return _classifier_space(images, device, on_message)
    return _random_space(images.pixels.shape[1], device)


def _automatic_kind(images: Images, weights: Path | None) -> tuple[FeatureKind, str]:
    if weights is not None:
        return "inception", f"its weights are at {weights}"
    if _side(images) < SMALLEST_FOR_INCEPTION:
        reason = f"images of {_side(images)} pixels are too small for Inception"
    else:
        reason = f"Inception's weights are not at hand ({HOW_TO_PROVIDE})"
    if _can_classify(images):
        return "classifier", reason
    return "random", f"{reason} and there are no labels of two classes or more"


def _side(images: Images) -> int:
    return min(images.pixels.shape[2:])


# --- Inception ------------------------------------------------------------------------------------


class _CleanInception(nn.Module):
    """clean-fid's resizing, image by image on the CPU, then its Inception: what it computes for the same PNG files."""

    def __init__(self, inception: nn.Module):
        super().__init__()
        from cleanfid.resize import build_resizer

        self.inception = inception
        self.resize = build_resizer("clean")

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        colour = pixels.expand(-1, 3, -1, -1)  # grey as three equal channels, like PIL's convert("RGB")
        images = colour.permute(0, 2, 3, 1).cpu().numpy()
        resized = torch.from_numpy(np.stack([self.resize(image) for image in images]))
        return self.inception(resized.permute(0, 3, 1, 2).contiguous().to(pixels.device))


def _inception_space(weights: Path | None, device: torch.device) -> FeatureSpace:
    if weights is None:
        raise UserError(f"features: Inception's weights are neither in place nor to be fetched; {HOW_TO_PROVIDE}")
    make_torchvision_importable()
    from cleanfid.inception_torchscript import InceptionV3W

    # The class wants a folder in which the file has one certain name.
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / INCEPTION_FILE).symlink_to(weights.resolve())
        try:
            inception = InceptionV3W(folder, download=False)
        except (RuntimeError, AttributeError, ValueError, OSError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"inception_weights: {weights} is not Inception as TorchScript ({reason})") from error
    network = _CleanInception(inception).eval().to(device)
    return FeatureSpace("inception", "inception-v3 (clean-fid)", f"inception-{_sha256(weights)[:16]}", 2048, network, device)


def _find_inception(given: Path | None) -> Path | None:
    """A weights file someone named, or one in a known place whose content is the published one; None if neither."""
    setting = os.environ.get("MEME_INCEPTION")
    if given is not None:
        return _existing(Path(given), "inception_weights")
    if setting == "off":
        return None
    if setting:
        return _existing(Path(setting), "inception_weights (from MEME_INCEPTION)")
    kept = cache_folder() / INCEPTION_FILE
    for place in (CLEAN_FID_PLACE, kept):
        # clean-fid's own download leaves half a file when it is cut off, and anyone may write to /tmp.
        if place.is_file() and _sha256(place) == INCEPTION_SHA256:
            return place
    return _fetch(kept)


def _existing(path: Path, field: str) -> Path:
    if not path.is_file():
        raise UserError(f"{field}: there is no file {path}")
    return path


def _fetch(target: Path) -> Path | None:
    """Try once to download the weights to ``target``; None where the network or the content fails."""
    make_torchvision_importable()
    from cleanfid.downloads_helper import inception_url

    with suppress(OSError, http.client.HTTPException), written_whole(target) as partial:
        with urllib.request.urlopen(inception_url, timeout=FETCH_TIMEOUT_S) as response, partial.open("wb") as file:
            shutil.copyfileobj(response, file)
        if _sha256(partial) != INCEPTION_SHA256:
            raise OSError("not the published file")
        return target
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- Classifier -----------------------------------------------------------------------------------

BATCH = 128
LEARNING_RATE = 1e-2
MIN_STEPS, MAX_STEPS, EPOCHS = 300, 1200, 30
HELD_OUT_SHARE = 10  # one image in so many judges the classifier and is never trained on


class _Normalized(nn.Module):
    """uint8 pixels to float32 in [-1, 1], the range the small networks below take."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float() / 127.5 - 1


def _embedding(channels: int, side: int, dim: int) -> nn.Sequential:
    """(B, C, H, W) -> (B, dim): halve to about 4 x 4, narrow where the image is large, then average."""
    halvings = max(1, round(np.log2(side / 4)))
    layers: list[nn.Module] = [_Normalized()]
    for level in range(halvings):
        width = max(16, dim >> (halvings - 1 - level))
        layers += _convolution(channels, width, stride=2)
        if level > 0 or halvings == 1:  # at the largest size a second convolution would cost more than all others
            layers += _convolution(width, width, stride=1)
        channels = width
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    # Faster on CPUs, and set before training and loading alike: the layout decides the order of sums, so the last bits.
    return network.to(memory_format=torch.channels_last)


def _convolution(channels: int, width: int, stride: int) -> list[nn.Module]:
    # SiLU rather than ReLU: a unit that is dead on all images would make the covariance singular.
    return [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.SiLU()]


def _can_classify(images: Images) -> bool:
    return images.labels is not None and len(np.unique(images.labels)) > 1


def _classifier_space(images: Images, device: torch.device, on_message: OnMessage) -> FeatureSpace:
    if not _can_classify(images):
        raise UserError(f"features: 'classifier' needs labels of at least two classes, which {images.name!r} lacks")
    dim = 128 if _side(images) >= 16 else 64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(0, CLASSIFIER_RECIPE))
        network = _embedding(images.pixels.shape[1], _side(images), dim)
        folder = cache_folder() / "features" / f"{CLASSIFIER_RECIPE}-{images.content_id}"
        if not _restore(network, folder):
            accuracy = _train_classifier(network, dim, images)
            _store(network, folder, images, accuracy)
            on_message(f"Training a feature classifier on {images.name} once (cached): held-out accuracy {accuracy:.1%}")
    weights_id = _sha256(folder / "weights.safetensors")[:16]
    network.eval().requires_grad_(False).to(device)
    return FeatureSpace("classifier", f"classifier({images.name})", f"{CLASSIFIER_RECIPE}-{weights_id}", dim, network, device)


def _train_classifier(embedding: nn.Module, dim: int, images: Images) -> float:
    """Train in place and return the held-out accuracy in [0, 1].

    Always on the CPU, so that the space does not depend on the device. Another CPU or number of threads still rounds
    differently, hence the space's id is a hash of the weights themselves.
    """
    labels = torch.tensor(images.labels)
    order = torch.randperm(len(labels), generator=generator(0, "held-out"))
    held_out, train = order[::HELD_OUT_SHARE], order[torch.arange(len(order)) % HELD_OUT_SHARE != 0]
    network = nn.Sequential(embedding, nn.Linear(dim, int(labels.max()) + 1))
    steps = min(max(MIN_STEPS, EPOCHS * len(train) // BATCH), MAX_STEPS)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps)
    draw = generator(0, "batches")
    for _ in range(steps):
        batch = train[torch.randint(len(train), (BATCH,), generator=draw)]
        loss = F.cross_entropy(network(_shifted(_pixels(images, batch), draw)), labels[batch], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return _held_out_accuracy(network.eval(), images, held_out)


def _pixels(images: Images, indices: torch.Tensor) -> torch.Tensor:
    # Indexing copies, so a read-only memory map serves as well as an array.
    return torch.from_numpy(images.pixels[indices.numpy()])


def _shifted(pixels: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """The batch moved by up to an eighth of its size, the one change that keeps any data's classes (flips do not)."""
    height, width = pixels.shape[2:]
    reach = max(1, min(height, width) // 8)
    top, left = torch.randint(2 * reach + 1, (2,), generator=draw).tolist()
    padded = F.pad(pixels.float(), (reach,) * 4, mode="replicate")
    return padded[:, :, top : top + height, left : left + width]


@torch.no_grad()
def _held_out_accuracy(network: nn.Module, images: Images, held_out: torch.Tensor) -> float:
    guesses = torch.cat([network(_pixels(images, batch)).argmax(1) for batch in held_out.split(256)])
    return (guesses.numpy() == images.labels[held_out.numpy()]).mean().item()


def _store(network: nn.Module, folder: Path, images: Images, accuracy: float) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    with written_whole(folder / "weights.safetensors") as partial:
        partial.write_bytes(safetensors.torch.save(tensors))
    metadata = {
        "recipe": CLASSIFIER_RECIPE,
        "data": images.name,
        "content_id": images.content_id,
        "held_out_accuracy": accuracy,
        "weights_sha256": _sha256(folder / "weights.safetensors"),
    }
    write_text(folder / "metadata.json", json.dumps(metadata, indent=2))


def _restore(network: nn.Module, folder: Path) -> bool:
    """Load the cached weights if they are whole; False if they are missing, damaged or of another network."""
    weights = folder / "weights.safetensors"
    try:
        metadata = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
        if metadata["weights_sha256"] != _sha256(weights):
            return False
        network.load_state_dict(safetensors.torch.load_file(weights))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError):
        return False
    return True


# --- Random network -------------------------------------------------------------------------------


SLOPE = 0.2  # of the leaky ReLU


class _RandomConvolutions(nn.Module):
    """Four levels of 3x3 convolutions, each half the size of the last; the spatial means of all levels, D = 128."""

    WIDTHS = (16, 32, 32, 48)

    def __init__(self, channels: int):
        super().__init__()
        self.normalized = _Normalized()
        draw = generator(0, RANDOM_RECIPE, channels)
        for level, width in enumerate(self.WIDTHS):
            # He et al. 2015: keeps the variance through the leaky ReLU, which unlike ReLU leaves no feature constant.
            weight = torch.randn(width, channels, 3, 3, generator=draw) * (2 / (1 + SLOPE**2) / (9 * channels)) ** 0.5
            self.register_buffer(f"weight{level}", weight)
            channels = width

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x, means = self.normalized(pixels), []
        for level in range(len(self.WIDTHS)):
            x = F.conv2d(x, self.get_buffer(f"weight{level}"), stride=1 if level == 0 else 2, padding=1)
            x = F.leaky_relu(x, SLOPE)
            means.append(x.mean(dim=(2, 3)))
        return torch.cat(means, dim=1)


def _random_space(channels: int, device: torch.device) -> FeatureSpace:
    network = _RandomConvolutions(channels).to(device)
    return FeatureSpace(
        "random", "random-conv", f"{RANDOM_RECIPE}-{channels}-channels", sum(_RandomConvolutions.WIDTHS), network, device
    )
