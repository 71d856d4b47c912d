"""One contract for all engines: whoever runs the trials, the search is the same, and trouble in one trial stays there."""

import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from searches import searched
from toys import ByWorker, Crashing, Troubled, score, visits

from meme.errors import UserError
from meme_nas.engines.local import LocalEngine
from meme_nas.engines.stages import Stage, Stages
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


def strategy_of(settings, study):
    return Joint(settings, study) if settings.strategy == "joint" else Factorised(settings, study)


def search_with(engine, folder, objective, budget=8):
    settings = SearchSettings(strategy="joint", budget=budget, study=folder)
    study = Study(folder, settings.in_force(), settings.objectives)
    try:
        engine.run(strategy_of(settings, study), objective, lambda: None)
    finally:
        study.close()
    return study.trials


SEARCHES = {
    f"{strategy}-{sampler}": {"strategy": strategy, "sampler": sampler, "budget": 14, "p_share": 0.0}
    for strategy, sampler in [
        ("joint", "tpe"),
        ("joint", "nsga2"),
        ("joint", "random"),
        ("factorised", "model"),
        ("factorised", "tpe"),
        ("factorised", "nsga2"),
    ]
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The trials of every search with one worker in this process."""
    folder = tmp_path_factory.mktemp("alone")
    return {
        name: searched(SearchSettings(study=folder / name, **options), Crashing()).trials for name, options in SEARCHES.items()
    }


@pytest.fixture(scope="module")
def on_engine(engine, tmp_path_factory):
    """The trials of every search on an engine. They are stages of one run: workers take longer to start than all of a search."""
    folder, studies, stages = tmp_path_factory.mktemp("engine"), {}, []
    for name, options in SEARCHES.items():
        settings = SearchSettings(study=folder / name, **options)
        studies[name] = Study(settings.folder, settings.in_force(), settings.objectives)
        stages.append(Stage(strategy_of(settings, studies[name]), lambda: nullcontext(lambda: None)))
    try:
        with Stages(stages) as source:
            engine.run(source, Crashing(), source.on_change)
    finally:
        for study in studies.values():
            study.close()
    return {name: study.trials for name, study in studies.items()}


def test_every_engine_spends_the_whole_budget(on_engine):
    trials = on_engine["joint-tpe"]
    assert len(trials) == 14 and all(trial.finished for trial in trials)
    assert [trial.kind for trial in trials[:4]] == ["hand-made", "multi-expert", "single-model", "candidate"]


@pytest.mark.parametrize("name", SEARCHES)
def test_every_sampler_proposes_the_same_on_every_engine(on_engine, alone, name):
    assert [(trial.choices, trial.state) for trial in on_engine[name]] == [(trial.choices, trial.state) for trial in alone[name]]


@pytest.fixture(scope="module")
def troubled(engine, tmp_path_factory):
    """The trials of a search of which three behave badly, each in its own way, and the folder of that which dies."""
    folder = tmp_path_factory.mktemp("troubled")
    return search_with(engine, folder / "study", Troubled(nan=3, raises=4, dies_once=6, folder=folder)), folder


def test_nan_and_exceptions_are_recorded_with_their_reason(troubled):
    trials, _ = troubled
    assert [trial.number for trial in trials if trial.state == "failed"] == [3, 4]
    assert "not a finite number" in trials[3].reason
    assert trials[4].reason == "MemoryError: out of memory"
    assert len(trials) == 8


def test_a_trial_whose_worker_dies_is_run_again(troubled):
    trials, folder = troubled
    assert (folder / "died").exists()
    assert [trial.state for trial in trials if trial.number not in (3, 4)] == ["complete"] * 6


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
from toys import Held
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
    engine.run(Joint(settings, study), Held(int(sys.argv[3])), lambda: None)
    engine.close()
"""


def start_driver(folder, engine, held):
    """``held``: the first of the trials that do not end."""
    script = folder.parent / "driver.py"
    script.write_text(DRIVER)
    surroundings = os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}"}
    return subprocess.Popen([sys.executable, str(script), str(folder), engine, str(held)], env=surroundings)


def finished(folder):
    if not (folder / "study.journal").exists():
        return 0
    try:
        return sum(trial.finished for trial in read_trials(folder))
    except Exception:  # the journal is being created
        return 0


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The proposals of a search with one worker in this process."""
    folder = tmp_path_factory.mktemp("unbroken")
    settings = SearchSettings(strategy="joint", budget=16, study=folder)
    return [trial.choices for trial in searched(settings).trials]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["local", "ray"])
def test_killed_search_goes_on_and_proposes_what_the_unbroken_one_did(name, tmp_path, unbroken):
    if name == "ray":
        pytest.importorskip("ray", reason="Ray is not installed")
    folder = tmp_path / "study"
    driver = start_driver(folder, name, held=6)
    deadline = time.monotonic() + 600
    while finished(folder) < 6 and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = {trial.number: trial.outcome.fid for trial in read_trials(folder) if trial.finished}
    assert sorted(before) == [0, 1, 2, 3, 4, 5]
    assert start_driver(folder, name, held=16).wait(timeout=600) == 0
    after = read_trials(folder)
    assert [trial.state for trial in after] == ["complete"] * 16
    assert {number: after[number].outcome.fid for number in before} == before
    assert [trial.choices for trial in after] == unbroken
