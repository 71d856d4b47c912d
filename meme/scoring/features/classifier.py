"""The feature space of a small classifier, trained once on the data's own labels and cached.

Shapes: ``B`` images, ``C`` channels, ``H W`` space, ``D`` features, ``S`` spatial features, ``K`` classes.
"""

import json
from pathlib import Path

import filelock
import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from scipy.stats import binom
from torch import Tensor, nn
from torch.nn import functional as F

from meme.data.images import Images
from meme.errors import UserError
from meme.network.blocks import channels_last
from meme.scoring.features.space import SPATIAL_CHANNELS, FeatureSpace, OnMessage, Views, file_sha256
from meme.support.files import cache_folder, write_text, written_whole
from meme.support.seeding import derive_seed, generator

CLASSIFIER_RECIPE = "classifier-v2"  # part of the cache's key: raise it with any change of network or training
INITIAL_WEIGHTS = derive_seed(0, "classifier-v1")  # unlike the recipe it stays, and with it every FID reported so far

BATCH = 128
LEARNING_RATE = 1e-2
MIN_STEPS, MAX_STEPS, EPOCHS = 300, 1200, 30
HELD_OUT_SHARE = 10  # one image of HELD_OUT_SHARE judges the classifier and is never trained on
MOST_CHANCE = 0.01  # probability that guessing is right as often as a classifier that is believed

_METADATA = "metadata.json"


class _Normalized(nn.Module):
    """uint8 pixels to float32 in [-1, 1]."""

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.float() / 127.5 - 1


class _Classifier(nn.Module):
    """uint8 (B, C, H, W) -> features (B, D); a linear head gives their classes."""

    def __init__(self, images: Images):
        super().__init__()
        channels, side = images.pixels.shape[1], min(images.pixels.shape[2:])
        self.dim = 128 if side >= 16 else 64
        self.classes = int(images.known_labels.max()) + 1
        self.embedding = _embedding(channels, side, self.dim)
        self.head = nn.Linear(self.dim, self.classes)
        self._middle = _middle(self.embedding)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.embedding(pixels)

    def views(self, pixels: Tensor) -> Views:
        x = self.embedding[: self._middle](pixels)
        pooled = self.embedding[self._middle :](x)
        return Views(pooled, x[:, :SPATIAL_CHANNELS].flatten(1), self.head(pooled).softmax(dim=1))

    def logits(self, pixels: Tensor) -> Tensor:
        return self.head(self.embedding(pixels))


def _embedding(channels: int, side: int, dim: int) -> nn.Sequential:
    """Return layers from (B, C, H, W) to (B, dim): halve to about 4 x 4, narrow where the image is large, then average."""
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
    return channels_last(network)


def _convolution(channels: int, width: int, stride: int) -> list[nn.Module]:
    # SiLU rather than ReLU: a unit that is dead on all images would make the covariance singular.
    return [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.SiLU()]


def _middle(embedding: nn.Sequential) -> int:
    """Return the index of the last halving, whose input has about 8 x 8 pixels; where the first layer is the only halving, the
    index after it."""
    convolutions = [index for index, layer in enumerate(embedding) if isinstance(layer, nn.Conv2d)]
    halving = [index for index in convolutions if embedding[index].stride == (2, 2)][-1]
    return halving if halving > convolutions[0] else convolutions[1]


def can_classify(images: Images) -> bool:
    """Return whether there are labels of at least two classes."""
    return images.labels is not None and len(np.unique(images.labels)) > 1


def beats_guessing(images: Images) -> bool:
    """Return whether the cached classifier of these images learned what their classes look like.

    It must be right on more of the held-out images than always naming the most frequent class would be, by more than chance
    explains. Folders that are no classes, and classes of one image each, teach nothing, and distances would be arbitrary.
    """
    held_out = len(range(0, len(images), HELD_OUT_SHARE))
    guessing = np.bincount(images.known_labels).max() / len(images)
    right = round(held_out_accuracy(images) * held_out)
    return bool(binom.sf(right - 1, held_out, guessing) < MOST_CHANCE)


