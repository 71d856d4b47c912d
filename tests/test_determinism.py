"""The same seed gives the same proposals and, on a CPU, the same scores to the last bit, whoever runs the trials."""

import pytest

from meme_nas.engines.local import LocalEngine
from meme_nas.joint import Joint
from meme_nas.objective import Objective
from meme_nas.settings import SearchSettings
from meme_nas.study import Study

BUDGET = 5


def searched(folder, workers: int, *, seed: int = 0, budgets: tuple[int, ...] = (BUDGET,)) -> list[tuple]:
    """Number, choices and scores of the trials of a real search on digits, run up to each of ``budgets`` in turn."""
    for budget in budgets:
        settings = SearchSettings(
            strategy="joint", budget=budget, study=folder, proxy_steps=3, samples=50, seed=seed, features="random"
        )
        study, engine = Study(folder, settings.in_force()), LocalEngine(workers)
        try:
            engine.run(Joint(settings, study), Objective(folder, folder / "bank", "cpu"), lambda: None)
        finally:
            engine.close()
            study.close()
    return [(trial.number, trial.choices, trial.outcome.fid, trial.outcome.macs) for trial in study.trials]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return searched(tmp_path_factory.mktemp("alone"), workers=1)


def test_trials_have_scores_that_differ(alone):
    assert len({fid for *_, fid, _ in alone}) == BUDGET


def test_two_workers_come_to_the_same_trials_and_scores_as_one(alone, tmp_path):
    assert searched(tmp_path, workers=2) == alone


def test_a_search_broken_off_and_continued_comes_to_the_same(alone, tmp_path):
    assert searched(tmp_path, workers=1, budgets=(3, BUDGET)) == alone


def test_another_seed_comes_to_other_proposals_and_scores(alone, tmp_path):
    other = searched(tmp_path, workers=2, seed=1)
    assert [fid for *_, fid, _ in other] != [fid for *_, fid, _ in alone]
    assert [choices for _, choices, *_ in other[3:]] != [choices for _, choices, *_ in alone[3:]]
