"""Images are mirrored in training where the config says so, and latents are those of the mirrored images."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from meme.config.presets import preset, preset_names
from meme.config.schema import FirstStageConfig, ImageConfig
from meme.data import latents as latents_module
from meme.data.images import batch_indices, open_images
from meme.data.latents import latents_of
from meme.pipeline import training_data
from meme.training.interval_loss import hold_out
from meme.training.trainer import Training

PLAIN = preset("digits-meme").with_(training={"batch_size": 64})
FLIPPED = PLAIN.with_(training={"flip": True})


@pytest.fixture(scope="module")
def images():
    return open_images("digits", size=8, channels=1)


def batches(config, data, steps=range(20)):
    training = Training(config, 1, data, "cpu")
    for step in steps:
        training.step = step
        yield training.batch()


def test_half_of_the_images_are_mirrored_and_all_else_is_as_it_was(images):
    share = []
    for (plain, *others), (flipped, *same) in zip(batches(PLAIN, images), batches(FLIPPED, images), strict=True):
        assert all(map(torch.equal, others[:2], same[:2]))
        mirrored = (flipped != plain).flatten(1).any(dim=1)  # no digit is its own mirror image
        assert torch.equal(flipped[mirrored], plain[mirrored].flip(-1))
        share.append(mirrored)
    assert torch.stack(share).float().mean().item() == pytest.approx(0.5, abs=0.04)
    assert len(torch.stack(share).unique(dim=0)) == 20  # other ones in each step


def test_flips_are_a_function_of_seed_and_step(images):
    again = [batch[0] for batch in batches(FLIPPED, images, (3, 3))]
    assert torch.equal(*again)
    other = next(batches(FLIPPED.with_(training={"seed": 1}), images, (3,)))[0]
    assert not torch.equal(other, again[0])


def test_parts_of_a_data_set_are_mirrored_as_the_whole(images):
    train, _ = hold_out(images)
    assert torch.equal(train.mirrored([2, 5]), images.tensor(train.indices[[2, 5]]).flip(-1))


class Stage:
    """A first stage that tells left from right: its one latent is the brightness of the left half."""

    id, latent_shape = "left", (1, 2, 2)

    def __init__(self):
        self.encoded = 0

    def encode(self, pixels):
        self.encoded += len(pixels)
        return pixels[..., :4].float().mean(dim=(1, 2, 3)).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2)


@pytest.fixture
def stage(monkeypatch, tmp_path):
    monkeypatch.setenv("MEME_CACHE", str(tmp_path))
    found = Stage()
    monkeypatch.setattr(latents_module, "open_first_stage", lambda *arguments: found)
    return found


def encoded(images, **options):
    return latents_of(images, FirstStageConfig(), ImageConfig(channels=1, size=2), **options)


def test_latents_are_cached_in_both_versions_where_flips_are_on(images, stage, tmp_path):
    plain = encoded(images)
    assert stage.encoded == len(images)
    with pytest.raises(ValueError, match="were not asked for"):
        plain.mirrored([0])
    both = encoded(images, flip=True)
    assert stage.encoded == 2 * len(images)
    encoded(images, flip=True)
    assert stage.encoded == 2 * len(images)
    assert (both.content_id, both.scale_factor) == (plain.content_id, plain.scale_factor)
    right = images.pixels[:3, ..., 4:].astype(np.float32).mean(axis=(1, 2, 3))
    torch.testing.assert_close(both.mirrored([0, 1, 2])[:, 0, 0, 0], torch.from_numpy(right) * both.scale_factor)
    assert torch.equal(both.tensor([0, 1]), plain.tensor([0, 1]))


def test_a_training_on_latents_sees_those_of_mirrored_images(images, stage):
    data = encoded(images, flip=True)
    training = SimpleNamespace(config=FLIPPED, data=data, step=7)
    indices = batch_indices(len(data), 64, FLIPPED.training.seed, 7)
    x_0 = Training._images(training, indices)
    mirrored = (x_0 != data.tensor(indices)).flatten(1).any(dim=1)
    assert 15 < mirrored.sum() < 50
    assert torch.equal(x_0[mirrored], data.mirrored(indices[mirrored.numpy()]))


def test_the_config_says_whether_mirrored_latents_are_made(images, monkeypatch):
    asked = []
    monkeypatch.setattr("meme.pipeline.latents_of", lambda *arguments, flip, **options: asked.append(flip))
    config = preset("ffhq-meme")
    for flip in (False, True):
        training_data(config.with_(training={"flip": flip}), images)
    assert asked == [False, True]


def test_only_the_presets_whose_reference_flips_do():
    flipping = {name for name in preset_names() if preset(name).training.flip}
    assert flipping == {name for name in preset_names() if name.startswith("celeba64-")}
    assert "flip" not in preset("digits-meme").to_yaml()
