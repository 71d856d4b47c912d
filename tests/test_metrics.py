"""All metrics from one stream of images; what of the data they are computed against is computed once and kept."""

import dataclasses
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from meme.data.images import Images, open_images
from meme.errors import UserError
from meme.scoring import metrics, reference
from meme.scoring.features import FeatureSpace, choose_features
from meme.scoring.frechet import frechet_distance, statistics
from meme.scoring.metrics import METRICS, Measured, measure, offered_metrics, protocol, reference_statistics
from meme.scoring.neighbours import inception_scores, kernel_distances, precision_and_recall
from meme.support.files import cache_folder
from meme.support.seeding import derive_seed


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEME_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEME_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def digits(_own_cache) -> Images:
    return open_images("digits", size=8, channels=1)


@pytest.fixture(scope="module")
def classifier(digits) -> FeatureSpace:
    return choose_features("classifier", digits)


@pytest.fixture(scope="module")
def random(digits) -> FeatureSpace:
    return choose_features("random", digits)


@pytest.fixture(scope="module")
def noised(digits) -> torch.Tensor:
    noise = torch.randn(600, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return (torch.tensor(digits.pixels[:600]) + 40 * noise).clip(0, 255).to(torch.uint8)


def batches(pixels: torch.Tensor, size: int = 128) -> Iterator[torch.Tensor]:
    yield from pixels.split(size)


# --- Values ----------------------------------------------------------------------------------------


def test_every_metric_is_its_own_function_of_the_views(digits, classifier, noised):
    found = measure(batches(noised), digits, classifier, METRICS, seed=3)
    data, drawn = classifier.views(torch.tensor(digits.pixels)), classifier.views(noised)
    precision, recall = precision_and_recall(data.pooled.numpy(), drawn.pooled.numpy())
    draw = np.random.RandomState(derive_seed(3, "kid subsets") % 2**32)
    kid = kernel_distances(data.pooled.numpy(), drawn.pooled.numpy(), draw)
    scores = inception_scores(drawn.probabilities.numpy())
    assert list(found) == list(METRICS)
    assert found["fid"].value == pytest.approx(frechet_distance(statistics([drawn.pooled]), statistics([data.pooled])), rel=1e-4)
    assert found["sfid"].value == pytest.approx(
        frechet_distance(statistics([drawn.spatial]), statistics([data.spatial])), rel=1e-4
    )
    assert found["sfid"].value != pytest.approx(found["fid"].value, rel=0.01)
    assert (found["kid"].value, found["kid"].spread) == (pytest.approx(kid.mean(), rel=1e-4), pytest.approx(kid.std(), rel=1e-3))
    assert found["precision"] == Measured(pytest.approx(precision, abs=0.005))
    assert found["recall"] == Measured(pytest.approx(recall, abs=0.005))
    assert found["inception_score"].value == pytest.approx(scores.mean(), rel=1e-4)
    assert found["inception_score"].spread == pytest.approx(scores.std(), rel=1e-3)


@pytest.mark.parametrize("kind", ["classifier", "random"])
def test_fid_alone_costs_and_gives_what_it_always_did(digits, noised, kind, request, monkeypatch):
    space = request.getfixturevalue(kind)
    expected = frechet_distance(statistics(space(batch) for batch in batches(noised)), reference_statistics(digits, space))
    together = measure(batches(noised), digits, space, ("recall", "fid", "sfid"))
    monkeypatch.setattr(space.network, "views", lambda _: pytest.fail("more than needed"))
    assert measure(batches(noised), digits, space) == {"fid": Measured(expected)}
    assert list(together) == ["recall", "fid", "sfid"] and together["fid"].value == expected


def test_the_data_itself_is_perfect_and_worse_images_are_worse(digits, random, noised):
    names = ("fid", "sfid", "precision", "recall")
    perfect = measure(batches(torch.tensor(digits.pixels)), digits, random, names)
    worse = measure(batches(noised), digits, random, names)
    assert (perfect["precision"].value, perfect["recall"].value) == (1.0, 1.0)
    assert all(abs(perfect[name].value) < 1e-3 for name in ("fid", "sfid"))
    assert all(worse[name].value > perfect[name].value for name in ("fid", "sfid"))
    assert all(worse[name].value < 0.9 for name in ("precision", "recall"))


def test_leaving_out_digits_costs_recall_and_inception_score_only(digits, classifier):
    pixels = torch.tensor(digits.pixels)
    names = ("precision", "recall", "inception_score")
    whole = measure(batches(pixels), digits, classifier, names)
    half = measure(batches(pixels[torch.tensor(digits.labels) < 5]), digits, classifier, names)
    assert half["precision"].value == 1.0 and half["recall"].value < 0.7 < whole["recall"].value
    assert 3.5 < half["inception_score"].value < 5 < whole["inception_score"].value <= 10


@pytest.mark.parametrize("size", [1, 7, 256, 700])
def test_the_size_of_batches_does_not_matter(digits, random, noised, size):
    names = ("fid", "sfid", "precision", "recall")
    expected, found = (measure(batches(noised, each), digits, random, names) for each in (128, size))
    for name in names:
        assert found[name].value == pytest.approx(expected[name].value, rel=1e-3, abs=2e-3)


def test_the_seed_is_of_kids_subsets(digits, random, noised):
    first, again, other = (measure(batches(noised), digits, random, ("kid", "recall"), seed=seed) for seed in (1, 1, 2))
    assert first == again and first["recall"] == other["recall"]
    assert first["kid"] != other["kid"] and abs(first["kid"].value - other["kid"].value) < first["kid"].spread


def test_images_stream_by(digits, classifier):
    alive: list[weakref.ref] = []

    def stream():
        for index in range(20):
            assert sum(reference() is not None for reference in alive) <= 1  # the one just handed out
            batch = torch.full((5, 1, 8, 8), index, dtype=torch.uint8)
            alive.append(weakref.ref(batch))
            yield batch

    assert set(measure(stream(), digits, classifier, METRICS)) == set(METRICS)


# --- Refusals --------------------------------------------------------------------------------------


def test_what_a_space_offers(classifier, random):
    assert offered_metrics(classifier) == METRICS
    assert offered_metrics(random) == ("fid", "sfid", "kid", "precision", "recall")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("fid", "inception_score"), "inception_score needs class probabilities, which the spaces inception and classifier have"),
        (("fid", "FID"), "'FID' is not one of fid, sfid, kid"),
        ((), "at least one of fid"),
    ],
)
def test_metrics_are_refused_before_the_first_image_is_drawn(digits, random, asked, message):
    with pytest.raises(UserError, match=f"metrics: .*{message}"):
        measure((pytest.fail("drawn") for _ in range(1)), digits, random, asked)


