"""Winner and yardsticks scored again with fresh noise, as tasks of an engine."""

from dataclasses import replace

import pytest
from toys import score

from meme_nas.record.study import Study
from meme_nas.rescoring.audit import Audit
from meme_nas.rescoring.chosen import Chosen
from meme_nas.rescoring.finalists import FRESH_SEEDS, Finalists
from meme_nas.settings import SearchSettings
from meme_nas.strategies.factorised import Factorised

YARDSTICKS = ["hand-made", "multi-expert", "single-model"]


def searched(folder, **changes):
    small = {"budget": 16, "study": folder, "training_seeds": 2, "p_share": 0.0}
    settings = SearchSettings(**small | changes)
    search = Factorised(settings, Study(folder, settings.in_force(), settings.objectives))
    while not search.done:
        search.record(score(search.next_task()))
    return settings, search


def finalists_of(settings, search, audit=None):
    return Finalists(settings, search, Chosen(settings, search, audit))


def fresh(task):
    """The noise of every seed moves the score."""
    return replace(score(task), fid=score(task).fid + task.config.evaluation.seed / 100)


def work_through(finalists):
    tasks = []
    while not finalists.done:
        tasks.append(finalists.next_task())
        finalists.record(fresh(tasks[-1]))
    return tasks


def test_winner_and_yardsticks_are_scored_with_every_fresh_seed_and_all_samples(tmp_path):
    settings, search = searched(tmp_path)
    finalists = finalists_of(settings, search)
    tasks = work_through(finalists)
    assert [trial.kind for trial in finalists.chosen] == [*YARDSTICKS, "candidate"] and finalists.chosen[
        -1
    ] is finalists._chosen.best
    assert [task.config.evaluation.seed for task in tasks] == 4 * list(FRESH_SEEDS)
    assert {task.config.evaluation.samples for task in tasks} == {settings.full_config().evaluation.samples}
    assert all(task.kind == "finalist" and task.seeds == settings.seeds == (0, 1) for task in tasks)
    for trial, each in zip(finalists.chosen, finalists.results(), strict=True):
        assert each.trial is trial and each.samples == settings.full_config().evaluation.samples
        assert each.scores == pytest.approx([trial.scored.fid + seed / 100 for seed in FRESH_SEEDS])


def test_interrupted_it_goes_on_and_done_it_is_not_repeated(tmp_path):
    settings, search = searched(tmp_path)
    finalists = finalists_of(settings, search)
    finalists.record(fresh(finalists.next_task()))
    finalists.next_task()  # and is killed
    search.study.close()
    search = Factorised(settings, Study(tmp_path, settings.in_force(), settings.objectives))
    assert len(work_through(finalists_of(settings, search))) == 12 - 1
    assert finalists_of(settings, search).done and finalists_of(settings, search).next_task() is None


def test_of_a_larger_budget_only_another_winner_is_scored(tmp_path):
    settings, search = searched(tmp_path)
    before = finalists_of(settings, search)
    work_through(before)
    search.study.close()
    settings, search = searched(tmp_path, budget=40)
    after = finalists_of(settings, search)
    assert after._chosen.best.scored.fid < before._chosen.best.scored.fid
    assert len(work_through(after)) == len(FRESH_SEEDS) and len(after.results()) == 4


def test_a_finalist_that_failed_is_left_out_and_scored_by_the_next_command(tmp_path):
    settings, search = searched(tmp_path)
    finalists = finalists_of(settings, search)
    lost = finalists.next_task()
    finalists.record(lost.failed("its worker process died"))
    again = finalists.next_task()
    assert again.config == lost.config
    finalists.record(again.failed("its worker process died"))
    work_through(finalists)
    assert [each.trial.kind for each in finalists.results()] == [*YARDSTICKS[1:], "candidate"]
    again = finalists_of(settings, search)
    assert len(work_through(again)) == 1 and len(again.results()) == 4


def test_the_winner_is_the_one_the_audit_crowned(tmp_path):
    settings, search = searched(tmp_path, training_seeds=1)
    audit = Audit(settings, search)
    crowned = audit.chosen[-1]
    while not audit.done:
        task = audit.next_task()
        is_best = task.config.experts == crowned.config.experts
        audit.record(replace(score(task), fid=0.1 if is_best else 9.0, fids=(0.1 if is_best else 9.0,), macs=crowned.scored.macs))
    assert crowned.scored.macs <= search.study.trials[0].scored.macs
    assert finalists_of(settings, search, audit)._chosen.best is crowned


def test_where_no_trial_was_scored_there_is_nothing_to_do(tmp_path):
    settings = SearchSettings(budget=4, study=tmp_path)
    search = Factorised(settings, Study(tmp_path, settings.in_force(), settings.objectives))
    while not search.done:
        search.record(search.next_task().failed("out of memory"))
    finalists = finalists_of(settings, search)
    assert finalists.done and finalists._chosen.best is None and finalists.results() == []
