"""The winner confirmed: trained beside the hand-made pattern with seeds that chose neither, and what follows from it."""

import math
from dataclasses import replace

import pytest
from toys import score

from meme.config.schema import Config
from meme.support.intervals import paired
from meme_nas.record.study import Study
from meme_nas.record.trial_log import TrialRecord
from meme_nas.report.claims import confirmed_words
from meme_nas.report.summary import Summary
from meme_nas.report.words import verdict
from meme_nas.rescoring.audit import Audit
from meme_nas.rescoring.chosen import Chosen
from meme_nas.rescoring.confirmation import FIRST_TRAINING_SEED, SAMPLINGS, Confirmation
from meme_nas.rescoring.finalists import FRESH_SEEDS
from meme_nas.rescoring.findings import Confirmed, Rescored
from meme_nas.results import export_configs
from meme_nas.settings import SearchSettings
from meme_nas.strategies.factorised import Factorised


def searched(folder, **changes):
    settings = SearchSettings(
        **{"budget": 12, "study": folder, "audit_factor": 0, "trunk_share": 0.125, "confirm_share": 0.25, "p_share": 0.0}
        | changes
    )
    search = Factorised(settings, Study(folder, settings.in_force(), settings.objectives))
    while not search.done:
        search.record(score(search.next_task()))
    return settings, search


def confirmation_of(settings, search) -> Confirmation:
    return Confirmation(settings, search, Chosen(settings, search, None))


def work_through(confirmation, factor: float = 1.0, noise: float = 0.01):
    """Train all that is asked for; the winner's scores are ``factor`` times the hand-made pattern's, but for the seeds' noise."""
    tasks, hand_made = [], confirmation._search.space.base.experts
    while not confirmation.done:
        task = confirmation.next_task()
        tasks.append(task)
        fid = math.exp(0.3 * task.seeds[0])  # common to both sides
        if task.config.experts != hand_made:
            fid *= factor * math.exp(noise * (task.seeds[0] % 3 - 1) + 0.001 * task.config.evaluation.seed)
        confirmation.record(replace(score(task), fid=fid, fids=(fid,)))
    return tasks


def test_both_are_trained_to_the_same_length_with_seeds_that_chose_neither(tmp_path):
    settings, search = searched(tmp_path)
    confirmation = confirmation_of(settings, search)
    tasks = work_through(confirmation)
    audit = Audit(settings, search)
    assert len(tasks) == 2 * 3 * SAMPLINGS and all(task.kind == "confirmation" for task in tasks)
    assert {(task.config.training.steps, task.config.training.trunk_steps) for task in tasks} == {(250, 1_000)}
    assert {task.seeds[0] for task in tasks} == set(range(FIRST_TRAINING_SEED, FIRST_TRAINING_SEED + 3))
    assert not {task.seeds[0] for task in tasks} & {*settings.seeds, *audit.seeds}
    assert not {task.config.evaluation.seed for task in tasks} & {settings.seed, *FRESH_SEEDS}
    assert all(task.config.training.seed == task.seeds[0] for task in tasks)
    assert tasks[0].config.training.seed != tasks[1].config.training.seed, "workers side by side train different experts"


def test_the_difference_is_paired_over_training_seeds(tmp_path):
    settings, search = searched(tmp_path)
    confirmation = confirmation_of(settings, search)
    assert confirmation.result() is None
    work_through(confirmation, factor=0.9)
    found = confirmation.result()
    noise = [2_001.5 + SAMPLINGS * place for place in range(3)]  # the mean of each training seed's own sampling seeds
    expected = [math.log(0.9) + 0.001 * own + 0.01 * (seed % 3 - 1) for own, seed in zip(noise, confirmation.seeds, strict=True)]
    assert found.difference.mean == pytest.approx(paired(expected).mean)
    assert found.difference.high == pytest.approx(paired(expected).high)
    assert found.difference.count == 3 and len(found.winner.scores) == 3


def test_a_winner_that_is_no_better_gives_way_to_the_hand_made_pattern(tmp_path):
    settings, search = searched(tmp_path)
    confirmation = confirmation_of(settings, search)
    work_through(confirmation, factor=0.1)  # noise of the sampling seeds is a factor of e^2
    better = confirmation.result()
    assert better.winner_is_better and better.recommended is better.winner.trial
    worse = replace(better, difference=paired([0.1, 0.2, 0.3]))
    assert worse.recommended is worse.hand_made.trial and worse.recommended.kind == "hand-made"
    best = better.winner.trial
    export_configs(tmp_path, search.study.trials, settings, best, worse)
    winner, found = (Config.load(tmp_path / f"{name}.yaml") for name in ("winner", "best-of-search"))
    assert winner.experts == settings.full_config().experts and found.experts == best.config.experts
    first = (tmp_path / "winner.yaml").read_text().split("name:")[0]
    assert "is not shown to be better" in " ".join(first.replace("#", "").split())
    export_configs(tmp_path, search.study.trials, settings, best, better)
    assert Config.load(tmp_path / "winner.yaml").experts == best.config.experts
    assert not (tmp_path / "best-of-search.yaml").exists()
    export_configs(tmp_path, search.study.trials, settings, best)
    assert "Not confirmed" in (tmp_path / "winner.yaml").read_text()


