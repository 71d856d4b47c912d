"""Feature spaces: what is chosen, that it is deterministic and cached, and what it sees of an image."""

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor

import filelock
import numpy as np
import pytest
import safetensors.torch
import torch
from inception_files import TinyInception, noise_images, saved, trusted
from torch import Tensor

import meme.scoring.features
from meme.data.images import Images, open_images
from meme.errors import UserError
from meme.scoring.features import choose_features, classifier, inception
from meme.scoring.metrics import frechet_distance, statistics
from meme.support.files import cache_folder


@pytest.fixture(scope="module", autouse=True)
def _offline(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEME_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("MEME_INCEPTION", "off")
        yield


@pytest.fixture(scope="module")
def digits(_offline) -> Images:
    return open_images("digits", size=8, channels=1)


@pytest.fixture(scope="module")
def trained(digits):
    """The classifier's space and the messages its training gave."""
    messages: list[str] = []
    return choose_features("classifier", digits, on_message=messages.append), messages


@pytest.fixture
def quick_training(monkeypatch):
    monkeypatch.setattr(classifier, "MIN_STEPS", 2)
    monkeypatch.setattr(classifier, "MAX_STEPS", 2)


# --- Classifier ------------------------------------------------------------------------------------


def test_digits_classifier_is_accurate_and_trained_once(digits, trained, monkeypatch):
    space, messages = trained
    assert len(messages) == 1 and messages[0].startswith("Training a feature classifier on digits once (cached)")
    (metadata,) = (cache_folder() / "features").glob(f"*{digits.content_id}/metadata.json")
    assert json.loads(metadata.read_text())["held_out_accuracy"] > 0.97
    monkeypatch.setattr(classifier, "_train_classifier", lambda *_: pytest.fail("trained again"))
    again = choose_features("classifier", digits, on_message=pytest.fail)
    pixels = torch.tensor(digits.pixels[:50])
    assert (again.name, again.feature_id, again.dim) == ("classifier(digits)", space.feature_id, 64)
    assert torch.equal(again(pixels), space(pixels))


def test_classifier_knows_the_classes_again_after_loading(digits, trained):
    space = choose_features("classifier", digits)
    probabilities = space.views(torch.tensor(digits.pixels)).probabilities
    assert space.classes == probabilities.shape[1] == 10
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(len(digits)))
    assert (probabilities.argmax(dim=1).numpy() == digits.labels).mean() > 0.97


def test_a_cache_without_the_classes_is_trained_again(digits, trained, quick_training, monkeypatch, tmp_path):
    """As one that an older version left under the name of this recipe would be."""
    monkeypatch.setenv("MEME_CACHE", str(tmp_path))
    first = choose_features("classifier", digits)
    (folder,) = (tmp_path / "features").iterdir()
    tensors = safetensors.torch.load_file(folder / "weights.safetensors")
    safetensors.torch.save_file(
        {name: each for name, each in tensors.items() if "head" not in name}, folder / "weights.safetensors"
    )
    digest = inception.file_sha256(folder / "weights.safetensors")
    (folder / "metadata.json").write_text(json.dumps({"weights_sha256": digest}))
    messages: list[str] = []
    assert choose_features("classifier", digits, on_message=messages.append).feature_id == first.feature_id
    assert len(messages) == 1


def test_damaged_cache_is_trained_again_to_the_same_features(quick_training, monkeypatch, tmp_path):
    monkeypatch.setenv("MEME_CACHE", str(tmp_path))
    images, messages = noise_images(size=16), []
    first = choose_features("classifier", images)
    for damage in ("weights.safetensors", "metadata.json"):
        (path,) = tmp_path.rglob(damage)
        path.write_bytes(path.read_bytes()[:-9])
        assert choose_features("classifier", images, on_message=messages.append).feature_id == first.feature_id
    assert len(messages) == 2


def test_who_finds_it_being_trained_waits_and_trains_nothing(quick_training, monkeypatch, tmp_path):
    monkeypatch.setenv("MEME_CACHE", str(tmp_path))
    images = noise_images(size=16)
    first = choose_features("classifier", images)
    (folder,) = (tmp_path / "features").iterdir()
    kept = {path.name: path.read_bytes() for path in folder.glob("*.*") if path.name != ".lock"}
    for name in kept:
        (folder / name).unlink()
    monkeypatch.setattr(classifier, "_train_classifier", lambda *_: pytest.fail("trained again"))
    with ThreadPoolExecutor(1) as pool:
        with filelock.FileLock(folder / ".lock"):  # as the process that trains it holds
            waiting = pool.submit(choose_features, "classifier", images)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.5)
            for name, content in kept.items():
                (folder / name).write_bytes(content)
        assert waiting.result(timeout=20).feature_id == first.feature_id


def test_training_leaves_the_global_random_state_alone(quick_training, monkeypatch, tmp_path):
    monkeypatch.setenv("MEME_CACHE", str(tmp_path))
    before = torch.get_rng_state()
    choose_features("classifier", noise_images())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("labels", [None, np.zeros(24, dtype=np.int64)])
