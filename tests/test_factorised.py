"""The factorised strategy, its surrogate, its choice of cascades and its limits, without any training."""

import heapq
import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau
from toys import score

from meme.errors import UserError
from meme.presets import preset
from meme_nas import kernel
from meme_nas.assembly import Assembly
from meme_nas.costs import Costs
from meme_nas.factorised import Factorised
from meme_nas.joint import Joint
from meme_nas.kernel import Candidates
from meme_nas.pareto import front, hypervolumes
from meme_nas.pick import best_sum
from meme_nas.settings import SearchSettings
from meme_nas.strategy import winner
from meme_nas.study import Study
from meme_nas.surrogate import Surrogate
from search_spaces.domain import Choice, Integer, Real, encoded
from search_spaces.splits import SplitSpace

BASE = preset("digits-meme")


def settings_in(folder, **changes) -> SearchSettings:
    return SearchSettings(**{"budget": 14, "study": folder, "strategy": "factorised"} | changes)


def opened(settings) -> Study:
    return Study(settings.folder, settings.in_force(), settings.objectives)


def run_through(settings, objective=score, workers: int = 1, source: random.Random | None = None) -> Factorised:
    """A whole search in this process, ``workers`` tasks at a time, which end in random order."""
    study = opened(settings)
    search, running = Factorised(settings, study), []
    while not search.done:
        while len(running) < workers and (task := search.next_task()):
            running.append(task)
        search.record(objective(running.pop(source.randrange(len(running)) if source else 0)))
    study.close()
    return search


def record_of(search) -> tuple:
    experts = [[trial.choices for trial in search.study.experts(n).records] for n in range(1, 5)]
    return experts, [(trial.kind, trial.choices) for trial in search.study.trials]


# --- The strategy ---------------------------------------------------------------------------------


def test_the_budget_is_spent_on_experts_and_no_cascade_needs_another_training(tmp_path):
    trained = []

    def objective(task):
        trained.append(task)
        return score(task)

    search = run_through(settings_in(tmp_path), objective)
    experts = [task for task in trained if task.expert]
    yardsticks = [task for task in trained if task.kind in ("multi-expert", "single-model")]
    assert len(experts) + 4 * len(yardsticks) == 14 * 4 == search.spent[0] == search.spent[1]
    known = {(task.expert, task.config.canonical_expert(task.expert)) for task in experts}
    assert len(known) == len(experts)
    for trial in search.study.trials:
        if trial.choices:
            assert all((n, trial.config.canonical_expert(n)) in known for n in range(1, 5))


def test_the_hand_made_pattern_is_the_first_candidate(tmp_path):
    search = run_through(settings_in(tmp_path, budget=4))
    for number in range(1, 5):
        trial = search.study.experts(number).records[0]
        assert trial.config.expert(number) == BASE.expert(number)
    assert [trial.kind for trial in search.study.trials[:3]] == ["hand-made", "multi-expert", "single-model"]


def test_no_cascade_is_scored_twice(tmp_path):
    trials = [trial for trial in run_through(settings_in(tmp_path, budget=20)).study.trials if trial.choices]
    assert len({trial.config.architecture_id for trial in trials}) == len(trials) > 40


def test_what_is_proposed_does_not_depend_on_who_runs_it_or_when_it_ends(tmp_path):
    alone = record_of(run_through(settings_in(tmp_path / "a", budget=18)))
    for workers in (2, 5):
        source = random.Random(workers)
        assert record_of(run_through(settings_in(tmp_path / f"{workers}", budget=18), score, workers, source)) == alone


@pytest.mark.parametrize("stop", [1, 9, 40, 47, 70])
def test_an_interrupted_search_goes_on_as_if_it_had_not_been(tmp_path, stop):
    unbroken = record_of(run_through(settings_in(tmp_path / "a")))
    settings = settings_in(tmp_path / "b")
    study = opened(settings)
    search, running = Factorised(settings, study), []
    for _ in range(stop):
        while len(running) < 3 and (task := search.next_task()):
            running.append(task)
        search.record(score(running.pop(0)))
    study.close()  # with tasks still running
    assert record_of(run_through(settings)) == unbroken


