"""Inception's feature space: the features are clean-fid's own, and what a file lacks is not made up."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from inception_files import BareInception, TinyInception, noise_images, saved, trusted
from PIL import Image
from torch import nn

from meme.errors import UserError
from meme.scoring.features import choose_features, inception
from meme.scoring.features.resize import resized
from meme.scoring.metrics import measure, offered_metrics
from meme.support.torchvision_compat import make_torchvision_importable


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    return saved(tmp_path_factory.mktemp("weights") / "any name.bin", TinyInception())


@pytest.fixture(autouse=True)
def trust_the_stand_in(weights, monkeypatch):
    monkeypatch.setenv("MEME_INCEPTION_SHA256", inception.file_sha256(weights))


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
    (tmp_path / inception.INCEPTION_FILE).symlink_to(weights)
    model = InceptionV3W(str(tmp_path), download=False).eval()
    expected = get_folder_features(str(tmp_path / "png"), model, num_workers=0, device=torch.device("cpu"), verbose=False)

    space = choose_features("inception", images, inception_weights=weights)
    ours = space(torch.from_numpy(images.pixels))
    assert ours.shape == (4, space.dim) == (4, 2048) and ours.dtype == torch.float32 and not ours.requires_grad
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-5, atol=1e-5)
    assert space.name == "inception-v3 (clean-fid)"


@given(size=st.tuples(st.integers(8, 512), st.integers(8, 512)), channels=st.sampled_from([1, 3]), seed=st.integers(0, 99))
@example(size=(8, 8), channels=1, seed=0)
@example(size=(299, 299), channels=3, seed=0)
@example(size=(512, 512), channels=3, seed=0)
@settings(max_examples=30)
def test_resizing_is_clean_fids_own(size, channels, seed):
    make_torchvision_importable()
    from cleanfid.resize import build_resizer

    # Black and white, where the filter overshoots most.
    pixels = np.random.default_rng(seed).integers(0, 2, (2, channels, *size), dtype=np.uint8) * 255
    resize = build_resizer("clean")
    expected = [resize(np.repeat(image.transpose(1, 2, 0), 3 // channels, axis=2)) for image in pixels]
    found = resized(torch.from_numpy(pixels))
    assert found.shape == (2, channels, 299, 299) and found.dtype == torch.float32
    assert found.min() >= 0 and found.max() <= 255
    np.testing.assert_allclose(found.expand(-1, 3, -1, -1).numpy(), np.stack(expected).transpose(0, 3, 1, 2), atol=1e-3)


def test_inception_views_are_the_files_own(weights):
    images = noise_images(count=5, size=299)  # so that the file's own resizing does nothing either
    space = choose_features("inception", images, inception_weights=weights)
    pixels = torch.from_numpy(images.pixels)
    views = space.views(pixels)
    assert torch.equal(views.pooled, space(pixels))
    file = torch.jit.load(str(weights)).eval()
    with torch.no_grad():
        middle = file.layers.mixed_6.conv(file.layers.conv(pixels.float().sub(128).div(128)))
        probabilities = file(pixels, no_output_bias=True)
        assert not torch.allclose(probabilities, file(pixels), rtol=1e-3)
    assert (space.spatial_dim, space.classes) == (views.spatial.shape[1], views.probabilities.shape[1]) == (2023, 11)
    torch.testing.assert_close(views.spatial, middle[:, :7].reshape(5, 2023), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(views.probabilities, probabilities, rtol=1e-4, atol=1e-6)


def test_the_file_is_rearranged_only_as_long_as_it_says_the_same(weights, monkeypatch):
    images = noise_images(count=3)
    pixels = torch.from_numpy(images.pixels)
    fast = choose_features("inception", images, inception_weights=weights)
    left = {kind: fast.network.trunk.graph.findAllNodes(f"aten::{kind}") for kind in ("batch_norm", "contiguous", "conv2d")}
    assert [len(nodes) for nodes in left.values()] == [0, 0, 4]
    monkeypatch.setattr(torch.jit, "run_frozen_optimizations", without_relu)
    plain = choose_features("inception", images, inception_weights=weights)
    torch.testing.assert_close(fast(pixels), plain(pixels), rtol=1e-4, atol=1e-5)


def without_relu(module) -> None:
    for node in module.graph.findAllNodes("aten::relu"):
        node.output().replaceAllUsesWith(next(node.inputs()))


@pytest.mark.parametrize(
    "file",
    [
        TinyInception(block="mixed_5"),
        TinyInception(turned=True),
        TinyInception(stride=16),
        TinyInception(detour=True),
        BareInception(),
    ],
    ids=["no such block", "another branch first", "another size", "other order", "bare"],
)
def test_a_file_with_another_middle_has_fid_but_no_sfid(tmp_path, file, monkeypatch):
    images = noise_images(count=3, size=299)
    path = trusted(saved(tmp_path / "file.pt", file), monkeypatch)
    space = choose_features("inception", images, inception_weights=path)
    views = space.views(torch.from_numpy(images.pixels))
    assert space.spatial_dim is None and views.spatial is None
    assert len(space.network.trunk.graph.findAllNodes("aten::conv2d")) == 4  # laid open, so rearranged none the less
    with torch.no_grad():
        expected = file.layers(torch.from_numpy(images.pixels).float().sub(128).div(128)).flatten(1)
    torch.testing.assert_close(views.pooled, expected, rtol=1e-4, atol=1e-4)
    has_classes = not isinstance(file, BareInception)
    assert (space.classes is not None) == (views.probabilities is not None) == has_classes
    offered = {"fid", "kid", "precision", "recall"} | ({"inception_score"} if has_classes else set())
    assert set(offered_metrics(space)) == offered
    with pytest.raises(UserError, match="metrics: sfid needs spatial features"):
        measure([], images, space, ("fid", "sfid"))


def test_weights_that_are_missing_or_no_inception_name_the_option(tmp_path, weights, monkeypatch):
    images = noise_images()
    with pytest.raises(UserError, match="inception_weights: there is no file"):
        choose_features("inception", images, inception_weights=tmp_path / "absent.pt")
    for content in (b"not a model", weights.read_bytes()[:5000]):
        (tmp_path / "broken.pt").write_bytes(content)
        with pytest.raises(UserError, match=r"inception_weights: .*broken\.pt is not Inception as TorchScript"):
            choose_features("auto", images, inception_weights=trusted(tmp_path / "broken.pt", monkeypatch))
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "other.pt"))
    with pytest.raises(UserError, match="inception_weights"):
        choose_features("inception", images, inception_weights=trusted(tmp_path / "other.pt", monkeypatch))
    monkeypatch.setenv("MEME_INCEPTION", str(tmp_path / "absent.pt"))
    with pytest.raises(UserError, match="MEME_INCEPTION"):
        choose_features("inception", images)


@pytest.mark.parametrize("by_variable", [False, True])
def test_a_file_of_another_digest_is_never_opened(weights, monkeypatch, by_variable):
    monkeypatch.setenv("MEME_INCEPTION", str(weights))
    monkeypatch.delenv("MEME_INCEPTION_SHA256")  # what counts now is the published file's
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(UserError, match=rf"inception_weights.* is not Inception's published file .*{inception.INCEPTION_SHA256}"):
        choose_features("inception", noise_images(), inception_weights=None if by_variable else weights)


def test_off_neither_looks_nor_fetches_and_the_error_says_what_to_do(weights, monkeypatch):
    monkeypatch.setattr(inception, "CLEAN_FID_PLACE", weights)
    monkeypatch.setattr(inception, "_fetch", lambda _: pytest.fail("fetched"))
    with pytest.raises(UserError, match="inception_weights or the variable MEME_INCEPTION"):
        choose_features("inception", noise_images())


def test_weights_are_found_by_variable_in_clean_fids_place_and_in_the_cache(weights, monkeypatch, tmp_path):
    monkeypatch.setenv("MEME_INCEPTION", str(weights))
    assert inception.find_inception(None) == weights
    monkeypatch.delenv("MEME_INCEPTION")
    monkeypatch.setenv("MEME_CACHE", str(tmp_path))
    monkeypatch.setattr(inception, "_fetch", lambda _: None)
    half = tmp_path / "half.pt"
    half.write_bytes(weights.read_bytes()[:5000])
    monkeypatch.setattr(inception, "CLEAN_FID_PLACE", half)
    assert inception.find_inception(None) is None
    kept = tmp_path / inception.INCEPTION_FILE
    kept.write_bytes(weights.read_bytes())
    assert inception.find_inception(None) == kept
    monkeypatch.setattr(inception, "CLEAN_FID_PLACE", weights)
    assert inception.find_inception(None) == weights


@pytest.mark.parametrize("published", [True, False])
def test_fetching_leaves_a_whole_file_or_none(weights, monkeypatch, tmp_path, published):
    monkeypatch.setattr(inception.urllib.request, "urlopen", lambda url, timeout: weights.open("rb"))
    if published:
        monkeypatch.setattr(inception, "INCEPTION_SHA256", inception.file_sha256(weights))
    target = tmp_path / inception.INCEPTION_FILE
    assert inception._fetch(target) == (target if published else None)
    assert [path.name for path in tmp_path.iterdir()] == ([target.name] if published else [])
