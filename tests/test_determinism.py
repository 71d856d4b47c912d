"""The same seed gives the same proposals and, on a CPU, the same scores to the last bit, whoever runs the trials."""

import pytest
from searches import InThisProcess

from meme_nas.engines.local import LocalEngine
from meme_nas.record.study import Study
from meme_nas.settings import SearchSettings
from meme_nas.strategies.factorised import Factorised
from meme_nas.strategies.joint import Joint
from meme_nas.worker.objective import Objective

pytestmark = pytest.mark.slow

BUDGET = 5


def engine_with(workers: int):
    """Workers, or this process in the place of one: two start, and import torch, only where two are what is tested."""
    return LocalEngine(workers) if workers > 1 else InThisProcess()


def searched(folder, workers: int, *, seed: int = 0, budgets: tuple[int, ...] = (BUDGET,)) -> list[tuple]:
    """Number, choices and scores of the trials of a real search on digits, run up to each of ``budgets`` in turn."""
    for budget in budgets:
        settings = SearchSettings(
            strategy="joint",
            budget=budget,
            study=folder,
            proxy_steps=3,
            samples=50,
            seed=seed,
            features="random",
            trunk_share=0.002,
        )
        study, engine = Study(folder, settings.in_force(), settings.objectives), engine_with(workers)
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
    other = searched(tmp_path, workers=1, seed=1)
    assert [fid for *_, fid, _ in other] != [fid for *_, fid, _ in alone]
    assert [choices for _, choices, *_ in other[3:]] != [choices for _, choices, *_ in alone[3:]]


CANDIDATES = 2


def expert_by_expert(folder, workers: int, *, break_off_after: int = 0) -> list[tuple]:
    """As ``searched``, of the factorised strategy; the trainings of single experts come first. ``break_off_after`` so many trials
    the search ends as by Ctrl-C, and is begun again."""
    settings = SearchSettings(
        strategy="factorised",
        budget=CANDIDATES,
        cascades_per_candidate=2,
        study=folder,
        proxy_steps=2,
        trunk_share=0.002,
        samples=16,
        features="random",
    )
    hand_made = settings.as_proxy(settings.full_config())
    study = Study(folder, settings.in_force(), settings.objectives)
    search = Factorised(settings, study, yardsticks=[("hand-made", hand_made)])
    logs = [study.experts(number).records for number in search.numbers] + [study.trials]

    def interrupt() -> None:
        if break_off_after and sum(trial.finished for log in logs for trial in log) >= break_off_after:
            raise KeyboardInterrupt

    engine = engine_with(workers)
    try:
        engine.run(search, Objective(folder, folder / "bank", "cpu"), interrupt)
    except KeyboardInterrupt:
        return []
    finally:
        engine.close()
        study.close()
    trials = [trial for log in logs for trial in log]
    return [(t.expert, t.number, t.choices, t.outcome.loss, t.outcome.fid, t.outcome.macs) for t in trials]


def test_expert_by_expert_two_workers_and_a_search_broken_off_come_to_the_same_as_one_worker(tmp_path):
    alone = expert_by_expert(tmp_path / "alone", workers=1)
    assert len(alone) == 4 * CANDIDATES + 1 + 2  # of the first candidates no other cascade can be made than the hand-made one
    assert expert_by_expert(tmp_path / "broken", workers=2, break_off_after=4) == []
    assert expert_by_expert(tmp_path / "broken", workers=2) == alone
