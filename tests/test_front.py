"""The Pareto front of sums, what a point adds to it, and which cascades and candidates are chosen for it."""

import itertools
import random

import moocore
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meme_nas.surrogate.choose_cascades import Assembly
from meme_nas.surrogate.feasibility import chances
from meme_nas.surrogate.hypervolume import front_of_sums, gains
from meme_nas.surrogate.kernel import Candidates
from meme_nas.surrogate.model import Surrogate

parts = st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5), min_size=1, max_size=4)


@given(parts)
@settings(max_examples=100)
def test_the_front_of_sums_is_what_no_other_sum_beats(table):
    columns = [np.array(column, dtype=float) for column in table]
    every = np.array([sum(chosen) for chosen in itertools.product(*columns)])
    chosen, sums = front_of_sums(columns)
    assert {tuple(row) for row in sums} == {tuple(row) for row in every[moocore.is_nondominated(every)]}
    assert [sum(c[place] for c, place in zip(columns, row, strict=True)).tolist() for row in chosen] == sums.tolist()


def test_gains_are_shares_of_volume_or_how_far_the_front_is():
    front = np.array([[0.0, 3.0], [1.0, 1.0], [3.0, 0.0]])
    points = np.array([[0.5, 0.5], [2.0, 2.0], [1.0, 1.0]])
    # Ranges are 3; (0.5, 0.5) adds what lies between it and (1, 1), and beside it up to the other two points.
    assert gains(points, front) == pytest.approx([(2.5 * 2.5 - 2 * 2) / 9, -1 / 3, 0.0])


# An expert with the candidates (score, cost) of a front, and others near it. (6.3, 5) lies on no line between two others that no
# point is below: no weighted sum of score and cost has its minimum there.
BUMP = 5
CURVE = [(0.0, 10.0), (0.3, 9.0), (8.0, 1.2), (9.0, 0.6), (10.0, 0.0), (6.3, 5.0)]
OTHERS = [(4.0 + place, 10.0) for place in range(30)]


def bumpy() -> tuple[Surrogate, Assembly, list[np.ndarray]]:
    """Two experts, of whose second all candidates cost the same; scored often enough that the surrogate is certain."""
    points = np.array([*CURVE, *OTHERS])
    places = np.linspace(0, 1, len(points))[:, None]
    values = [points[:, 0], np.linspace(0, 3, 12)]
    known = [Candidates(places, np.full(len(points), np.nan)), Candidates(places[:12], np.full(12, np.nan))]
    cascades = np.array([*itertools.product(range(len(points)), range(0, 12, 3))])
    model = Surrogate(known, cascades, values[0][cascades[:, 0]] + values[1][cascades[:, 1]])
    costs = (points[:, 1:], np.zeros((12, 1)))
    return model, Assembly((np.arange(len(points)), np.arange(12)), costs, np.array([10.0]), np.array([np.inf]), (0,)), values


def chosen_for_the_front(rounds: int) -> list[tuple[int, int]]:
    """The cascades chosen for the front, one a round, each scored before the next."""
    model, assembly, values = bumpy()
    scores = {(0, 11): values[0][0] + values[1][11]}
    found = []
    for number in range(rounds):
        (lists, drawn) = zip(*model.draws(1, np.random.default_rng(number), assembly.ready), strict=True)
        front = assembly._front(model, scores)
        ranked = assembly._front_first(lists, [each[0] for each in drawn], front)
        cascade = next(cascade for cascade in ranked if cascade not in scores)
        scores[cascade] = float(values[0][cascade[0]] + values[1][cascade[1]])
        found.append(cascade)
    return found


def test_a_point_of_the_front_that_no_weighted_sum_finds_is_found():
    totals = np.array([[score, cost] for score, cost in [*CURVE, *OTHERS]])
    assert moocore.is_nondominated(totals)[BUMP]
    weighted = {int((totals @ [1.0, price]).argmin()) for price in np.logspace(-4, 4, 2_000)}
    assert BUMP not in weighted
    assert (BUMP, 0) in chosen_for_the_front(8)


def test_the_front_keeps_the_limits():
    model, assembly, _ = bumpy()
    limited = Assembly(assembly.ready, assembly.costs, np.array([4.0]), np.array([6.0]), (0,))
    chosen = limited.choose(20, set(), model, np.random.default_rng(0), {})
    assert chosen and all(limited.costs[0][first, 0] <= 6 for first, _ in chosen)
    assert any(limited.costs[0][first, 0] > 4 for first, _ in chosen)  # beyond the winner's limit


# --- Feasibility ---------------------------------------------------------------------------------


def test_the_chance_to_be_trained_is_low_where_others_failed():
    source = np.random.default_rng(0)
    tried, new = source.random((24, 3)), source.random((300, 3))
    found = chances(tried, tried[:, 1] > 0.4, new)
    assert found[new[:, 1] > 0.55].mean() > 0.85 and found[new[:, 1] < 0.25].mean() < 0.15
    assert found.min() > 0 and found.max() <= 1


@pytest.mark.parametrize("trained", [True, False])
def test_nothing_is_known_of_places_where_all_or_none_failed(trained):
    assert chances(np.zeros((3, 2)), np.full(3, trained), np.ones((4, 2))).tolist() == [1.0] * 4


def test_thousands_of_candidates_are_no_obstacle():
    source = random.Random(0)
    tried = np.array([[source.random(), source.random()] for _ in range(3_000)])
    found = chances(tried, tried[:, 0] > 0.1, np.array([[0.02, 0.5], [0.8, 0.5]]))
    assert found[0] < 0.4 < 0.8 < found[1]
