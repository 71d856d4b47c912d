"""Ids and initial weights that files on disk hold: a new field, at its default, must change none of them."""

import hashlib
import json
from types import SimpleNamespace

import pytest

from meme.config.presets import preset
from meme.config.schema import Config
from meme.network.unet import build_expert
from meme.training.trainer import _header

DATA = SimpleNamespace(content_id="0123456789abcdef")

# Of whole configs, and (architecture, training) of their first and last experts, as they were before experts had overrides.
GOLDEN = {
    "digits-meme": ("a1f46bdf5a1a", [("480e0b362729", "073c75a5dae4"), ("255641605501", "cdf01e10faca")]),
    "digits-ldm-s": ("7014cedb6b6e", [("f1631ab8c7f3", "1a29bd62687c"), ("f1631ab8c7f3", "1a29bd62687c")]),
    "digits-iu-ldm-s": ("6b477310bcb1", [("480e0b362729", "22cad6c29f7a"), ("480e0b362729", "22cad6c29f7a")]),
    "cifar10-meme": ("2636d86dc3ce", [("d3eaf2cb6045", "3b5ebd958519"), ("e5485148d01b", "306339f6679d")]),
    "ffhq-meme": ("531f6394038d", [("e3211bd28677", "102eb303a946"), ("f6fc78c643d0", "a9bd72f16468")]),
    "ffhq-meme-hard": ("7b700d5119e2", [("e3211bd28677", "0566743f23fa"), ("f6fc78c643d0", "24200f3248a4")]),
    "celebahq-multi-expert": ("9a3decfa6e45", [("d19b9c5118fc", "527d9964a603"), ("d19b9c5118fc", "460a39d3dcd2")]),
    "celeba64-meme": ("13e9e3398992", [("53e60ff892e3", "e69f305612f4"), ("a25bdbfd8f85", "021318ed5076")]),
    "imagenet-meme": ("01c14a323b48", [("43edb66a0aff", "006312ad295c"), ("16da9ec4b799", "89eb9ad21b30")]),
}


def ids(config: Config) -> tuple[str, list[tuple[str, str]]]:
    headers = [_header(config, number, DATA, 7) for number in (1, len(config.experts))]
    return config.architecture_id, [(header["architecture"], header["training"]) for header in headers]


@pytest.mark.parametrize("name", GOLDEN)
def test_ids_are_what_they_were(name):
    assert ids(preset(name).with_(training={"flip": False})) == GOLDEN[name]  # as all presets were before images could be flipped


def test_flips_make_another_training_of_the_same_architecture():
    (before, trainings), (after, flipped) = (
        ids(preset("celeba64-meme").with_(training={"flip": each})) for each in (False, True)
    )
    assert before != after
    assert [architecture for architecture, _ in trainings] == [architecture for architecture, _ in flipped]
    assert all(one != other for (_, one), (_, other) in zip(trainings, flipped, strict=True))


# Number of tensors, digest of their names and shapes in order, and a sum over the weights in which each tensor counts otherwise.
WEIGHTS = {
    ("digits-meme", 1): (122, "7cce11653974", 323947.52022971376),
    ("digits-meme", 4): (118, "ac28c9866115", 308551.3802941436),
    ("cifar10-meme", 1): (191, "8e239187b706", 2460377.721925091),
    ("cifar10-meme", 4): (187, "9f7a5dd5fd5a", 2396886.283538606),
}


@pytest.mark.parametrize(("name", "number"), WEIGHTS)
def test_initial_weights_are_what_they_were(name, number):
    state = build_expert(preset(name), number).state_dict()
    shapes = json.dumps([(key, list(tensor.shape)) for key, tensor in state.items()])
    total = sum(float(place * tensor.double().abs().sum()) for place, tensor in enumerate(state.values(), start=1))
    count, digest, expected = WEIGHTS[name, number]
    assert (len(state), hashlib.sha256(shapes.encode()).hexdigest()[:12]) == (count, digest)
    assert total == pytest.approx(expected, rel=1e-9)
