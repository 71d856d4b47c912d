"""The factorised strategy and its limits, without any training."""

import heapq
import random
from dataclasses import replace

import numpy as np
import pytest
from searches import record_of_choices, searched
from toys import score

from meme.config.presets import preset
from meme.errors import UserError
from meme.scoring.cost import ensemble_cost
from meme_nas.record.ranking import front, hypervolumes, winner
from meme_nas.record.study import Study
from meme_nas.record.tasks import attempt
from meme_nas.settings import SearchSettings
from meme_nas.strategies.factorised import Factorised
from meme_nas.strategies.joint import Joint
from meme_nas.strategies.rungs import factorised
from meme_nas.surrogate.choose_cascades import Assembly
from meme_nas.surrogate.costs import Costs
from search_spaces.space import SplitSpace

BASE = preset("digits-meme")
OBJECTIVES = ("fid", "macs")


def settings_in(folder, **changes) -> SearchSettings:
    return SearchSettings(**{"budget": 14, "study": folder, "strategy": "factorised", "p_share": 0.0} | changes)


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


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A whole search with one worker, and the tasks that it gave."""
    tasks = []
    return run_through(settings_in(tmp_path_factory.mktemp("unbroken")), lambda task: tasks.append(task) or score(task)), tasks


@pytest.fixture(scope="module")
def of_20_candidates(tmp_path_factory):
    return run_through(settings_in(tmp_path_factory.mktemp("of 20") / "study", budget=20))


def record_of(search) -> tuple:
    experts = [[trial.choices for trial in search.study.experts(n).records] for n in range(1, 5)]
    return experts, [(trial.kind, trial.choices) for trial in search.study.trials]


# --- The strategy --------------------------------------------------------------------------------


def test_the_budget_is_spent_on_experts_and_no_cascade_needs_another_training(unbroken):
    search, trained = unbroken
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


def test_no_cascade_is_scored_twice(of_20_candidates):
    trials = [trial for trial in of_20_candidates.study.trials if trial.choices]
    assert len({trial.config.architecture_id for trial in trials}) == len(trials) > 40


@pytest.mark.parametrize("workers", [2, 5])
def test_what_is_proposed_does_not_depend_on_who_runs_it_or_when_it_ends(tmp_path, unbroken, workers):
    assert record_of(run_through(settings_in(tmp_path), score, workers, random.Random(workers))) == record_of(unbroken[0])


@pytest.mark.parametrize("stop", [1, 9, 40, 47, 70])
def test_an_interrupted_search_goes_on_as_if_it_had_not_been(tmp_path, unbroken, stop):
    settings = settings_in(tmp_path)
    study = opened(settings)
    search, running = Factorised(settings, study), []
    for _ in range(stop):
        while len(running) < 3 and (task := search.next_task()):
            running.append(task)
        search.record(score(running.pop(0)))
    study.close()  # with tasks still running
    assert record_of(run_through(settings)) == record_of(unbroken[0])


@pytest.mark.parametrize("workers, most", [(2, 0.02), (4, 0.03), (8, 0.08)])
def test_workers_hardly_wait_for_each_other(workers, most):
    """In a search whose trainings take 3.8 s and whose cascades take 0.7 s, on a clock of its own."""
    search = Factorised(
        SearchSettings(budget=30, proposal_lag=workers, device="cpu", p_share=0.0), Study.in_memory(("fid", "macs"))
    )
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


def test_one_cascade_in_four_looks_for_the_front_from_the_first_rounds_on(monkeypatch):
    """In a whole search at the defaults, whose waves have two cascades each."""
    asked, front_first = [], Assembly._front_first

    def counted(self, *arguments):
        asked.append(len(study.trials))
        return front_first(self, *arguments)

    monkeypatch.setattr(Assembly, "_front_first", counted)
    settings = SearchSettings(device="cpu", p_share=0.0)
    study = Study.in_memory(settings.objectives)
    search = Factorised(settings, study)
    while not search.done:
        search.record(score(search.next_task()))
    cascades = sum(trial.kind == "candidate" for trial in study.trials)
    assert cascades > 150 and len(asked) / cascades == pytest.approx(0.25, abs=0.05)
    early = sum(trial < 60 for trial in asked)
    assert early / 57 == pytest.approx(0.25, abs=0.05)  # trials 3 to 59 are cascades


def test_a_search_for_the_score_alone_looks_for_no_front(monkeypatch):
    monkeypatch.setattr(Assembly, "_front_first", None)
    study = Study.in_memory(("fid",))
    search = Factorised(SearchSettings(objectives=("fid",), budget=12, device="cpu"), study)
    while not search.done:
        search.record(score(search.next_task()))
    assert len(study.trials) > 20


@pytest.mark.parametrize("stop", [37, 38, 39, 40])
def test_a_round_that_an_earlier_version_began_is_ended_without_a_repeat(tmp_path, monkeypatch, stop):
    settings = settings_in(tmp_path, budget=12)
    with monkeypatch.context() as earlier:
        earlier.setattr(Assembly, "_hopeful", lambda self, model, count, *_: self._at_random(count, np.random.default_rng(5)))
        begun = record_of_choices(searched(settings, stop=stop))[-3]
    cascades = record_of_choices(searched(settings))[-3]
    assert cascades[: len(begun)] == begun
    tried = [tuple(choices.items()) for kind, choices, _ in cascades if kind in ("candidate", "hand-made")]
    assert len(set(tried)) == len(tried) == 1 + 4 * 9  # ten candidates, and no cascade but the hand-made one of the first


def test_a_larger_budget_goes_on(tmp_path):
    first = record_of(run_through(settings_in(tmp_path, budget=13)))
    search = run_through(settings_in(tmp_path, budget=21))
    experts, cascades = record_of(search)
    assert [log[: 13 - 2] for log in experts] == first[0]
    assert cascades[: len(first[1])] == first[1] and len(cascades) > len(first[1])
    assert search.done and search.spent == (21 * 4, 21 * 4)


@pytest.mark.parametrize(
    "told, each",
    [
        ({}, [15] * 4),  # the splits of an expert, whose p is chosen last
        ({"dimensions": ("p",)}, [10] * 4),
        ({"sampler": "tpe"}, [15] * 4),
        ({"rungs": 2}, [15] * 4),
        ({"max_macs": 0.99 * ensemble_cost(BASE).macs}, None),
    ],
)
def test_a_search_ends_with_the_last_candidate_that_there_is(told, each):
    """With ``--dimensions p`` 38 of an expert's 48 candidates were repeats, and 188 cascades were scored, without a word."""
    settings = SearchSettings(**{"strategy": "factorised", "device": "cpu"} | told)
    search = factorised(settings, Study.in_memory(settings.objectives))
    while not search.done:
        search.record(attempt(score, search.next_task()))
    lowest = search.below if settings.rungs > 1 else search
    logs = [lowest.study.experts(number).records for number in range(1, 5)]
    found = [[trial.config.canonical_expert(n) for trial in log] for n, log in enumerate(logs, start=1)]
    assert search.exhausted and search.spent[0] == search.spent[1]
    assert each is None or [len(set(experts)) for experts in found] == list(map(len, found)) == each
    if "max_macs" in told:  # what fits beside the cheapest others was all tried, and most of the 15 do not
        fitting = [roster.limit for roster in search._rosters.values()]
        assert [len(set(experts)) for experts in found] == fitting and max(fitting) < 15
    cascades = [trial for trial in search.study.trials if trial.kind == "candidate"]
    assert len(cascades) <= 4 * max(map(len, found))


