"""One contract for all engines: whoever runs the trials, the search is the same, and trouble in one trial stays there."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from searches import searched
from toys import ByWorker, Crashing, Troubled, score, visits

from meme.errors import UserError
from meme_nas.engines.local import LocalEngine
from meme_nas.record.study import Study, read_trials
from meme_nas.settings import SearchSettings
from meme_nas.strategies.factorised import Factorised
from meme_nas.strategies.joint import Joint

TESTS = Path(__file__).parent


@pytest.fixture(scope="module", params=["local", "ray"])
def engine(request, tmp_path_factory):
    if request.param == "local":
        engine = LocalEngine(2)
    else:
        pytest.importorskip("ray", reason="Ray is not installed")
        from meme_nas.engines.ray import RayEngine

        engine = RayEngine(2, cpus=1, gpus=0, folder=tmp_path_factory.mktemp("ray"))
    yield engine
    engine.close()


def search_with(engine, folder, objective, budget=8, strategy="joint", **settings):
    settings = SearchSettings(strategy=strategy, budget=budget, study=folder, **settings)
    study = Study(folder, settings.in_force(), settings.objectives)
    try:
        search = Joint(settings, study) if strategy == "joint" else Factorised(settings, study)
        engine.run(search, objective, lambda: None)
    finally:
        study.close()
    return study.trials


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The proposals of a search with one worker in this process."""
    folder = tmp_path_factory.mktemp("unbroken")
    settings = SearchSettings(strategy="joint", budget=16, study=folder)
    study = Study(folder, settings.in_force(), settings.objectives)
    search = Joint(settings, study)
    while (task := search.next_task()) is not None:
        search.record(score(task))
    return [trial.choices for trial in study.trials]


def test_every_engine_proposes_the_same_and_spends_the_whole_budget(engine, tmp_path, unbroken):
    trials = search_with(engine, tmp_path, score, budget=16)
    assert [trial.state for trial in trials] == ["complete"] * 16
    assert [trial.choices for trial in trials] == unbroken
    assert [trial.kind for trial in trials[:4]] == ["hand-made", "multi-expert", "single-model", "candidate"]


@pytest.mark.parametrize(
    "strategy, sampler",
    [("joint", "nsga2"), ("joint", "random"), ("factorised", "model"), ("factorised", "tpe"), ("factorised", "nsga2")],
)
def test_every_sampler_proposes_the_same_on_every_engine(engine, tmp_path, strategy, sampler):
    options = {"strategy": strategy, "sampler": sampler, "budget": 14, "p_share": 0.0}
    trials = search_with(engine, tmp_path / "engine", Crashing(), **options)
    alone = searched(SearchSettings(study=tmp_path / "alone", **options), Crashing()).trials
    assert [(trial.choices, trial.state) for trial in trials] == [(trial.choices, trial.state) for trial in alone]


def test_nan_and_exceptions_are_recorded_with_their_reason(engine, tmp_path):
    trials = search_with(engine, tmp_path, Troubled(nan=3, raises=4))
    assert [trial.number for trial in trials if trial.state == "failed"] == [3, 4]
    assert "not a finite number" in trials[3].reason
    assert trials[4].reason == "MemoryError: out of memory"
    assert len(trials) == 8


def test_a_trial_whose_worker_dies_is_run_again(engine, tmp_path):
    trials = search_with(engine, tmp_path / "study", Troubled(dies_once=2, folder=tmp_path))
    assert (tmp_path / "died").exists()
    assert [trial.state for trial in trials] == ["complete"] * 8


@pytest.mark.slow
def test_a_worker_that_died_is_replaced_though_trials_are_shorter_than_its_start(engine, tmp_path):
    seen = tmp_path / "seen"
    seen.mkdir()
    trials = search_with(engine, tmp_path / "study", ByWorker(seen, 0.2, dies_once=2), budget=16)
    assert [trial.state for trial in trials] == ["complete"] * 16
    workers = visits(seen)
    assert len(workers[2]) == 2 and len({workers[number][-1] for number in range(10, 16)}) == 2


@pytest.mark.slow
def test_a_trial_that_always_kills_its_worker_fails_alone(engine, tmp_path):
    trials = search_with(engine, tmp_path / "study", Troubled(dies_always=3, folder=tmp_path))
    assert [trial.number for trial in trials if trial.state == "failed"] == [3]
    assert "worker process died" in trials[3].reason


def test_a_full_disk_ends_the_search_and_is_no_trials_fault(engine, tmp_path):
    with pytest.raises(UserError, match="/full/disk: No space left on device; make room, and the same command goes on"):
        search_with(engine, tmp_path, Troubled(no_room=3))
    states = {trial.number: trial.state for trial in read_trials(tmp_path)}
    assert states[0] == "complete" and states[3] == "running"
    fresh = LocalEngine(1)
    trials = search_with(fresh, tmp_path, score)
    fresh.close()
    assert [trial.state for trial in trials] == ["complete"] * 8


DRIVER = """
import sys
from pathlib import Path
from toys import Slow
from meme_nas.strategies.joint import Joint
from meme_nas.settings import SearchSettings
from meme_nas.record.study import Study

if __name__ == "__main__":
    folder, engine = Path(sys.argv[1]), sys.argv[2]
    settings = SearchSettings(strategy="joint", budget=16, study=folder)
    study = Study(folder, settings.in_force(), settings.objectives)
    if engine == "local":
        from meme_nas.engines.local import LocalEngine
        engine = LocalEngine(2)
    else:
        from meme_nas.engines.ray import RayEngine
        engine = RayEngine(2, cpus=1, gpus=0, folder=folder)
    engine.run(Joint(settings, study), Slow(float(sys.argv[3])), lambda: None)
    engine.close()
"""


def start_driver(folder, engine, seconds):
    script = folder.parent / "driver.py"
    script.write_text(DRIVER)
    surroundings = os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}"}
    return subprocess.Popen([sys.executable, str(script), str(folder), engine, str(seconds)], env=surroundings)


def finished(folder):
    if not (folder / "study.journal").exists():
        return 0
    try:
        return sum(trial.finished for trial in read_trials(folder))
    except Exception:  # the journal is being created
        return 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["local", "ray"])
def test_killed_search_goes_on_and_proposes_what_the_unbroken_one_did(name, tmp_path, unbroken):
    if name == "ray":
        pytest.importorskip("ray", reason="Ray is not installed")
    folder = tmp_path / "study"
    driver = start_driver(folder, name, 0.3)
    deadline = time.monotonic() + 120
    while finished(folder) < 5 and time.monotonic() < deadline:
        time.sleep(0.1)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = {trial.number: trial.outcome.fid for trial in read_trials(folder) if trial.finished}
    assert 5 <= len(before) < 16
    assert start_driver(folder, name, 0.0).wait(timeout=180) == 0
    after = read_trials(folder)
    assert [trial.state for trial in after] == ["complete"] * 16
    assert {number: after[number].outcome.fid for number in before} == before
    assert [trial.choices for trial in after] == unbroken
