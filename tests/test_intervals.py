"""Intervals of differences hold the truth as often as they say, and agree with scipy where it has the same one."""

import math

import numpy as np
import pytest
from scipy import stats

from meme.support.intervals import behind_best, crossed, dunnett, paired, pooled


def test_paired_is_scipys_interval():
    values = [0.1, -0.2, 0.05, -0.1]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = paired(values)
    np.testing.assert_allclose((found.mean, found.low, found.high), (np.mean(values), expected.low, expected.high))
    assert found.count == 4 and not found.excludes_zero


def test_one_seed_says_nothing_of_other_seeds():
    found = paired([-0.3])
    assert (found.mean, found.low, found.high) == (-0.3, -math.inf, math.inf)
    assert not found.excludes_zero


def test_one_search_or_one_seed_is_the_paired_interval():
    values = [0.1, -0.2, 0.05]
    assert crossed([values]) == paired(values)
    assert crossed([[value] for value in values]) == paired(values)


def test_equal_sides_differ_by_nothing():
    found = crossed(np.zeros((3, 3)))
    assert (found.mean, found.low, found.high) == (0, 0, 0)


@pytest.mark.parametrize("deviations", [(1, 1, 1), (1, 0, 0.2), (0, 1, 0.2), (0, 0, 1), (2, 1, 0)])
@pytest.mark.parametrize("shape", [(3, 3), (5, 3)])
def test_crossed_holds_the_truth_at_least_as_often_as_it_says(shape, deviations):
    source = np.random.default_rng(0)
    of_search, of_seed, of_both = deviations
    held = []
    for _ in range(2_000):
        values = of_search * source.normal(size=(shape[0], 1)) + of_seed * source.normal(size=(1, shape[1]))
        found = crossed(0.7 + values + of_both * source.normal(size=shape))
        held.append(found.low <= 0.7 <= found.high)
    assert np.mean(held) > 0.935


def test_pooled_over_two_configs_is_the_paired_interval():
    values = np.random.default_rng(0).normal(size=(2, 5))
    found, expected = pooled(values, 0, 1), paired((values[0] - values[1]).tolist())
    np.testing.assert_allclose((found.mean, found.low, found.high), (expected.mean, expected.low, expected.high))
    assert pooled(values[:, :1], 0, 1).high == math.inf


@pytest.mark.parametrize("seeds", [2, 3])
def test_pooled_holds_the_truth_as_often_as_it_says(seeds):
    source, held = np.random.default_rng(0), []
    for _ in range(3_000):
        values = source.normal(size=(8, seeds)) + source.normal(size=(1, seeds))
        found = pooled(values + 0.7 * (np.arange(8) == 2)[:, None], 2, 0)
        held.append(found.low <= 0.7 <= found.high)
    assert 0.94 < np.mean(held) < 0.96


def test_dunnetts_critical_values():
    """One comparison is Student's t; seven are as in a simulation."""
    assert dunnett(1, 7) == pytest.approx(stats.t.ppf(0.975, 7), abs=2e-3)
    source = np.random.default_rng(0)
    shared, others = source.normal(size=(400_000, 1)), source.normal(size=(400_000, 7))
    largest = (others - shared).max(axis=1) / np.sqrt(2 * source.chisquare(7, 400_000) / 7)
    assert dunnett(7, 7) == pytest.approx(np.quantile(largest, 0.975), abs=0.03)


@pytest.mark.parametrize("truth", [[0] * 8, [3, 0] + [3] * 6, [1, 0] + [1] * 6, [0] + [1] * 7])
def test_how_far_behind_the_best_is_held_at_least_as_often_as_it_says(truth):
    source, held = np.random.default_rng(0), []
    for _ in range(1_000):
        found = behind_best(np.array(truth)[:, None] + source.normal(size=(8, 3)) + source.normal(size=(1, 3)), 0)
        held.append(found.low <= truth[0] <= found.high)
    assert np.mean(held) > 0.94


def test_the_best_is_behind_nothing_and_one_seed_bounds_nothing():
    found = behind_best([[0.0, 0.1], [1.0, 1.1], [2.0, 2.1]], 0)
    assert (found.mean, found.low, found.high) == (0, 0, 0)
    assert behind_best([[1.0], [0.0]], 0).high == math.inf
    assert behind_best([[1.0, 2.0]], 0).high == 0