@pytest.mark.parametrize(("metric", "fewest"), [("fid", 2), ("kid", 2), ("precision", 4), ("recall", 4), ("inception_score", 1)])
def test_too_few_samples_are_refused(digits, classifier, metric, fewest):
    pixels = torch.tensor(digits.pixels)
    assert np.isfinite(measure(batches(pixels[:fewest]), digits, classifier, (metric,))[metric].value)
    with pytest.raises(UserError, match=f"samples: {metric} needs at least {fewest}, not {fewest - 1}"):
        measure(batches(pixels[: fewest - 1]), digits, classifier, (metric,))


# --- Reference -------------------------------------------------------------------------------------


def test_the_reference_is_computed_in_one_pass_and_kept(digits, random, noised, empty_cache, monkeypatch):
    seen: list[int] = []
    original = random.network._levels
    monkeypatch.setattr(random.network, "_levels", lambda pixels: seen.append(len(pixels)) or original(pixels))
    names = ("fid", "sfid", "recall")
    first = measure(batches(noised), digits, random, names)
    assert sum(seen) == len(digits) + len(noised)
    assert measure(batches(noised), digits, random, names) == first
    assert sum(seen) == len(digits) + 2 * len(noised)


def test_reference_parts_are_of_the_data(digits, random, empty_cache):
    known = reference.reference(digits, random, {"pooled", "spatial", "features"})
    views = random.views(torch.tensor(digits.pixels))
    assert isinstance(known.features, np.memmap) and known.features.dtype == np.float32
    np.testing.assert_allclose(known.features, views.pooled.numpy(), rtol=1e-4, atol=1e-5)
    for found, rows in ((known.pooled, views.pooled.numpy()), (known.spatial, views.spatial.numpy())):
        assert found.count == len(digits)
        np.testing.assert_allclose(found.covariance, np.cov(rows, rowvar=False), rtol=1e-3, atol=1e-5)
    assert reference.reference(digits, random, {"pooled"}).features is None