def test_an_interrupted_confirmation_goes_on_and_a_finished_one_is_not_repeated(tmp_path):
    settings, search = searched(tmp_path)
    confirmation = confirmation_of(settings, search)
    confirmation.record(score(confirmation.next_task()))
    confirmation.next_task()  # and is killed
    search.study.close()
    search = Factorised(settings, Study(tmp_path, settings.in_force(), settings.objectives))
    assert len(work_through(confirmation_of(settings, search))) == 2 * 3 * SAMPLINGS - 1
    assert confirmation_of(settings, search).done


def test_where_the_hand_made_pattern_won_there_is_nothing_to_confirm(tmp_path):
    settings, search = searched(tmp_path, budget=3)
    confirmation = confirmation_of(settings, search)
    assert confirmation.chosen == [] and confirmation.done and confirmation.result() is None


@pytest.mark.parametrize("changes", [{"confirm_share": 0.26}, {"p_share": 0.1}, {"trunk_share": 0.6}])
def test_a_share_that_leaves_experts_less_than_a_trial_is_refused(changes):
    with pytest.raises(ValueError, match=r"(p_share|confirm_share): must be 0, or at least 0\.\d+, which trunk and trial take"):
        SearchSettings(**changes)
    SearchSettings(**{"p_share": 0.0, "confirm_share": 0.0} | {key: 0.0 for key in changes if key != "trunk_share"})


def test_a_length_beyond_the_full_one_is_refused():
    with pytest.raises(ValueError, match="confirm_share"):
        SearchSettings(confirm_share=1.5)


def test_the_whole_length_is_the_full_training(tmp_path):
    whole = SearchSettings(study=tmp_path, confirm_share=1.0)
    training = whole.trained_to(whole.as_proxy(whole.full_config()), 1.0).training
    assert training == whole.in_full(whole.full_config()).training


def test_a_kid_that_is_not_above_0_leaves_the_winner_unconfirmed(tmp_path):
    settings, search = searched(tmp_path)
    confirmation = confirmation_of(settings, search)
    while not confirmation.done:
        task = confirmation.next_task()
        confirmation.record(replace(score(task), fid=-0.1, fids=(-0.1,)))
    assert confirmation.result() is None


def trial(number: int, kind: str) -> TrialRecord:
    config = SearchSettings().as_proxy(SearchSettings().full_config())
    return TrialRecord(number, "complete", kind, config, {}, "", replace(score_of(), number=number))


def score_of():
    from meme_nas.record.tasks import Outcome

    return Outcome(0, fid=1.0, fids=(1.0,), macs=1e6, params=7, features="toy")


def confirmed(*differences: float) -> Confirmed:
    winner, hand_made = trial(7, "candidate"), trial(0, "hand-made")
    scores = tuple(math.exp(each) for each in differences)
    both = Rescored(winner, scores, 1_000, 250), Rescored(hand_made, (1.0,) * len(scores), 1_000, 250)
    return Confirmed(*both, paired(differences), 250, 1_000)


def test_words_claim_no_more_than_the_interval():
    sure = confirmed_words(confirmed(-0.10, -0.11, -0.09), "fid")
    assert "is better: it has 9.5% lower FID than the hand-made pattern (95% interval 12% lower to 7.2% lower)" in sure
    maybe = confirmed_words(confirmed(-0.10, 0.05, -0.09), "fid")
    assert "is not shown to be better" in maybe and "which may be chance" in maybe and maybe.endswith("winner.yaml.")
    open_ = confirmed_words(confirmed(0.10, 0.05, -0.02), "kid")
    assert "is not shown to be better: it has 4.4% higher KID" in open_ and "which may be chance" in open_
    assert "is therefore the hand-made pattern" in open_
    worse = confirmed_words(confirmed(0.10, 0.11, 0.09), "fid")
    assert "is worse: it has 11% higher FID" in worse and "is therefore the hand-made pattern" in worse
    assert "250 steps an expert after 1,000 of the trunk with 3 seeds that chose neither" in sure


def test_the_report_begins_with_what_was_confirmed_and_shows_every_length(tmp_path):
    found = confirmed(0.10, 0.05, -0.02)
    trials = [found.hand_made.trial, found.winner.trial]
    summary = Summary("MEME search", tmp_path, trials, found.winner.trial, objectives=("fid", "macs"), confirmed=found)
    assert verdict(summary)[0] == confirmed_words(found, "fid")
    assert summary.recommended is found.hand_made.trial
    lengths = [(each.steps, each.seeds, each.samples) for each in summary.lengths_of(found.winner.trial)]
    proxy = found.winner.trial.config
    assert lengths == [(proxy.training.steps, 1, proxy.evaluation.samples), (250, 3, 1_000)]