@pytest.mark.parametrize("workers, most", [(2, 0.02), (4, 0.03), (8, 0.08)])
def test_workers_hardly_wait_for_each_other(workers, most):
    """In a search whose trainings take 3.8 s and whose cascades take 0.7 s, on a clock of its own."""
    search = Factorised(SearchSettings(budget=30, proposal_lag=workers, device="cpu"), Study.in_memory())
    source, clock, worked, running = random.Random(0), 0.0, 0.0, []
    while not search.done:
        while len(running) < workers and (task := search.next_task()):
            seconds = 3.8 if task.expert else 0.7 if task.kind == "candidate" else 4 * 3.8
            seconds *= source.uniform(0.85, 1.15)
            worked += seconds
            heapq.heappush(running, (clock + seconds, task.number, task))
        clock, _, task = heapq.heappop(running)
        search.record(score(task))
    assert 0 <= 1 - worked / (clock * workers) < most


def test_cascades_know_the_scores_of_the_wave_before_them(tmp_path):
    """Other scores of a round's first cascades lead to other second ones, and to the same first ones."""

    def batches(sign):
        def objective(task):
            outcome = score(task)
            return outcome if task.expert else replace(outcome, fid=5 + sign * (outcome.fid - 5))

        trials = run_through(settings_in(tmp_path / str(sign), budget=8), objective).study.trials
        return [trial.choices for trial in trials if trial.candidates == 2]

    one, other = batches(1), batches(-1)
    assert len(one) == len(other) == 4
    assert one[:2] == other[:2] and one[2:] != other[2:]


def test_a_larger_budget_goes_on(tmp_path):
    first = record_of(run_through(settings_in(tmp_path, budget=13)))
    search = run_through(settings_in(tmp_path, budget=21))
    experts, cascades = record_of(search)
    assert [log[: 13 - 2] for log in experts] == first[0]
    assert cascades[: len(first[1])] == first[1] and len(cascades) > len(first[1])
    assert search.done and search.spent == (21 * 4, 21 * 4)


def test_a_budget_for_yardsticks_alone_is_enough(tmp_path):
    search = run_through(settings_in(tmp_path, budget=1))
    assert search.done and winner(search.study.trials).kind == "hand-made"


def test_a_failed_expert_is_in_no_cascade(tmp_path):
    def objective(task):
        return task.failed("diverged") if task.expert == 2 and task.number in (1, 3) else score(task)

    search = run_through(settings_in(tmp_path), objective)
    failed = [trial.choices for trial in search.study.experts(2).records if trial.state == "failed"]
    assert len(failed) == 2
    for trial in search.study.trials:
        if trial.choices:
            assert {name: trial.choices[name] for name in failed[0]} not in failed


def test_a_search_whose_expert_never_trains_ends(tmp_path):
    search = run_through(settings_in(tmp_path), lambda task: task.failed("no") if task.expert == 3 else score(task))
    assert search.done
    assert [trial.kind for trial in search.study.trials] == ["hand-made", "multi-expert", "single-model"]


def test_it_finds_the_best_cascade_of_its_bank(tmp_path):
    search = run_through(settings_in(tmp_path, budget=24))
    logs = [[trial.outcome.loss for trial in search.study.experts(n).records] for n in range(1, 5)]
    best = 1 + sum(map(min, logs))  # the toy's score is a sum
    assert min(trial.outcome.fid for trial in search.study.trials if trial.choices) == pytest.approx(best)


def test_it_beats_the_joint_strategy_with_half_the_training(tmp_path):
    def best(search) -> float:
        return min(trial.outcome.fid for trial in search.study.trials if trial.choices)

    ours, theirs = [], []
    for seed in range(3):
        ours.append(best(run_through(settings_in(tmp_path / f"f{seed}", budget=14, seed=seed))))
        settings = settings_in(tmp_path / f"j{seed}", budget=28, seed=seed, strategy="joint")
        study = opened(settings)
        search = Joint(settings, study)
        while (task := search.next_task()) is not None:
            search.record(score(task))
        theirs.append(best(search))
    assert sum(ours) < sum(theirs)


def test_rounds_are_as_long_as_keeps_all_workers_busy(tmp_path):
    for folder, lag, ends in (("a", None, list(range(1, 10))), ("b", 4, [2, 4, 6, 8, 9]), ("c", 16, [8, 9])):
        settings = settings_in(tmp_path / folder, budget=11, proposal_lag=lag)
        assert Factorised(settings, opened(settings)).rounds == ends


