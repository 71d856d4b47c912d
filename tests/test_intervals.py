"""Intervals of paired differences hold the truth as often as they say, and agree with scipy where it has the same one."""

import math

import numpy as np
import pytest
from scipy import stats

from meme_nas.intervals import crossed, paired


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
