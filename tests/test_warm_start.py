"""What an earlier study hands to a new one, and what is said of it."""

from dataclasses import replace

import pytest
from toys import score

from meme.config.presets import preset
from meme.errors import UserError
from meme.scoring.cost import ensemble_cost
from meme_nas.record import warm_start as module
from meme_nas.record.study import Study
from meme_nas.record.tasks import Outcome
from meme_nas.record.trial_log import TrialRecord
from meme_nas.record.warm_start import warm_start
from meme_nas.settings import SearchSettings
from meme_nas.strategies.joint import Joint
from search_spaces.space import build_space

BASE = preset("digits-meme")
SPACE = build_space(BASE)
OBJECTIVES = ("fid", "macs")
MACS = ensemble_cost(BASE).macs


def record(number, fid, macs, kind="candidate", **changes):
    choices = {} if kind == "single-model" else SPACE.choices(BASE) | {"expert1.p": round(0.1 * (number + 1), 1)} | changes
    return TrialRecord(number, "complete", kind, BASE, choices, "", Outcome(number, fid=fid, macs=macs * MACS, params=7))


EARLIER = [
    record(0, 10.0, 1.0, "hand-made"),
    record(1, 1.0, 0.1, "single-model"),  # which beats all, and is outside the space
    record(2, 12.0, 0.7),
    record(3, 9.0, 0.9),
    record(4, 8.0, 0.95),
    record(5, 7.0, 1.2),
    record(6, 13.0, 0.8),  # beaten
]


def started(monkeypatch, tmp_path, trials=EARLIER, space=SPACE, objectives=OBJECTIVES):
    monkeypatch.setattr(module, "read_trials", lambda folder: list(trials))
    return warm_start(tmp_path / "old", space, objectives)


def numbers(found):
    return [round(10 * point["expert1.p"]) - 1 for point in found.points]


def test_the_front_is_taken_the_best_within_the_costs_first(monkeypatch, tmp_path):
    found = started(monkeypatch, tmp_path)
    assert numbers(found) == [4, 3, 2, 5]
    assert found.said == (f"warm start: of the 4 on the front of {tmp_path / 'old'}, all are proposed first, the best first")


def test_a_lost_hand_made_pattern_still_says_what_is_too_costly(monkeypatch, tmp_path):
    lost = replace(EARLIER[0], state="failed", outcome=Outcome(0, failure="its worker process died"))
    assert numbers(started(monkeypatch, tmp_path, [lost, *EARLIER[1:]])) == [4, 3, 2, 5]


def test_the_new_searchs_costs_make_the_front(monkeypatch, tmp_path):
    trials = [replace(each, outcome=replace(each.outcome, params=number)) for number, each in enumerate(EARLIER)]
    found = started(monkeypatch, tmp_path, trials, objectives=("fid", "params"))
    assert sorted(numbers(found)) == [0, 3, 4, 5]


def test_a_study_of_kid_warms_one_of_fid(monkeypatch, tmp_path):
    trials = [replace(each, outcome=replace(each.outcome, fid=None, kid=each.outcome.fid)) for each in EARLIER]
    assert numbers(started(monkeypatch, tmp_path, trials)) == [4, 3, 2, 5]


def test_what_fits_in_part_is_said(monkeypatch, tmp_path):
    foreign = replace(EARLIER[4], choices=EARLIER[4].choices | {"expert1.level1.low": 5})
    found = started(monkeypatch, tmp_path, [*EARLIER[:4], foreign, *EARLIER[5:]])
    assert numbers(found) == [3, 2, 5]
    assert found.said == (
        f"warm start: of the 4 on the front of {tmp_path / 'old'}, 3 fit this space (expert1.level1.low 5 is not in this space) "
        "and are proposed first, the best first"
    )


def test_what_fits_nowhere_is_said(monkeypatch, tmp_path):
    found = started(monkeypatch, tmp_path, space=build_space(BASE, ("split", "time")))
    assert found.points == ()
    assert found.said.startswith(
        f"warm start: none of the 4 on the front of {tmp_path / 'old'} fits this space (the earlier study"
    )
    assert "did not search expert1.time" in found.said
    nothing = started(monkeypatch, tmp_path, EARLIER[1:2])
    assert nothing.points == () and nothing.said.endswith("has no scored trial of its space, so nothing is taken from it")


def test_points_that_differ_only_in_what_is_no_longer_searched_are_one(monkeypatch, tmp_path):
    found = started(monkeypatch, tmp_path, space=build_space(BASE, ("split",)))
    assert len(found.points) == 1 and found.said.endswith("all are proposed first, the best first, 1 of them different here")


def test_a_small_budget_tries_the_best(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "read_trials", lambda folder: list(EARLIER))
    settings = SearchSettings(budget=4, study=tmp_path, strategy="joint", p_share=0.0, warm_start=tmp_path / "old")
    search = Joint(settings, Study(tmp_path, settings.in_force(), settings.objectives))
    tasks = []
    while (task := search.next_task()) is not None:
        tasks.append(task)
        search.record(score(task))
    assert [trial.choices["expert1.p"] for trial in search.study.trials if trial.kind == "candidate"] == [0.5]


def test_a_folder_without_a_study_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no study"):
        warm_start(tmp_path, SPACE, OBJECTIVES)