def test_rounds_grow_with_what_is_known(tmp_path):
    settings = settings_in(tmp_path, budget=52)
    assert Factorised(settings, opened(settings)).rounds == [*range(1, 32), *range(32, 50, 2), 50]


def test_several_training_seeds_share_the_budget(tmp_path):
    tasks = []
    search = run_through(settings_in(tmp_path, budget=12, training_seeds=3, seed=5), lambda t: tasks.append(t) or score(t))
    assert {task.seeds for task in tasks} == {(5, 6, 7)}
    assert len(search.study.experts(1).records) == 12 // 3 - 2


def test_a_warm_start_proposes_the_earlier_front_first(tmp_path):
    earlier = run_through(settings_in(tmp_path / "a", budget=20))
    best = [trial.choices for trial in front(earlier.study.trials) if trial.choices]
    search = run_through(settings_in(tmp_path / "b", budget=20, seed=1, warm_start=tmp_path / "a"))
    for number in range(1, 5):
        parts = [{k: v for k, v in choices.items() if k.startswith(f"expert{number}.")} for choices in best]
        log = [trial.choices for trial in search.study.experts(number).records]
        wanted = [part for place, part in enumerate(parts) if part not in parts[:place] and part != log[0]]
        assert log[1 : 1 + len(wanted)] == wanted


def test_dimensions_that_belong_to_all_experts_need_the_joint_strategy(tmp_path):
    assert SearchSettings(dimensions=("split", "experts")).strategy_name == "joint"
    settings = settings_in(tmp_path, dimensions=("split", "experts"), strategy="factorised")
    with pytest.raises(UserError, match="strategy: factorised searches expert by expert, and experts belong"):
        Factorised(settings, opened(settings))


@pytest.mark.parametrize("dimensions", [("split", "p", "time"), ("pool_stride", "high_pool", "low_pool")])
def test_other_dimensions_need_no_other_search(tmp_path, dimensions):
    search = run_through(settings_in(tmp_path, dimensions=dimensions))
    names = set(search.space.domains)
    assert all(set(trial.choices) == names for trial in search.study.trials if trial.choices)
    assert search.done and search.spent[0] == 14 * 4


# --- Limits ---------------------------------------------------------------------------------------


def test_costs_add_up_to_what_is_measured():
    costs = Costs(SearchSettings(objectives=("fid", "macs", "params")), SplitSpace(BASE))
    from meme.cost import ensemble_cost

    whole = ensemble_cost(BASE)
    assert costs.total(BASE) == pytest.approx([whole.macs, whole.params])


def test_limits_hold_for_every_cascade(tmp_path):
    limit = 3.845e6
    search = run_through(settings_in(tmp_path, max_macs=limit))
    candidates = [trial for trial in search.study.trials if trial.kind == "candidate"]
    assert candidates
    assert all(search.costs.total(trial.config)[0] <= limit for trial in candidates)


@pytest.mark.parametrize("field, value", [("max_macs", 1e6), ("max_params", 1e5)])
def test_a_limit_nothing_meets_is_refused(field, value):
    with pytest.raises(UserError, match=f"{field}: no candidate has so few"):
        Costs(SearchSettings(**{field: value}), SplitSpace(BASE)).check()


@pytest.mark.parametrize("objectives", [("macs", "fid"), ("fid", "kid"), ("fid", "macs", "macs"), ()])
def test_impossible_objectives_are_refused(objectives):
    with pytest.raises(ValueError, match="objectives: fid or kid first"):
        SearchSettings(objectives=objectives)


def test_hypervolume_grows_and_is_a_share():
    class Scored:
        state = "complete"

        def __init__(self, *values):
            self.scored = self
            self.values = lambda objectives: list(values)

    volumes = hypervolumes([Scored(2.0, 2.0), Scored(3.0, 3.0), Scored(1.0, 2.0)], ("fid", "macs"), (4.0, 4.0))
    assert volumes == pytest.approx([0.25, 0.25, 0.375])


# --- The best sum ---------------------------------------------------------------------------------

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


# --- The surrogate --------------------------------------------------------------------------------


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


# --- Choosing cascades ----------------------------------------------------------------------------


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