def test_a_study_that_an_earlier_version_let_repeat_candidates_goes_on(monkeypatch):
    settings = SearchSettings(strategy="factorised", device="cpu", dimensions=("p",))
    study = Study.in_memory(settings.objectives)
    monkeypatch.setattr(Factorised, "most", 10_000)
    search = Factorised(settings, study)
    while len(study.trials) < 60:
        search.record(score(search.next_task()))
    monkeypatch.undo()
    search = Factorised(settings, study)
    while not search.done:
        search.record(score(search.next_task()))
    assert search.exhausted and search.spent == (4 * 10 + 4 * 2, 4 * 10 + 4 * 2)


def test_a_budget_for_yardsticks_alone_is_enough(tmp_path):
    search = run_through(settings_in(tmp_path, budget=1))
    assert search.done and winner(search.study.trials, OBJECTIVES).kind == "hand-made"


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


def test_it_beats_the_joint_strategy_with_half_the_training(tmp_path, unbroken):
    def best(search) -> float:
        return min(trial.outcome.fid for trial in search.study.trials if trial.choices)

    ours, theirs = [], []
    for seed in range(3):
        ours.append(best(run_through(settings_in(tmp_path / f"f{seed}", seed=seed)) if seed else unbroken[0]))
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


def test_a_warm_start_proposes_the_earlier_front_first(tmp_path, of_20_candidates):
    earlier = of_20_candidates
    limit = earlier.study.trials[0].scored.macs
    found = sorted(front(earlier.study.trials, OBJECTIVES), key=lambda t: (t.scored.macs > limit, t.scored.fid))
    assert found[0].number == winner(earlier.study.trials, OBJECTIVES).number
    best = [trial.choices for trial in found]
    search = run_through(settings_in(tmp_path, budget=20, seed=1, warm_start=earlier.settings.folder))
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


# --- Limits --------------------------------------------------------------------------------------


def test_costs_add_up_to_what_is_measured():
    costs = Costs(SearchSettings(objectives=("fid", "macs", "params")), SplitSpace(BASE))
    from meme.scoring.cost import ensemble_cost

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