@pytest.mark.parametrize("together", [True, False])
def test_features_of_large_data_are_those_of_a_fixed_choice(digits, random, empty_cache, monkeypatch, together):
    monkeypatch.setattr(reference, "FEATURES_KEPT", 300)
    chosen = reference.kept_images(len(digits))
    assert len(set(chosen)) == 300 and (np.diff(chosen) > 0).all() and chosen[-1] > 1500
    known = reference.reference(digits, random, {"features", "pooled"} if together else {"features"})
    expected = random(torch.tensor(digits.pixels[chosen])).numpy()
    assert known.features.shape == expected.shape
    np.testing.assert_allclose(known.features, expected, rtol=1e-4, atol=1e-5)
    assert not together or known.pooled.count == len(digits)
    assert (reference.kept_images(250) == np.arange(250)).all()


def test_damaged_parts_are_replaced_and_whole_ones_left(digits, random, empty_cache):
    parts = {"pooled", "spatial", "features"}
    fresh = reference.reference(digits, random, parts)
    files = [path for path in cache_folder().rglob("*.np[yz]") if random.feature_id in path.name]
    assert len(files) == 3
    for file in files:
        content = file.read_bytes()
        for damaged in (content[: len(content) // 2], b"", b"\x93NUMPY"):
            file.unlink()  # cut off in place, it would take from under us what is mapped
            file.write_bytes(damaged)
            times = {other: other.stat().st_mtime_ns for other in files if other != file}
            again = reference.reference(digits, random, parts)
            np.testing.assert_array_equal(again.pooled.covariance, fresh.pooled.covariance)
            np.testing.assert_array_equal(again.spatial.mean, fresh.spatial.mean)
            np.testing.assert_allclose(again.features, fresh.features)
            assert file.read_bytes() == content and all(other.stat().st_mtime_ns == times[other] for other in times)


def test_features_of_another_shape_are_replaced(digits, random, empty_cache):
    reference.reference(digits, random, {"features"})
    (file,) = (cache_folder() / "reference-features").iterdir()
    for other in (np.zeros((3, random.dim), np.float32), np.zeros((len(digits), random.dim))):
        np.save(file, other)
        assert reference.reference(digits, random, {"features"}).features.any()


def test_other_data_and_other_spaces_have_files_of_their_own(digits, random, classifier, empty_cache):
    other = dataclasses.replace(digits, pixels=255 - digits.pixels, content_id="0" * 16)
    assert reference_statistics(digits, random).mean[0] != reference_statistics(other, random).mean[0]
    assert reference_statistics(digits, classifier).mean.shape == (classifier.dim,)
    assert len(list((cache_folder() / "statistics").iterdir())) == 3


# --- Protocol --------------------------------------------------------------------------------------


def test_the_protocol_names_what_a_score_depends_on(digits, random, monkeypatch):
    assert protocol(digits, random, 50_000) == "random-conv features, 50,000 samples against all 1,797 images of digits"
    monkeypatch.setattr(metrics, "FEATURES_KEPT", 1000)
    line = protocol(digits, random, 100, ("fid", "kid", "recall", "inception_score"))
    assert line.endswith(
        "(KID, precision and recall: against 1,000 of them), 3 nearest neighbours, KID over 100 subsets, "
        "inception score over 10 splits"
    )
    assert "\n" not in line
    as_adm = protocol(digits, random, 50_000, ("inception_score",), inception_split=5_000)
    assert as_adm.endswith("inception score over splits of 5,000 images")


def test_the_splits_asked_for_are_those_of_the_score(digits, classifier):
    pixels = torch.tensor(digits.pixels[:40])
    asked, tenths = (
        measure(batches(pixels), digits, classifier, ("inception_score",), inception_split=split)["inception_score"]
        for split in (40, None)
    )
    whole = inception_scores(classifier.views(pixels).known_probabilities.cpu().numpy(), split_images=40)
    assert asked.value == pytest.approx(whole[0]) and asked.spread == 0.0
    assert tenths.value != asked.value
