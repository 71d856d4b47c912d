"""What candidates contribute, which sum is best, and which cascades are chosen: the numbers behind the factorised search."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau

from meme_nas.surrogate import kernel
from meme_nas.surrogate.best_cascade import best_sum
from meme_nas.surrogate.choose_cascades import Assembly
from meme_nas.surrogate.kernel import Candidates
from meme_nas.surrogate.model import Surrogate
from search_spaces.domain import Choice, Integer, Real, encoded

# --- The surrogate -------------------------------------------------------------------------------


def sums(experts: int = 4, candidates: int = 10, scored: int = 60, noise: float = 0.05, seed: int = 0):
    """Candidates with a smooth and an own contribution each, and cascades whose score is their sum."""
    source = np.random.default_rng(seed)
    choices = [source.random((candidates, 3)) for _ in range(experts)]
    truth = [np.sin(3 * x[:, 0]) + 2 * x[:, 2] + 0.3 * source.standard_normal(candidates) for x in choices]
    losses = [0.2 * each + 0.2 * source.standard_normal(candidates) for each in truth]
    cascades = source.integers(0, candidates, (scored, experts))
    scores = sum(truth[n][cascades[:, n]] for n in range(experts)) + noise * source.standard_normal(scored)
    return [Candidates(x, loss) for x, loss in zip(choices, losses, strict=True)], truth, cascades, scores


def test_the_surrogate_ranks_cascades_it_has_not_seen():
    known, truth, cascades, scores = sums()
    others = np.random.default_rng(1).integers(0, 10, (200, 4))
    expected = sum(truth[n][others[:, n]] for n in range(4))
    assert kendalltau(Surrogate(known, cascades, scores).predict(others), expected).statistic > 0.85


def test_it_learns_which_choices_matter_to_which_expert():
    """So that it knows candidates apart that nobody has trained."""
    source = np.random.default_rng(0)
    choices = [source.random((10, 3)) for _ in range(4)]
    new = source.random((50, 3))

    def truth(expert, x):
        return 0.3 * np.abs(x[:, expert % 3] - 0.3)  # one choice each, and not the same one

    cascades = source.integers(0, 10, (40, 4))
    scores = sum(truth(n, choices[n])[cascades[:, n]] for n in range(4)) + 0.002 * source.standard_normal(40)
    losses = [source.random(10) for _ in range(4)]  # which say nothing
    model = Surrogate([Candidates(x, loss) for x, loss in zip(choices, losses, strict=True)], cascades, scores)
    for n in range(4):
        assert kendalltau(model.expected(n + 1, new), truth(n, new)).statistic > 0.6


def test_many_scores_choose_the_kernel_by_some_of_them(monkeypatch):
    known, truth, cascades, scores = sums(scored=120)
    monkeypatch.setattr(kernel, "MOST_TO_CLIMB", 40)
    others = np.random.default_rng(1).integers(0, 10, (200, 4))
    expected = sum(truth[n][others[:, n]] for n in range(4))
    assert kendalltau(Surrogate(known, cascades, scores).predict(others), expected).statistic > 0.9


def test_contributions_come_with_an_honest_deviation():
    inside = []
    for seed in range(6):
        known, truth, cascades, scores = sums(seed=seed, scored=40)
        model = Surrogate(known, cascades, scores)
        for number in range(1, 5):
            mean, deviation = model.contributions(number)
            expected = truth[number - 1] - truth[number - 1].mean()
            inside += list(np.abs(mean - mean.mean() - expected) < 2 * deviation)
    assert 0.85 < np.mean(inside) <= 1.0


def test_draws_scatter_as_contributions_say():
    known, _, cascades, scores = sums(scored=25)
    model = Surrogate(known, cascades, scores)
    drawn = model.draws(4_000, np.random.default_rng(0), [np.arange(10)] * 4)
    for number, (kept, values) in enumerate(drawn, start=1):
        mean, deviation = model.contributions(number)
        assert kept.tolist() == list(range(10))
        assert values.mean(axis=0) == pytest.approx(mean, abs=0.1 * deviation.max())
        assert values.std(axis=0) == pytest.approx(deviation, rel=0.1)


def test_scores_scaled_or_shifted_move_predictions_alike():
    known, _, cascades, scores = sums()
    plain, moved = Surrogate(known, cascades, scores), Surrogate(known, cascades, 7 * scores - 100)  # none is positive
    assert moved.predict(cascades) == pytest.approx(7 * plain.predict(cascades) - 100)
    assert moved.contributions(1)[1] == pytest.approx(7 * plain.contributions(1)[1])


def test_scores_that_multiply_are_understood_as_well():
    known, truth, cascades, scores = sums()
    others = np.random.default_rng(1).integers(0, 10, (200, 4))
    expected = np.exp(sum(truth[n][others[:, n]] for n in range(4)))
    predicted = Surrogate(known, cascades, np.exp(scores)).predict(others)
    assert np.corrcoef(np.log(predicted), np.log(expected))[0, 1] > 0.97
    assert np.median(np.abs(predicted / expected - 1)) < 0.2


@pytest.mark.parametrize("scores", [[3.0], [3.0, 3.0, 3.0]])
def test_one_score_or_equal_ones_are_enough(scores):
    known, *_ = sums(candidates=3)
    model = Surrogate(known, [(0, 1, 2, 0)] * len(scores), scores)
    assert np.isfinite(model.predict([(1, 1, 1, 1)])).all()


def test_missing_losses_are_no_obstacle():
    known, _, cascades, scores = sums()
    without = [Candidates(each.choices, np.full(10, np.nan)) for each in known]
    assert np.isfinite(Surrogate(without, cascades, scores).predict(cascades)).all()


def test_numbers_stand_near_where_choices_are():
    domains = {"a": Integer(0, 32, 8), "b": Real(0.1, 1.0, 0.1), "c": Choice(("x", "y"))}
    assert encoded(domains, {"a": 16, "b": 1.0, "c": "y"}) == [0.5, 1.0, 0.0, 1.0]


# --- The best sum --------------------------------------------------------------------------------

columns = st.lists(st.lists(st.tuples(st.floats(-5, 5), st.floats(0, 5)), min_size=1, max_size=5), min_size=1, max_size=4)


@given(columns, st.floats(0, 20))
@example([[(0.0, 0.0), (-1.0, 3.0)]] * 3, 6.0)  # at every price all three or none, where two fit
@settings(max_examples=150)
def test_the_best_sum_keeps_its_limit_and_is_near_the_best(table, limit):
    values = [np.array([value for value, _ in column]) for column in table]
    costs = [np.array([[cost] for _, cost in column]) for column in table]
    every = list(itertools.product(*(range(len(column)) for column in table)))

    def total(parts, chosen):
        return float(sum(part[place].sum() for part, place in zip(parts, chosen, strict=True)))

    chosen = best_sum(values, costs, np.array([limit]))
    fitting = [other for other in every if total(costs, other) <= limit]
    if not fitting:
        assert total(costs, chosen) == pytest.approx(min(total(costs, other) for other in every))
        return
    assert total(costs, chosen) <= limit * (1 + 1e-9) + 1e-12
    best = min(total(values, other) for other in fitting)
    if best == pytest.approx(min(total(values, other) for other in every)):
        assert total(values, chosen) == pytest.approx(best)  # the limit is not in the way
    assert total(values, chosen) <= best + max(np.ptp(value) for value in values) + 1e-9


# --- Choosing cascades ---------------------------------------------------------------------------


def assembly(limit: float = np.inf, sizes=(3, 4, 2)) -> Assembly:
    ready = tuple(np.arange(size) for size in sizes)
    costs = tuple(np.arange(size, dtype=float)[:, None] for size in sizes)
    return Assembly(ready, costs, np.array([limit]), np.array([limit]))


@given(st.integers(0, 40), st.integers(0, 2**32 - 1))
@settings(max_examples=50)
def test_chosen_cascades_are_new_and_as_many_as_there_are(count, seed):
    known = {(0, 0, 0), (1, 3, 1)}
    chosen = assembly().choose(count, known, None, np.random.default_rng(seed))
    assert len(chosen) == len(set(chosen)) <= min(count, 3 * 4 * 2 - 2)
    assert not known & set(chosen)
    assert len(chosen) >= min(count, 12)


def test_chosen_cascades_keep_limits():
    chosen = assembly(limit=2.0).choose(30, set(), None, np.random.default_rng(0))
    assert chosen and all(sum(cascade) <= 2 for cascade in chosen)


def test_the_model_is_followed():
    known, truth, cascades, scores = sums(experts=3)
    chosen = Assembly(
        tuple(np.arange(10) for _ in range(3)),
        tuple(np.zeros((10, 0)) for _ in range(3)),
        np.zeros(0),
        np.zeros(0),
    ).choose(20, set(), Surrogate(known, cascades, scores), np.random.default_rng(0))
    value = [sum(truth[n][place] for n, place in enumerate(cascade)) for cascade in chosen]
    every = [sum(truth[n][place] for n, place in enumerate(c)) for c in itertools.product(range(10), repeat=3)]
    assert np.median(value) < np.quantile(every, 0.1)
