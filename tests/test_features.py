"""Feature spaces: what is chosen, that it is deterministic and cached, and that Inception is clean-fid's own."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from meme import features
from meme.data import Images, open_images
from meme.errors import UserError
from meme.features import choose_features
from meme.files import cache_folder
from meme.metrics import frechet_distance, statistics
from meme.torchvision_compat import make_torchvision_importable


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
    monkeypatch.setattr(features, "MIN_STEPS", 2)
    monkeypatch.setattr(features, "MAX_STEPS", 2)


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


class _TinyLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 7, stride=6)
        self.project = nn.Linear(8 * 25, 2048)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.adaptive_avg_pool2d(torch.relu(self.convolution(x)), 5)
        return self.project(x.flatten(1))


class _TinyInception(nn.Module):
    """The interface of the TorchScript file clean-fid downloads, without its weights."""

    def __init__(self):
        super().__init__()
        self.layers = _TinyLayers()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "any name.bin"
    torch.manual_seed(0)
    torch.jit.script(_TinyInception()).save(str(path))
    return path


# --- Inception -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 48), (3, 320)])
def test_inception_equals_clean_fids_folder_pipeline(tmp_path, weights, channels, size):
    make_torchvision_importable()
    from cleanfid.fid import get_folder_features
    from cleanfid.inception_torchscript import InceptionV3W

    images = noise_images(count=4, size=size, channels=channels)
    (tmp_path / "png").mkdir()
    for index, image in enumerate(images.pixels):
        array = image[0] if channels == 1 else image.transpose(1, 2, 0)
        Image.fromarray(array).save(tmp_path / "png" / f"{index}.png")
    (tmp_path / features.INCEPTION_FILE).symlink_to(weights)
    model = InceptionV3W(str(tmp_path), download=False).eval()
    expected = get_folder_features(str(tmp_path / "png"), model, num_workers=0, device=torch.device("cpu"), verbose=False)

    space = choose_features("inception", images, inception_weights=weights)
    ours = space(torch.from_numpy(images.pixels))
    assert ours.shape == (4, space.dim) == (4, 2048) and ours.dtype == torch.float32 and not ours.requires_grad
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-5, atol=1e-5)
    assert space.name == "inception-v3 (clean-fid)"


def test_weights_that_are_missing_or_no_inception_name_the_option(tmp_path, weights, monkeypatch):
    images = noise_images()
    with pytest.raises(UserError, match="inception_weights: there is no file"):
        choose_features("inception", images, inception_weights=tmp_path / "absent.pt")
    for content in (b"not a model", weights.read_bytes()[:5000]):
        (tmp_path / "broken.pt").write_bytes(content)
        with pytest.raises(UserError, match=r"inception_weights: .*broken\.pt is not Inception"):
            choose_features("auto", images, inception_weights=tmp_path / "broken.pt")
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "other.pt"))
    with pytest.raises(UserError, match="inception_weights"):
        choose_features("inception", images, inception_weights=tmp_path / "other.pt")
    monkeypatch.setenv("MEME_INCEPTION", str(tmp_path / "absent.pt"))
    with pytest.raises(UserError, match="MEME_INCEPTION"):
        choose_features("inception", images)


def test_off_neither_looks_nor_fetches_and_the_error_says_what_to_do(weights, monkeypatch):
    monkeypatch.setattr(features, "CLEAN_FID_PLACE", weights)
    monkeypatch.setattr(features, "INCEPTION_SHA256", features._sha256(weights))
    monkeypatch.setattr(features, "_fetch", lambda _: pytest.fail("fetched"))
    with pytest.raises(UserError, match="inception_weights or the variable MEME_INCEPTION"):
        choose_features("inception", noise_images())


def test_weights_are_found_by_variable_in_clean_fids_place_and_in_the_cache(weights, monkeypatch, tmp_path):
    monkeypatch.setenv("MEME_INCEPTION", str(weights))
    assert features._find_inception(None) == weights
    monkeypatch.delenv("MEME_INCEPTION")
    monkeypatch.setenv("MEME_CACHE", str(tmp_path))
    monkeypatch.setattr(features, "INCEPTION_SHA256", features._sha256(weights))
    monkeypatch.setattr(features, "_fetch", lambda _: None)
    half = tmp_path / "half.pt"
    half.write_bytes(weights.read_bytes()[:5000])
    monkeypatch.setattr(features, "CLEAN_FID_PLACE", half)
    assert features._find_inception(None) is None
    kept = tmp_path / features.INCEPTION_FILE
    kept.write_bytes(weights.read_bytes())
    assert features._find_inception(None) == kept
    monkeypatch.setattr(features, "CLEAN_FID_PLACE", weights)
    assert features._find_inception(None) == weights


@pytest.mark.parametrize("published", [True, False])
def test_fetching_leaves_a_whole_file_or_none(weights, monkeypatch, tmp_path, published):
    monkeypatch.setattr(features.urllib.request, "urlopen", lambda url, timeout: weights.open("rb"))
    if published:
        monkeypatch.setattr(features, "INCEPTION_SHA256", features._sha256(weights))
    target = tmp_path / features.INCEPTION_FILE
    assert features._fetch(target) == (target if published else None)
    assert [path.name for path in tmp_path.iterdir()] == ([target.name] if published else [])


# --- Classifier ------------------------------------------------------------------------------------


def test_digits_classifier_is_accurate_and_trained_once(digits, trained, monkeypatch):
    space, messages = trained
    assert len(messages) == 1 and messages[0].startswith("Training a feature classifier on digits once (cached)")
    (metadata,) = (cache_folder() / "features").glob(f"*{digits.content_id}/metadata.json")
    assert json.loads(metadata.read_text())["held_out_accuracy"] > 0.97
    monkeypatch.setattr(features, "_train_classifier", lambda *_: pytest.fail("trained again"))
    again = choose_features("classifier", digits, on_message=pytest.fail)
    pixels = torch.tensor(digits.pixels[:50])
    assert (again.name, again.feature_id, again.dim) == ("classifier(digits)", space.feature_id, 64)
    assert torch.equal(again(pixels), space(pixels))


def test_damaged_cache_is_trained_again_to_the_same_features(quick_training, monkeypatch, tmp_path):
    monkeypatch.setenv("MEME_CACHE", str(tmp_path))
    images, messages = noise_images(size=16), []
    first = choose_features("classifier", images)
    for damage in ("weights.safetensors", "metadata.json"):
        (path,) = tmp_path.rglob(damage)
        path.write_bytes(path.read_bytes()[:-9])
        assert choose_features("classifier", images, on_message=messages.append).feature_id == first.feature_id
    assert len(messages) == 2


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


def test_auto_takes_inception_for_large_images_with_one_message(weights):
    messages: list[str] = []
    space = choose_features("auto", noise_images(), inception_weights=weights, on_message=messages.append)
    assert space.name == "inception-v3 (clean-fid)" and len(messages) == 1 and str(weights) in messages[0]


@pytest.mark.parametrize("size", [16, 32])
def test_auto_without_inception_depends_on_labels(quick_training, size):
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
