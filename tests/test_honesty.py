"""The benchmark of claims: its simulation, with few repetitions, through the product's own intervals and words."""

import honesty
import numpy as np
import pytest

from meme.support.intervals import Interval


@pytest.fixture(scope="module")
def found() -> dict[str, float]:
    return honesty.simulated(repeats=400, seed=1)


def test_luck_is_seldom_called_a_difference(found):
    assert found["false_alarm"] < 0.09 and found["audit_false_alarm"] < 0.09 and found["weights_false_alarm"] < 0.09
    assert found["regret_false_alarm"] < 0.06 and found["best_told_apart"] < 0.15


def test_intervals_hold_the_truth_as_often_as_they_say(found):
    for name in ("coverage", "coverage_2_seeds", "coverage_10_seeds", "audit_coverage", "weights_coverage"):
        assert 0.92 < found[name] < 0.98, name
    assert found["regret_coverage"] > 0.93, "simultaneous, so it may hold more often"


def test_power_grows_with_the_difference_and_with_seeds(found):
    assert found["power_half_sd"] < found["power_2sd"] < found["power_2sd_10_seeds"]
    assert found["power_2sd_10_seeds"] > 0.9


def test_words_are_counted_as_they_are_said():
    tally = honesty.Tally()
    honesty.count(tally, 1, Interval(0.1, 0.05, 0.15, 3), 0.0, "")
    honesty.count(tally, -1, Interval(-0.1, -0.15, -0.05, 3), -0.1, "")
    assert tally.shares() == {"coverage": 0.5, "false_alarm": 1.0, "power_2sd": 1.0, "wrong_way": 0.0}


def test_scores_have_the_deviations_that_are_stated():
    logs = np.log(honesty.scored(np.zeros(2), 20_000, np.random.default_rng(0)))
    expected = np.sqrt(2 * (honesty.LUCK**2 + honesty.NOISE**2))
    assert np.std(logs[0] - logs[1]) == pytest.approx(expected, rel=0.02)


def test_the_front_point_is_found():
    assert honesty.front_point_found(0)
