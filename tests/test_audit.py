"""The audit of the proxy: what is chosen, how agreement is measured, and what is said of it."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import kendalltau
from toys import score

from meme.config.presets import preset
from meme_nas.record.study import Study
from meme_nas.record.tasks import Outcome
from meme_nas.record.trial_log import TrialRecord
from meme_nas.report.claims import agreement_words, judged_words, regret_words
from meme_nas.rescoring.audit import Audit, agreements, audited_winner, judged, pick, regret, signals_of
from meme_nas.rescoring.chosen import Chosen
from meme_nas.rescoring.findings import Agreement, Rescored
from meme_nas.settings import SearchSettings
from meme_nas.strategies.factorised import Factorised

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
    assert agreement_words(found, 3).endswith("the proxy tells poor from good; that it tells the best apart is not shown.")
    assert found[0].among_best.count == 5


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
    assert "that the proxy's ranking is more than chance is not shown" in agreement_words(found, 3)


def test_three_configurations_say_nothing():
    assert agreements([Rescored(record(n, n), (1.0 + n,)) for n in range(3)], {"x": [1, 2, 3]}) == []
    assert "Too few" in agreement_words([], 3)


def test_an_audit_with_the_searchs_own_seed_says_so():
    found = [Agreement("x", 0.8, 0.4, 0.9, 8)]
    assert agreement_words(found, 1).startswith("Longer training, going on with the search's own seed, ranks the audited")
    assert agreement_words(found, 3).startswith("Longer training with 2 seeds that the search has not used ranks the audited")


def test_few_configurations_that_agree_are_no_proof():
    """Chance orders four alike in one of 24 cases, and every bootstrap sample of those agrees."""
    said = agreement_words([Agreement("x", 1.0, 1.0, 1.0, 4)], 3)
    assert (
        "1.00 (4 configurations, too few for an interval)" in said and "too few to say whether the ranking deserves trust" in said
    )


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


def rows(truth, deviation, seeds, source):
    """Configurations with one score a training seed; the first is the hand-made pattern."""
    logs = np.asarray(truth)[:, None] + source.normal(0, deviation, (len(truth), seeds)) + source.normal(0, 0.1, (1, seeds))
    trials = [record(n, 1.0 + n, kind="candidate" if n else "hand-made") for n in range(len(truth))]
    return [Rescored(trial, tuple(map(float, np.exp(own)))) for trial, own in zip(trials, logs, strict=True)]


def test_seeds_that_the_search_has_not_used_have_noise_of_their_own(tmp_path):
    settings, search = searched(tmp_path)
    audit = Audit(settings, search)
    noise = [way.evaluation.seed for way in audit._ways(audit.chosen[0])]
    assert noise[0] == search.space.base.evaluation.seed and len(set(noise)) == 3


@pytest.mark.parametrize(
    ("seeds", "share", "choosers"), [(1, 0.3, 1), (3, 0.3, 3), (1, 0, 1), (2, 0, 2), (3, 0, 1), (4, 0, 2), (5, 0, 2)]
)
def test_seeds_are_kept_for_judging_only_where_no_confirmation_does(tmp_path, seeds, share, choosers):
    settings, search = searched(tmp_path, budget=4, audit_seeds=seeds, confirm_share=share)
    assert Audit(settings, search).choosers == choosers


def test_the_winner_is_not_judged_by_the_seed_that_chose_it(tmp_path):
    """Trial 2 was lucky with the seed that chose; the judging seeds find no difference."""
    scores = {0: (2.0, 1.00, 1.02), 1: (1.9, 1.01, 1.00), 2: (0.5, 1.01, 1.01), 3: (1.8, 1.00, 1.01)}
    results = [Rescored(record(n, 1.0, kind="candidate" if n else "hand-made"), own) for n, own in scores.items()]
    best = audited_winner(results, ("fid", "macs"), [1.0], choosers=1)
    found = judged(results, best, 1)
    assert best.number == found.winner.number == 2
    assert found.difference.mean == pytest.approx((np.log(1.01) + np.log(1.01 / 1.02)) / 2) and not found.difference.excludes_zero
    assert "is not shown to be better" in judged_words(found, "fid")
    assert judged(results, best, 3) is None and judged(results, best, 2) is None, "one seed has no spread"
    assert judged(results, results[0].trial, 1) is None, "the pattern itself won"


def test_of_equal_configurations_the_audit_says_one_is_better_in_one_of_forty_cases():
    """By the scores that chose it, eight equal ones have a winner that is 0.8 deviations better than the hand-made pattern."""
    source, said, apparent = np.random.default_rng(0), [], []
    for _ in range(1_500):
        results = rows(np.zeros(8), 0.05, 5, source)
        best = audited_winner(results, ("fid", "macs"), [1.0], 2)
        found = judged(results, best, 2)
        said.append(found is not None and " is better" in judged_words(found, "fid"))
        apparent.append(np.log(results[best.number].scores[0] / results[0].scores[0]) / 0.05)
    assert np.mean(said) < 0.035
    assert np.mean(apparent) < -0.8


def test_the_search_chooses_and_the_audits_own_seed_chooses_and_neither_judges(tmp_path):
    settings, search = searched(tmp_path, audit_seeds=3, confirm_share=0.0)
    audit = audited(settings, search)
    chosen = Chosen(settings, search, audit)
    assert audit.choosers == 1 and (chosen.judged is None) == (chosen.found.kind == "hand-made")
    assert Chosen(settings, search, None).judged is None


def test_with_the_searchs_own_seed_alone_only_these_weights_are_spoken_of():
    results = rows([0.0, 0.1, 0.2, 0.3], 0.0, 1, np.random.default_rng(0))
    said = regret_words(regret(results, results[1].trial, ("fid", "macs"), [1.0]), "fid")
    assert said.startswith("For these weights, trained longer with the search's own seed")
    assert "has 10.5% higher FID than the best of the 4 audited" in said and "luck flatters" in said
    assert said.endswith("One training seed says nothing of the architectures (--audit-seeds 3 does).")
    assert "(trial 0) is the best of the 4" in regret_words(regret(results, results[0].trial, ("fid", "macs"), [1.0]), "fid")


def test_regret_counts_fresh_seeds_and_what_costs_no_more():
    results = rows([0.0, 0.1, 0.2, 0.3], 0.001, 3, np.random.default_rng(0))
    lucky = replace(results[2], scores=(0.01, *results[2].scores[1:]))  # with the search's own seed
    cheap = replace(results[3], trial=record(3, 1.0, macs=2.0), scores=(0.1, 0.1, 0.1))  # costs too much
    found = regret([*results[:2], lucky, cheap], results[1].trial, ("fid", "macs"), [1.0])
    assert (found.count, found.best.number, found.is_fresh, found.behind.count) == (3, 0, True, 2)
    assert found.behind.low < 0.1 < found.behind.high and found.behind.low > 0.08
    assert "(trial 1) is not the best of the 3 audited" in regret_words(found, "fid")
    assert regret(results, record(9, 1.0), ("fid", "macs"), [1.0]) is None


def test_equal_configurations_are_not_said_to_be_missed():
    """What looks best of eight equal ones is flattered, so a plain paired test of it would alarm too often."""
    source, said, held = np.random.default_rng(0), [], []
    for _ in range(1_000):
        results = rows(np.zeros(8), 0.05, 4, source)
        found = regret(results, results[1].trial, ("fid", "macs"), [1.0])
        said.append("is not the best" in regret_words(found, "fid").replace("is not the best of the audited is not shown", ""))
        held.append(found.behind.low <= 0 <= found.behind.high)
    assert np.mean(said) < 0.04 and np.mean(held) > 0.95


def test_a_choice_that_is_as_good_as_the_best_deserves_trust():
    results = rows([0.2, 0.0, 0.3, 0.3], 0.002, 3, np.random.default_rng(0))
    assert "deserves trust: trial 1" in regret_words(regret(results, results[1].trial, ("fid", "macs"), [1.0]), "fid")


@pytest.mark.parametrize("size", [8, 24])
def test_equal_leaders_among_poor_ones_are_not_told_apart_whatever_the_whole_range_says(size):
    """170 equal leaders and 20 poor ones: tau over the range is high, among the best it is chance."""
    whole, best, said = [], [], []
    for seed in range(60):
        source = np.random.default_rng(seed)
        truth = np.concatenate([np.zeros(170), np.linspace(1.0, 3.0, 20)])
        scores = np.exp(truth + source.normal(0, 0.05, 190))
        trials = [record(n, float(fid), kind="candidate" if n else "hand-made") for n, fid in enumerate(scores)]
        chosen = pick(trials, SearchSettings(budget=50, seed=seed, audit_size=size))
        results = [Rescored(each, (float(np.exp(truth[each.number] + source.normal(0, 0.05))),)) for each in chosen]
        (found,) = agreements(results, {"score": [each.scored.fid for each in chosen]})
        whole.append(found.tau)
        best.append(found.among_best.tau)
        said.append("tells the best apart." in agreement_words([found], 1))
    assert np.mean(whole) > 0.5 and abs(np.mean(best)) < 0.25 and np.mean(said) < 0.1