def held_out_accuracy(images: Images) -> float:
    """Return the share of the held-out images on which the cached classifier is right; 0 where there is none."""
    try:
        return float(json.loads((_folder(images) / _METADATA).read_text(encoding="utf-8"))["held_out_accuracy"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def _folder(images: Images) -> Path:
    return cache_folder() / "features" / f"{CLASSIFIER_RECIPE}-{images.content_id}"


def classifier_space(images: Images, device: torch.device, on_message: OnMessage) -> FeatureSpace:
    """Return the classifier's space for these images, from the cache or trained now, which ``on_message`` reports.

    Raises UserError when there are no labels of at least two classes.
    """
    if not can_classify(images):
        raise UserError(f"features: 'classifier' needs labels of at least two classes, which {images.name!r} lacks")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(INITIAL_WEIGHTS)
        network = _Classifier(images)
        folder = _folder(images)
        if not _restore(network, folder):
            _train_once(network, folder, images, on_message)
    network.eval().requires_grad_(False).to(device)
    blank = torch.zeros(1, *images.pixels.shape[1:], dtype=torch.uint8, device=device)
    return FeatureSpace(
        kind="classifier",
        name=f"classifier({images.name})",
        feature_id=f"{CLASSIFIER_RECIPE}-{file_sha256(folder / 'weights.safetensors')[:16]}",
        dim=network.dim,
        network=network,
        device=device,
        spatial_dim=network.views(blank).known_spatial.shape[1],
        classes=network.classes,
    )


def _train_once(network: _Classifier, folder: Path, images: Images, on_message: OnMessage) -> None:
    """Train ``network`` and cache it. Where another process is training it already, wait and take its result."""
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / ".lock"):
        if _restore(network, folder):
            return
        accuracy = _train_classifier(network, images)
        _store(network, folder, images, accuracy)
    on_message(f"Training a feature classifier on {images.name} once (cached): held-out accuracy {accuracy:.1%}")


def _train_classifier(network: _Classifier, images: Images) -> float:
    """Train in place and return the held-out accuracy in [0, 1].

    Training always runs on the CPU, so that the space does not depend on the device. Another CPU or number of threads still
    rounds differently, so the space's id is a hash of the weights themselves.
    """
    labels = torch.tensor(images.known_labels)
    order = torch.randperm(len(labels), generator=generator(0, "held-out"))
    held_out, train = order[::HELD_OUT_SHARE], order[torch.arange(len(order)) % HELD_OUT_SHARE != 0]
    steps = min(max(MIN_STEPS, EPOCHS * len(train) // BATCH), MAX_STEPS)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps)
    draw = generator(0, "batches")
    for _ in range(steps):
        batch = train[torch.randint(len(train), (BATCH,), generator=draw)]
        loss = F.cross_entropy(network.logits(_shifted(_pixels(images, batch), draw)), labels[batch], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return _held_out_accuracy(network.eval(), images, held_out)


def _pixels(images: Images, indices: Tensor) -> Tensor:
    # Indexing copies, so a read-only memory map serves as well as an array.
    return torch.from_numpy(images.pixels[indices.numpy()])


def _shifted(pixels: Tensor, draw: torch.Generator) -> Tensor:
    """Shift the batch by up to an eighth of its size, the one change that keeps any data's classes (flips do not)."""
    height, width = pixels.shape[2:]
    reach = max(1, min(height, width) // 8)
    top, left = torch.randint(2 * reach + 1, (2,), generator=draw).tolist()
    padded = F.pad(pixels.float(), (reach,) * 4, mode="replicate")
    return padded[:, :, top : top + height, left : left + width]


@torch.no_grad()
def _held_out_accuracy(network: _Classifier, images: Images, held_out: Tensor) -> float:
    guesses = torch.cat([network.logits(_pixels(images, batch)).argmax(1) for batch in held_out.split(256)])
    return (guesses.numpy() == images.known_labels[held_out.numpy()]).mean().item()


def _store(network: nn.Module, folder: Path, images: Images, accuracy: float) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    with written_whole(folder / "weights.safetensors") as partial:
        partial.write_bytes(safetensors.torch.save(tensors))
    metadata = {
        "recipe": CLASSIFIER_RECIPE,
        "data": images.name,
        "content_id": images.content_id,
        "held_out_accuracy": accuracy,
        "weights_sha256": file_sha256(folder / "weights.safetensors"),
    }
    write_text(folder / _METADATA, json.dumps(metadata, indent=2))


def _restore(network: nn.Module, folder: Path) -> bool:
    """Load the cached weights; return False, without loading, if they are missing, damaged or of another network."""
    weights = folder / "weights.safetensors"
    try:
        metadata = json.loads((folder / _METADATA).read_text(encoding="utf-8"))
        if metadata["weights_sha256"] != file_sha256(weights):
            return False
        kept, own = safetensors.torch.load_file(weights), network.state_dict()
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError):
        return False
    if {name: tensor.shape for name, tensor in kept.items()} != {name: tensor.shape for name, tensor in own.items()}:
        return False  # before anything is loaded: training starts from the initial weights
    network.load_state_dict(kept)
    return True
