"""Frechet distance against clean-fid and closed forms; streamed statistics against numpy."""

import inspect
from itertools import pairwise

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meme.scoring import frechet
from meme.scoring.frechet import Statistics, frechet_distance, statistics
from meme.support.torchvision_compat import make_torchvision_importable


def gaussian(mean, covariance, count=1000) -> Statistics:
    return Statistics(np.asarray(mean, float), np.asarray(covariance, float), count)


def random_features(seed: int, count: int, dim: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, dim)) @ rng.normal(size=(dim, dim)) + rng.normal(size=dim)


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 101), max_size=8),
    mean=st.sampled_from([0.0, 1.0, -1e6]),
    as_tensor=st.booleans(),
)
def test_streamed_statistics_equal_numpy_for_any_split(cuts, mean, as_tensor):
    rows = random_features(0, 101, 5) + mean
    edges = [0, *sorted(cuts), 101]
    parts = [rows[start:stop] for start, stop in pairwise(edges)]
    streamed = statistics(torch.from_numpy(part) if as_tensor else part for part in parts)
    assert streamed.count == 101
    np.testing.assert_allclose(streamed.mean, rows.mean(axis=0), rtol=1e-10)
    expected = np.cov(rows, rowvar=False)
    # An entry near zero is only as exact as the largest, hence the absolute part.
    np.testing.assert_allclose(streamed.covariance, expected, rtol=1e-10, atol=1e-10 * abs(expected).max())


def test_statistics_refuse_what_is_no_batch_of_features():
    with pytest.raises(ValueError, match="no samples"):
        statistics([])
    with pytest.raises(ValueError, match=r"shape \(B, D\)"):
        statistics([np.zeros((2, 3, 4))])


@pytest.mark.skipif("disp" not in inspect.signature(scipy.linalg.sqrtm).parameters, reason="clean-fid needs scipy<1.18")
@pytest.mark.parametrize(("count", "dim"), [(500, 16), (500, 64), (20, 32)])
def test_distance_is_clean_fids_own(count, dim):
    make_torchvision_importable()
    from cleanfid.fid import fid_from_feats

    a, b = random_features(1, count, dim), random_features(2, count, dim)
    with pytest.warns(DeprecationWarning, match="disp"):
        expected = fid_from_feats(a, b)
    closeness = 1e-9 if count > dim else 1e-7  # of a singular product, roots of rounding errors are in clean-fid's sum
    assert frechet_distance(statistics([a]), statistics([b])) == pytest.approx(expected, rel=closeness)


def test_distance_of_diagonal_gaussians_has_a_closed_form():
    a, b = gaussian([0, 1, 2], np.diag([1, 4, 9])), gaussian([1, 1, 0], np.diag([4, 4, 1]))
    assert frechet_distance(a, b) == pytest.approx((1 + 0 + 4) + (1 - 2) ** 2 + 0 + (3 - 1) ** 2)


def test_distance_of_commuting_covariances_has_a_closed_form():
    rng = np.random.default_rng(3)
    basis, _ = np.linalg.qr(rng.normal(size=(12, 12)))
    first, second = rng.uniform(0.1, 5, (2, 12))
    a, b = gaussian(np.zeros(12), basis * first @ basis.T), gaussian(np.ones(12), basis * second @ basis.T)
    assert frechet_distance(a, b) == pytest.approx(12 + ((np.sqrt(first) - np.sqrt(second)) ** 2).sum())


def test_distance_is_silent_and_right_with_fewer_samples_than_features(capsys, recwarn):
    a, b = statistics([random_features(4, 10, 48)]), statistics([random_features(5, 12, 48)])
    assert frechet_distance(a, b) == pytest.approx(frechet._symmetric_distance(a, b), rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-3)
    constant = gaussian(np.zeros(4), np.zeros((4, 4)))
    assert frechet_distance(constant, gaussian(np.zeros(4), np.eye(4))) == pytest.approx(4, abs=0.02)
    assert capsys.readouterr().out == "" and not recwarn.list


@pytest.mark.parametrize("trouble", ["imaginary", "not finite"])
def test_distance_falls_back_where_clean_fid_gives_no_number(monkeypatch, trouble):
    def refuse(*_):
        if trouble == "imaginary":
            raise ValueError("Imaginary component 1.0")
        return float("nan")

    monkeypatch.setattr(frechet, "_clean_fid_distance", lambda: refuse)
    a, b = gaussian([0, 0], np.diag([1, 0])), gaussian([2, 0], np.diag([9, 0]))
    assert frechet_distance(a, b) == pytest.approx(4 + (1 - 3) ** 2)


def test_distance_works_where_scipy_has_dropped_disp(monkeypatch):
    original = scipy.linalg.sqrtm
    monkeypatch.setattr(scipy.linalg, "sqrtm", lambda A: original(A))
    assert frechet_distance(gaussian([0, 0], np.eye(2)), gaussian([3, 4], np.eye(2))) == pytest.approx(25)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (gaussian([0, 0], np.eye(2), count=1), "at least 2"),
        (statistics([np.zeros((1, 2))]), "at least 2"),
        (gaussian([0, np.nan], np.eye(2)), "not finite"),
        (gaussian([0, 0], np.full((2, 2), np.inf)), "not finite"),
        (gaussian([0, 0, 0], np.eye(3)), "not the same feature space"),
    ],
)
def test_distance_refuses_unusable_statistics(broken, message):
    whole = gaussian([0, 0], np.eye(2))
    with pytest.raises(ValueError, match=message):
        frechet_distance(broken, whole)
    with pytest.raises(ValueError, match=message):
        frechet_distance(whole, broken)
