"""KID against clean-fid and its definition, precision and recall against a naive formulation, the inception score's limits."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from meme.scoring import neighbours as fidelity
from meme.scoring.neighbours import inception_scores, kernel_distances, precision_and_recall
from meme.support.torchvision_compat import make_torchvision_importable


def random_features(seed: int, count: int, dim: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, dim)) @ rng.normal(size=(dim, dim)) + rng.normal(size=dim)).astype(np.float32)


# --- KID -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("counts", "size"), [((300, 500), 1000), ((500, 300), 100), ((40, 40), 1000)])
def test_kid_is_clean_fids_own(counts, size):
    make_torchvision_importable()
    from cleanfid.fid import kernel_distance

    a, b = random_features(1, counts[0], 12), random_features(2, counts[1], 12)
    np.random.seed(5)
    expected = kernel_distance(a.astype(np.float64), b.astype(np.float64), num_subsets=20, max_subset_size=size)
    found = kernel_distances(a, b, np.random.RandomState(5), subsets=20, subset_size=size)
    assert found.shape == (20,) and found.mean() == pytest.approx(expected, rel=1e-9)


def test_kid_is_the_unbiased_estimate_of_its_definition():
    a, b = random_features(3, 7, 4).astype(np.float64), random_features(4, 7, 4).astype(np.float64)

    def kernel(x, y):
        return (sum(p * q for p, q in zip(x, y, strict=True)) / 4 + 1) ** 3

    pairs = [(i, j) for i in range(7) for j in range(7) if i != j]
    within = sum(kernel(a[i], a[j]) + kernel(b[i], b[j]) for i, j in pairs) / len(pairs)
    between = sum(kernel(x, y) for x in a for y in b) / 49
    found = kernel_distances(a, b, np.random.RandomState(0), subsets=3)
    np.testing.assert_allclose(found, within - 2 * between)


def test_kid_of_one_distribution_averages_to_nothing_and_grows_with_a_shift():
    features = random_features(5, 1000, 8)
    same = kernel_distances(features[:500], features[500:], np.random.RandomState(0), subset_size=250)
    shifted = kernel_distances(features[:500], features[500:] + 1, np.random.RandomState(0), subset_size=250)
    assert abs(same.mean()) < 3 * same.std() < shifted.mean()


def test_kid_needs_two_samples():
    with pytest.raises(ValueError, match="at least 2"):
        kernel_distances(np.zeros((1, 3)), np.zeros((9, 3)), np.random.RandomState(0))


# --- Precision and recall --------------------------------------------------------------------------


def naive_share_covered(points: np.ndarray, manifold: np.ndarray, neighbours: int) -> float:
    radii = [sorted(row)[neighbours] for row in cdist(manifold, manifold)]
    covered = [any(d <= radius for d, radius in zip(row, radii, strict=True)) for row in cdist(points, manifold)]
    return sum(covered) / len(covered)


@given(
    seed=st.integers(0, 1000),
    counts=st.tuples(st.integers(5, 60), st.integers(5, 60)),
    neighbours=st.integers(1, 4),
    on_a_grid=st.booleans(),
    blocks=st.tuples(st.integers(1, 70), st.integers(1, 70)),
)
def test_precision_and_recall_equal_the_definition_in_any_blocks(seed, counts, neighbours, on_a_grid, blocks):
    rng = np.random.default_rng(seed)
    real, drawn = rng.normal(size=(counts[0], 3)), rng.normal(0.7, 1, size=(counts[1], 3))
    if on_a_grid:  # many equal points and equal distances
        real, drawn = real.round(), drawn.round()
    real, drawn = real.astype(np.float32), drawn.astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity, "ROWS", blocks[0])
        patch.setattr(fidelity, "COLUMNS", blocks[1])
        found = precision_and_recall(real, drawn, neighbours=neighbours)
    assert found == (naive_share_covered(drawn, real, neighbours), naive_share_covered(real, drawn, neighbours))


def test_identical_sets_cover_each_other_and_distant_ones_do_not():
    features = random_features(6, 500, 16)
    assert precision_and_recall(features, features[::-1].copy()) == (1.0, 1.0)
    assert precision_and_recall(features, features + 1000) == (0.0, 0.0)


def test_dropping_a_mode_costs_recall_and_inventing_one_precision():
    rng = np.random.default_rng(7)
    first, second = rng.normal(0, 1, (300, 8)), rng.normal(50, 1, (100, 8))
    both, one = np.concatenate([first, second]), first[:200]
    precision, recall = precision_and_recall(both, one)
    assert precision == 1.0 and 0.65 < recall <= 0.75
    assert precision_and_recall(one, both) == (recall, precision)


def test_repeated_points_far_from_the_origin_have_balls_of_no_size():
    points = np.repeat(random_features(8, 20, 64) + 500, 5, axis=0)
    assert precision_and_recall(points, points) == (1.0, 1.0)
    assert precision_and_recall(points, points + 0.01) == (0.0, 0.0)


@pytest.mark.parametrize("counts", [(3, 10), (10, 3)])
def test_precision_and_recall_need_more_samples_than_neighbours(counts):
    with pytest.raises(ValueError, match="more than 3 samples"):
        precision_and_recall(*(np.zeros((count, 2), np.float32) for count in counts))


# --- Inception score -------------------------------------------------------------------------------


def test_inception_score_is_its_formula_in_every_split():
    probabilities = torch.randn(103, 7, generator=torch.Generator().manual_seed(0)).mul(3).softmax(dim=1).numpy()
    expected = []
    for part in np.array_split(probabilities.astype(np.float64), 10):
        mean = part.mean(axis=0)
        divergence = sum(p * (math.log(p) - math.log(q)) for row in part for p, q in zip(row, mean, strict=True))
        expected.append(math.exp(divergence / len(part)))
    np.testing.assert_allclose(inception_scores(probabilities), expected)


def test_splits_of_so_many_images_are_those_of_adms_evaluator():
    probabilities = torch.randn(103, 7, generator=torch.Generator().manual_seed(0)).mul(3).softmax(dim=1).numpy()

    def of_adm(preds, split_size):  # after its formula: splits from the first image on, the last one shorter
        scores = []
        for first in range(0, len(preds), split_size):
            part = preds[first : first + split_size].astype(np.float64)
            kl = part * (np.log(part) - np.log(part.mean(axis=0, keepdims=True)))
            scores.append(np.exp(kl.sum(axis=1).mean()))
        return scores

    found = inception_scores(probabilities, split_images=50)
    assert len(found) == 3
    np.testing.assert_allclose(found, of_adm(probabilities, 50))
    assert len(inception_scores(probabilities, split_images=5_000)) == 1


def test_inception_score_lies_between_one_and_the_number_of_classes():
    assert inception_scores(np.full((50, 4), 0.25, np.float32)) == pytest.approx([1.0] * 10)
    certain_and_even = np.eye(5, dtype=np.float32)[np.arange(100) % 5]
    assert inception_scores(certain_and_even) == pytest.approx([5.0] * 10)
    assert inception_scores(np.eye(5, dtype=np.float32)[np.zeros(30, int)]) == pytest.approx([1.0] * 10)


def test_inception_score_of_few_samples_has_as_many_splits():
    assert len(inception_scores(np.full((3, 2), 0.5))) == 3
    with pytest.raises(ValueError, match="at least 1"):
        inception_scores(np.empty((0, 2)))
