"""The audit of the proxy: what is chosen, how agreement is measured, and what is said of it."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import kendalltau
from toys import score

from meme.presets import preset
from meme_nas.audit import Audit, agreements, audited_winner, pick, signals_of
from meme_nas.factorised import Factorised
from meme_nas.report_words import audit_verdict
from meme_nas.settings import SearchSettings
from meme_nas.study import Study
from meme_nas.summary import Agreement, Rescored
from meme_nas.trial import Outcome
from meme_nas.trial_log import TrialRecord

BASE = preset("digits-meme")


def searched(folder, **changes):
    settings = SearchSettings(**{"budget": 8, "study": folder, "audit_size": 6, "audit_seeds": 3, "p_share": 0.0} | changes)
    search = Factorised(settings, Study(folder, settings.in_force(), settings.objectives))
    while not search.done:
        search.record(score(search.next_task()))
    return settings, search


def longer(task) -> Outcome:
    """Other seeds move the score, and more training lowers it."""
    found = score(task)
    fids = tuple(found.fid / 2 + 0.01 * seed for seed in task.seeds)
    return replace(found, fid=float(np.mean(fids)), fids=fids)


def audited(settings, search) -> Audit:
    audit = Audit(settings, search)
    while not audit.done:
        audit.record(longer(audit.next_task()))
    return audit


def record(number: int, fid: float, macs: float = 1.0, kind: str = "candidate") -> TrialRecord:
    return TrialRecord(number, "complete", kind, BASE, {"expert1.p": 0.5}, "", Outcome(number, fid=fid, fids=(fid,), macs=macs))


def test_finalists_and_a_random_sample_are_trained_longer_with_several_seeds(tmp_path):
    settings, search = searched(tmp_path)
    audit, tasks = Audit(settings, search), []
    while not audit.done:
        tasks.append(audit.next_task())
        audit.record(longer(tasks[-1]))
    proxy = search.space.base.training.steps
    assert len(tasks) == 6 * 3 and audit.spent == (18, 18)
    assert all(task.config.training.steps == 2 * proxy and task.kind == "audit" for task in tasks)
    assert [task.seeds for task in tasks] == 6 * [(0,), (1,), (2,)]
    assert all(task.config.training.seed == task.seeds[0] for task in tasks)
    assert all(task.config.experts == search.space.base.experts for task in tasks[:3])
    assert [each.trial for each in audit.results()] == audit.chosen
    assert all(np.ptp(each.scores) == pytest.approx(0.02) for each in audit.results()), "one score a seed"


@pytest.mark.parametrize(("budget", "count"), [(1, 4), (8, 4), (30, 5), (50, 8), (1_000, 8)])
def test_the_audit_grows_with_the_budget_up_to_eight_configurations(budget, count):
    settings = SearchSettings(budget=budget)
    trials = [record(0, fid=20.0, kind="hand-made"), *(record(number, fid=float(number)) for number in range(1, 40))]
    chosen = [trial.number for trial in pick(trials, settings)]
    assert len(chosen) == count == settings.audited
    assert {0, 1} <= set(chosen) and max(chosen) > 3, "hand-made, best and at least one that is no finalist"


@pytest.mark.parametrize("seed", range(5))
def test_the_sample_reaches_over_the_range_of_scores_though_most_are_alike(seed):
    """Drawn from all alike, it would be of what is nearly as good as the winner, whose order is chance."""
    alike = [record(number, fid=2.0 + number / 1e4) for number in range(1, 180)]
    trials = [record(0, fid=2.6, kind="hand-made"), *alike, *(record(number, fid=number / 80) for number in range(180, 240, 10))]
    chosen = pick(trials, SearchSettings(budget=50, seed=seed))
    others = sorted(trial.outcome.fid for trial in chosen[4:])
    assert len(chosen) == 8 and others[0] < 2.3 and others[-1] > 2.6
    assert min(np.diff(others)) > 0.01


def test_the_choice_is_the_same_whenever_it_is_asked_for(tmp_path):
    settings, search = searched(tmp_path)
    first = [trial.number for trial in pick(search.study.trials, settings)]
    assert first == [trial.number for trial in pick(search.study.trials, settings)] and len(set(first)) == 6


def test_an_interrupted_audit_goes_on_and_a_finished_one_is_not_repeated(tmp_path):
    settings, search = searched(tmp_path)
    audit = Audit(settings, search)
    audit.record(longer(audit.next_task()))
    audit.next_task()  # and is killed
    search.study.close()
    search = Factorised(settings, Study(tmp_path, settings.in_force(), settings.objectives))
    again = Audit(settings, search)
    tasks = []
    while not again.done:
        tasks.append(again.next_task())
        again.record(longer(tasks[-1]))
    assert len(tasks) == 6 * 3 - 1
    assert Audit(settings, search).done and len(Audit(settings, search).results()) == 6


def test_a_seed_that_failed_is_run_again(tmp_path):
    settings, search = searched(tmp_path)
    audit = Audit(settings, search)
    first = audit.next_task()
    audit.record(first.failed("out of memory"))
    assert not audit.done and audit.spent[0] == 0
    tasks = []
    while not audit.done:
        tasks.append(audit.next_task())
        audit.record(longer(tasks[-1]))
    assert tasks[0].config == first.config and tasks[0].number != first.number
    assert [each.trial for each in audit.results()] == audit.chosen


def test_a_configuration_that_fails_with_one_seed_is_left_out_until_the_next_command(tmp_path):
    settings, search = searched(tmp_path)
    audit = Audit(settings, search)
    lost = audit.next_task()
    audit.record(lost.failed("out of memory"))
    while not audit.done:
        task = audit.next_task()
        audit.record(task.failed("out of memory") if task.config == lost.config else longer(task))
    assert [each.trial for each in audit.results()] == audit.chosen[1:]
    again = Audit(settings, search)
    assert not again.done and again.next_task().config == lost.config


def test_an_audit_from_before_seeds_were_trials_is_made_again(tmp_path):
    settings, search = searched(tmp_path)
    task = Audit(settings, search).next_task()
    search.study.audit().finish(replace(longer(task), fids=(1.0, 2.0, 3.0)))
    audit = Audit(settings, search)
    assert audit.spent == (0, 18) and audit.next_task().config == task.config


def test_a_ranking_that_holds_is_trusted(tmp_path):
    settings, search = searched(tmp_path, audit_size=10)
    results = audited(settings, search).results()
    found = agreements(results, signals_of(results, search))
    assert [each.signal for each in found] == ["score at proxy length", "surrogate", "sum of interval losses"]
    assert found[0].tau == pytest.approx(1.0) and found[0].low > 0.5
    assert audit_verdict(found, 3).startswith("The proxy's ranking deserves trust")


def test_agreement_is_scipys_tau_within_its_interval():
    source = np.random.default_rng(0)
    results = [Rescored(record(n, n), (float(source.normal(n, 4)),)) for n in range(12)]
    (found,) = agreements(results, {"x": list(range(12))})
    assert found.tau == pytest.approx(kendalltau(range(12), [each.mean for each in results]).statistic)
    assert found.low < found.tau < found.high


def test_a_signal_that_knows_nothing_is_not_trusted():
    source = np.random.default_rng(1)
    results = [Rescored(record(n, n), (float(source.normal()),)) for n in range(8)]
    found = agreements(results, {"x": list(range(8))})
    assert found[0].low < 0
    assert "is not shown to deserve trust" in audit_verdict(found, 3)


def test_three_configurations_say_nothing():
    assert agreements([Rescored(record(n, n), (1.0 + n,)) for n in range(3)], {"x": [1, 2, 3]}) == []
    assert "Too few" in audit_verdict([], 3)
    assert "some trust" in audit_verdict([Agreement("x", 0.5, 0.1, 0.9, 8)], 3)


def test_an_audit_with_the_searchs_own_seed_says_so():
    found = [Agreement("x", 0.8, 0.4, 0.9, 8)]
    assert "longer training, going on with the search's own seed, agrees with it" in audit_verdict(found, 1)
    assert "longer training with 3 seeds agrees with it" in audit_verdict(found, 3)


def test_few_configurations_that_agree_are_no_proof():
    """Chance orders four alike in one of 24 cases, and every bootstrap sample of those agrees."""
    assert audit_verdict([Agreement("x", 1.0, 1.0, 1.0, 4)], 3).startswith("4 audited configurations are too few to say")


def test_the_winner_is_the_finalist_with_the_best_mean_within_the_hand_made_costs():
    results = [
        Rescored(record(0, 3.0, 1.0, "hand-made"), (2.0, 2.2)),
        Rescored(record(5, 1.0, 1.0), (2.5, 2.7)),  # lucky in the search
        Rescored(record(6, 1.5, 1.0), (1.7, 1.9)),
        Rescored(record(7, 0.9, 2.0), (1.0, 1.0)),  # too costly
    ]
    assert audited_winner(results, ("fid", "macs"), [1.0]).number == 6
    assert audited_winner(results[1:], ("fid", "macs"), [1.0]).number == 6  # the hand-made pattern failed in the audit
    assert audited_winner([], ("fid", "macs"), [1.0]) is None


def test_after_a_search_with_several_seeds_the_audit_takes_the_last_of_them_and_two_others(tmp_path):
    settings, search = searched(tmp_path, budget=18, training_seeds=3)
    audit = Audit(settings, search)
    assert [audit.next_task().seeds for _ in range(3)] == [(2,), (3,), (4,)]
