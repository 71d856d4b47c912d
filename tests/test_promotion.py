"""Successive halving of experts' candidates: what enters, what goes on, what it costs, and that training further is training."""

import itertools
import random
from collections import Counter
from functools import cache

import pytest
import torch
from test_factorised import opened, settings_in
from toys import score

from meme.config.presets import preset
from meme.data.images import open_images
from meme.training.interval_loss import hold_out
from meme.training.trainer import train_expert
from meme_nas.record.tasks import attempt
from meme_nas.settings import SearchSettings
from meme_nas.strategies.rungs import factorised
from meme_nas.worker.bank import ExpertBank

PROXY_STEPS = 125


def halved(folder, rungs: int = 2, **changes) -> SearchSettings:
    small = {"cascades_per_candidate": 2, "proxy_steps": PROXY_STEPS, "trunk_share": 0.0, "p_share": 0.0}
    return settings_in(folder, **{"rungs": rungs} | small | changes)


def run_through(settings, objective=score, workers: int = 1, source: random.Random | None = None, stop: int | None = None):
    """A whole search in this process, or ``stop`` tasks of it; tasks end in random order. The strategy, and the tasks it gave."""
    study = opened(settings)
    search, running, tasks, ended = factorised(settings, study), [], [], 0
    while not search.done and ended != stop:
        while len(running) < workers and (task := search.next_task()):
            running.append(task)
            tasks.append(task)
        search.record(attempt(objective, running.pop(source.randrange(len(running)) if source else 0)))
        ended += 1
    study.close()
    return search, tasks


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The search with so many rungs that one worker goes through, and its tasks; made once for each number."""
    return cache(lambda rungs: run_through(halved(tmp_path_factory.mktemp("whole"), rungs)))


def record_of(search) -> list:
    rungs = [search.study.rung(number) for number in range(search.settings.rungs)]
    experts = [[[trial.choices for trial in study.experts(n).records] for n in range(1, 5)] for study in rungs]
    return [experts, [[(trial.kind, trial.choices) for trial in study.trials] for study in rungs]]


@pytest.mark.parametrize("rungs", [1, 2, 3])
def test_the_budget_is_counted_in_steps(whole, rungs):
    search, tasks = whole(rungs)
    trained: dict = {}
    for task in tasks:
        for number in (task.expert,) if task.expert else range(1, len(task.config.experts) + 1):
            key = number, task.config.canonical_expert(number)
            trained[key] = max(trained.get(key, 0), task.config.training.steps)
    budget = 14 * 4 * PROXY_STEPS
    assert 0.85 * budget < sum(trained.values()) <= budget
    done, planned = search.spent
    assert done == planned and done * (1 if rungs > 1 else PROXY_STEPS) == sum(trained.values())


@pytest.mark.parametrize("rungs, lengths", [(2, {62: 16, 125: 8}), (3, {31: 24, 62: 12, 125: 6})])
def test_half_of_each_rung_goes_on_to_the_next(whole, rungs, lengths):
    _, tasks = whole(rungs)
    for number in range(1, 5):
        assert Counter(task.config.training.steps for task in tasks if task.expert == number) == lengths


def test_what_goes_on_was_at_the_rung_below_and_none_of_it_twice(whole):
    search, _ = whole(3)
    for number in range(1, 5):
        logs = [[trial.choices for trial in search.study.rung(rung).experts(number).records] for rung in (2, 1, 0)]
        for below, above in itertools.pairwise(logs):
            assert all(choices in below for choices in above)
            assert all(above.count(choices) == 1 for choices in above)
        assert logs[0][0] == logs[1][0] == logs[2][0]  # the hand-made pattern is in every rung


def test_the_better_ones_go_on(tmp_path):
    search, _ = run_through(halved(tmp_path, budget=24, objectives=("fid",)))  # the toy's loss is the expert's contribution
    for number in range(1, 5):
        low, high = (search.study.rung(rung).experts(number).records for rung in (1, 0))
        gone_on = [trial.choices for trial in high[1:]]
        losses = {repr(trial.choices): trial.outcome.loss for trial in low}
        left = [loss for choices, loss in losses.items() if choices not in map(repr, gone_on)]
        assert sorted(losses[repr(choices)] for choices in gone_on)[len(gone_on) // 2] < sorted(left)[len(left) // 2]


def test_the_cheapest_goes_on_beside_the_best(tmp_path):
    below = run_through(halved(tmp_path, budget=12))[0].below
    for number in range(1, 5):
        best = below.ranked(number, len(below.rounds) - 1)
        logs = below.study.experts(number).records
        costs = [below.costs.of(trial.config, number)[0] for c in best for trial in logs if trial.choices == c][: len(best)]
        front = next(place for place in range(1, len(costs) + 1) if place == len(costs) or costs[place] >= costs[place - 1])
        assert min(costs) in costs[:front]  # the first rank: ever cheaper as it gets worse, down to the cheapest


def test_cascades_are_of_one_rung_and_the_results_are_of_the_highest(tmp_path):
    search, tasks = run_through(halved(tmp_path, budget=20))
    for task in tasks:
        assert task.config.training.steps == PROXY_STEPS // 2**task.rung or task.kind == "single-model"
    assert {trial.config.training.steps for trial in search.study.trials if trial.choices} == {PROXY_STEPS}
    assert len({task.name for task in tasks}) == len(tasks)


@pytest.mark.parametrize("rungs", [2, 3])
def test_what_is_promoted_does_not_depend_on_who_runs_it_or_when_it_ends(tmp_path, whole, rungs):
    alone = record_of(whole(rungs)[0])
    for workers in (2, 5):
        source = random.Random(workers)
        settings = halved(tmp_path / f"{workers}", rungs)
        assert record_of(run_through(settings, score, workers, source)[0]) == alone


@pytest.mark.parametrize("stop", [1, 9, 30, 47, 70, 110])
def test_an_interrupted_search_goes_on_as_if_it_had_not_been(tmp_path, whole, stop):
    run_through(halved(tmp_path), workers=3, stop=stop)  # with tasks still running
    assert record_of(run_through(halved(tmp_path))[0]) == record_of(whole(2)[0])


def test_a_larger_budget_goes_on(tmp_path):
    first = record_of(run_through(halved(tmp_path, budget=13))[0])
    search, _ = run_through(halved(tmp_path, budget=21))
    experts, cascades = record_of(search)
    for rung in (0, 1):
        assert [log[: len(old)] for log, old in zip(experts[rung], first[0][rung], strict=True)] == first[0][rung]
        assert cascades[rung][: len(first[1][rung])] == first[1][rung] and len(cascades[rung]) > len(first[1][rung])
    assert search.done


def test_what_failed_does_not_go_on(tmp_path):
    def objective(task):
        return task.failed("diverged") if task.expert == 2 and task.rung and task.number in (1, 3) else score(task)

    search, _ = run_through(halved(tmp_path), objective)
    failed = [trial.choices for trial in search.study.rung(1).experts(2).records if trial.state == "failed"]
    assert len(failed) == 2
    assert not any(trial.choices in failed for trial in search.study.experts(2).records)


def test_rungs_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="rungs: more than 1 needs strategy factorised"):
        SearchSettings(rungs=2, strategy="joint")
    with pytest.raises(ValueError, match="rungs: 3 times half of the proxy length is less than one step; at most 3 here"):
        SearchSettings(rungs=4, proxy_steps=4)
    assert SearchSettings(rungs=3, proxy_steps=4).rungs == 3


def test_an_expert_promoted_twice_is_the_one_trained_at_once(tmp_path):
    train, held_out = hold_out(open_images("digits", size=8, channels=1))
    base, bank = preset("digits-meme").with_(training={"batch_size": 8}), ExpertBank(tmp_path / "bank", train, held_out)
    for steps in (7, 14, 28):
        config = base.with_(training={"steps": steps})
        banked = bank.obtain(config, 2)
    at_once = train_expert(config, 2, train)
    weights = bank.load(config, 2, banked).state_dict()
    assert all(torch.equal(weights[name], value) for name, value in at_once.state_dict().items())
    assert len(banked.curve) == 4  # a report at the end of each rung, and at step 25: no step was taken twice