def test_classifier_without_two_classes_is_refused(labels):
    images = dataclasses.replace(noise_images(), labels=labels)
    with pytest.raises(UserError, match="labels of at least two classes"):
        choose_features("classifier", images)


# --- All kinds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["classifier", "random"])
@pytest.mark.parametrize(("size", "channels"), [(8, 3), (33, 1), (256, 3)])
def test_any_size_and_channels(quick_training, kind, size, channels):
    images = noise_images(count=6, size=size, channels=channels)
    space = choose_features(kind, images)
    found = space(torch.from_numpy(images.pixels))
    assert found.shape == (6, space.dim) and found.dtype == torch.float32 and not found.requires_grad
    np.testing.assert_allclose(space(torch.from_numpy(images.pixels[:1])).numpy(), found[:1], rtol=1e-3, atol=1e-5)
    views = space.views(torch.from_numpy(images.pixels))
    assert torch.equal(views.pooled, found)
    assert views.spatial.shape == (6, space.spatial_dim) and 100 < space.spatial_dim < 1000
    assert views.spatial.dtype == torch.float32 and not views.spatial.requires_grad
    assert (views.probabilities is None) == (space.classes is None) == (kind == "random")


@pytest.mark.parametrize("kind", ["classifier", "random", "inception"])
def test_images_are_seen_in_chunks_but_all_of_them_in_order(quick_training, kind, tmp_path, monkeypatch):
    images = noise_images(count=7)
    weights = trusted(saved(tmp_path / "weights.pt", TinyInception()), monkeypatch)
    space = choose_features(kind, images, inception_weights=weights)
    pixels, chunked = torch.from_numpy(images.pixels), dataclasses.replace(space, chunk=3)
    torch.testing.assert_close(chunked(pixels), space(pixels), rtol=1e-4, atol=1e-5)
    for found, expected in zip(chunked.views(pixels), space.views(pixels), strict=True):
        assert (found is None) == (expected is None)
        assert found is None or torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["classifier", "random"])
def test_spatial_features_see_where_and_pooled_ones_hardly(quick_training, kind):
    images = noise_images(count=2, size=32)
    space = choose_features(kind, images)
    # A bright patch in the middle of either half: the same image, rotated by 180 degrees and mirrored.
    pixels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    pixels[0, :, 12:20, 4:12] = pixels[1, :, 12:20, 20:28] = 255
    views = space.views(pixels)

    def change(values: Tensor) -> float:
        return ((values[0] - values[1]).norm() / values.norm()).item()

    assert change(views.spatial) > 5 * change(views.pooled)


def test_random_features_are_the_same_every_time(digits):
    first, second = choose_features("random", digits), choose_features("random", digits)
    pixels = torch.tensor(digits.pixels[:20])
    assert first.feature_id == second.feature_id and torch.equal(first(pixels), second(pixels))
    assert first(pixels).std(dim=0).min() > 0
    assert choose_features("random", noise_images()).feature_id != first.feature_id


@pytest.mark.parametrize("kind", ["classifier", "random"])
def test_distance_grows_with_noise(digits, trained, kind):
    space = choose_features(kind, digits)
    clean = torch.tensor(digits.pixels[:600]).float()
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    noised = [(clean + sd * noise).clip(0, 255).to(torch.uint8) for sd in (0, 8, 16, 32, 64, 128)]
    reference = statistics([space(torch.tensor(digits.pixels))])
    distances = [frechet_distance(statistics([space(pixels)]), reference) for pixels in noised]
    assert distances == sorted(distances) and distances[-1] > 10 * distances[0]


def test_auto_takes_inception_for_large_images_with_one_message(tmp_path, monkeypatch):
    weights = trusted(saved(tmp_path / "weights.pt", TinyInception()), monkeypatch)
    messages: list[str] = []
    space = choose_features("auto", noise_images(), inception_weights=weights, on_message=messages.append)
    assert space.name == "inception-v3 (clean-fid)" and len(messages) == 1 and str(weights) in messages[0]


@pytest.mark.parametrize("size", [16, 32])
def test_auto_without_inception_depends_on_labels(quick_training, monkeypatch, size):
    monkeypatch.setattr(meme.scoring.features, "beats_guessing", lambda images: True)  # in two steps it learned nothing
    messages: list[str] = []
    labelled, bare = noise_images(size=size), noise_images(size=size, labels=False)
    choose_features("classifier", labelled)
    assert choose_features("auto", labelled, on_message=messages.append).name == "classifier(noise)"
    assert choose_features("auto", bare, on_message=messages.append).name == "random-conv"
    assert len(messages) == 2
    why = "too small" if size < 32 else "not at hand"
    assert all(why in message for message in messages) and "no labels" in messages[1]


def test_unknown_kind_names_the_allowed_ones(digits):
    with pytest.raises(UserError, match="auto, inception, classifier, random"):
        choose_features("vgg", digits)
