"""Feature spaces in which sets of images are compared; a score means nothing without the name of its space.

``inception``: clean-fid's Inception and resizing, the FID of papers. ``classifier``: a small network trained once on
the data's own labels. ``random``: a fixed random network, which ranks similarly away from ImageNet (Naeem et al.
2020, 2002.09797). Each is built in a file of its own; here one is chosen.
"""

from pathlib import Path
from typing import get_args

import torch

from meme.data.images import Images
from meme.errors import UserError
from meme.scoring.features.classifier import beats_guessing, can_classify, classifier_space, held_out_accuracy
from meme.scoring.features.inception import HOW_TO_PROVIDE, find_inception, inception_space
from meme.scoring.features.random import random_space
from meme.scoring.features.space import FeatureKind, FeatureSpace, OnMessage, Views

__all__ = ["FeatureKind", "FeatureSpace", "Views", "choose_features"]

SMALLEST_FOR_INCEPTION = 32  # pixels; below, its 299-pixel input is nearly all interpolation


def choose_features(
    kind: FeatureKind,
    images: Images,
    *,
    inception_weights: Path | None = None,
    device: torch.device | str = "cpu",
    on_message: OnMessage = lambda _: None,
) -> FeatureSpace:
    """Return the feature space of this kind for these images.

    ``auto`` takes Inception when its weights are in place or can be fetched and images have at least 32 pixels a side, else a
    classifier when there are labels and it learns them better than guessing, else the random network. A message says which was
    taken and why.

    Weights are read from ``inception_weights``, else ``$MEME_INCEPTION`` ("off": neither looked for nor fetched), else
    clean-fid's fixed place, else our cache, else one download into our cache.

    Raises UserError for an unknown kind, weights that cannot be had or read, or a classifier without labels.
    """
    if kind not in get_args(FeatureKind):
        raise UserError(f"features: {kind!r} is not one of {', '.join(get_args(FeatureKind))}")
    device = torch.device(device)
    wants_inception = kind == "inception" or (kind == "auto" and _side(images) >= SMALLEST_FOR_INCEPTION)
    weights = find_inception(inception_weights) if wants_inception else None
    is_open = kind == "auto"
    if is_open:
        kind, reason = _automatic_kind(images, weights)
        on_message(f"Features: {kind}, because {reason}")
    if kind == "inception":
        return inception_space(weights, device)
    if kind == "classifier":
        space = classifier_space(images, device, on_message)
        if not is_open or beats_guessing(images):
            return space
        accuracy = f"right on {held_out_accuracy(images):.0%} of held-out images"
        on_message(f"Features: random instead, because the classifier is {accuracy}, no better than guessing the classes")
    return random_space(images, device)


def _automatic_kind(images: Images, weights: Path | None) -> tuple[FeatureKind, str]:
    if weights is not None:
        return "inception", f"its weights are at {weights}"
    if _side(images) < SMALLEST_FOR_INCEPTION:
        reason = f"images of {_side(images)} pixels are too small for Inception"
    else:
        reason = f"Inception's weights are not at hand ({HOW_TO_PROVIDE})"
    if can_classify(images):
        return "classifier", reason
    return "random", f"{reason} and there are no labels of two classes or more"


def _side(images: Images) -> int:
    return int(min(images.pixels.shape[2:]))
