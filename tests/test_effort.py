"""Effort of a search, counted from its record."""

from dataclasses import replace

import pytest
from toys import score

from meme_nas.forecast import effort_lines, ensembles_paid, planned
from meme_nas.record.effort import Effort, effort_of
from meme_nas.record.study import Study
from meme_nas.record.tasks import attempt
from meme_nas.report.words import effort_text
from meme_nas.settings import SearchSettings
from meme_nas.strategies.joint import Joint
from meme_nas.strategies.rungs import factorised

BATCH, STEPS, SAMPLER, SAMPLES = 32, 46, 20, 250  # of the digits' proxy trainings and scores


def trials_of(settings, objective=score) -> list:
    study = Study.in_memory(settings.objectives)
    search = Joint(settings, study) if settings.strategy_name == "joint" else factorised(settings, study)
    while not search.done:
        search.record(attempt(objective, search.next_task()))
    return search.every_trial


def test_joint_search_is_charged_for_every_training_and_makes_those_that_differ():
    trials = trials_of(SearchSettings(strategy="joint", budget=20, device="cpu", trunk_share=0.0))
    own = [trial for trial in trials if trial.choices]
    experts = {(number, trial.config.canonical_expert(number)) for trial in own for number in range(1, 5)}
    found = effort_of(trials)
    assert (found.charged, found.made) == (4 * 18, len(experts)) and len(experts) < 4 * 18  # the two other yardsticks left out
    alone = 4 * STEPS + 4 * STEPS  # the multi-expert model, and the single model, which trains as long
    assert found.training == 3 * BATCH * (STEPS * len(experts) + alone)
    assert found.scoring == 20 * SAMPLES * SAMPLER


def test_factorised_search_is_charged_for_its_candidates_and_not_for_cascades():
    trials = trials_of(SearchSettings(budget=10, device="cpu", trunk_share=0.0))
    scored = sum(not trial.expert for trial in trials)
    found = effort_of(trials)
    assert (found.charged, found.made) == (4 * 8, 4 * 8) and scored > 10
    assert found.training == 3 * BATCH * 4 * STEPS * (8 + 2)
    assert found.scoring == scored * SAMPLES * SAMPLER
    assert effort_of(trials, seeds=3) == Effort(3 * found.charged, 3 * found.made, 3 * found.training, 3 * found.scoring)


def test_what_workers_counted_is_what_it_took():
    def counted(task):
        return replace(score(task), training_passes=7 if task.expert else 0, scoring_passes=0 if task.expert else 3)

    trials = trials_of(SearchSettings(budget=6, device="cpu"), counted)
    found = effort_of(trials)
    assert (found.training, found.scoring) == (7 * 4 * 4, 3 * sum(not trial.expert for trial in trials))


def test_a_training_that_goes_on_is_charged_with_what_it_adds():
    settings = SearchSettings(budget=8, rungs=2, device="cpu", trunk_share=0.0)
    study = Study.in_memory(settings.objectives)
    search = factorised(settings, study)
    while not search.done:
        search.record(attempt(score, search.next_task()))
    short, long = ([trial for n in range(1, 5) for trial in log.experts(n).records] for log in (search.below.study, search.study))
    assert len(short) > len(long) > 0
    whole = effort_of([*long, *short])
    assert effort_of(search.every_trial).charged == whole.charged
    assert whole.charged == whole.made == pytest.approx((len(short) + len(long)) / 2)


def test_a_failed_training_is_charged():
    def failing(task):
        return task.failed("no") if task.expert == 3 and task.number == 1 else score(task)

    assert effort_of(trials_of(SearchSettings(budget=6, device="cpu"), failing)).charged == 16


def test_both_strategies_are_told_of_before_a_search():
    """They take the same passes in training, and not in scoring."""
    settings = SearchSettings(budget=10, device="cpu")
    joint = planned(SearchSettings(budget=10, device="cpu", strategy="joint"))
    own = planned(settings)
    assert own.charged == joint.charged == 40 and own.training == joint.training
    assert joint.scoring == 10 * SAMPLES * SAMPLER and own.scoring == (4 * 8 + 3) * SAMPLES * SAMPLER
    assert [line.partition(":")[0] for line in effort_lines(settings)] == ["factorised", "joint"]
    assert len(effort_lines(SearchSettings(dimensions=("split", "experts"), device="cpu"))) == 1  # has joint search alone


def test_a_budget_that_cannot_be_spent_is_told_of_before_the_search():
    settings = SearchSettings(dimensions=("p",), device="cpu")
    assert ensembles_paid(settings) == 10 + 2
    assert "38 of the budget of 50 stay unspent" in effort_lines(settings)[0]


def test_effort_is_told_before_latency_is_measured():
    limited = SearchSettings(budget=10, device="cpu", objectives=("fid", "latency_ms"), max_latency_ms=1.0)
    assert ensembles_paid(limited) == 10


def test_the_words_name_both_counts():
    said = effort_text(Effort(192.0, 113.0, 1_000_000, 3_000_000))
    assert said.startswith("113 trainings of an expert of 192 that the budget counts") and said.endswith("in scoring (75 %)")
