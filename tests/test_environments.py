"""Odd environments, and studies whose surroundings changed: the right thing or one sentence, and never a wrong score."""

import errno
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import psutil
import pytest
from conftest import ROOT
from PIL import Image

from meme.cli.verbs import main as meme
from meme.config.presets import preset
from meme.data.images import open_images
from meme.errors import UserError
from meme.pipeline import train
from meme.scoring.features import choose_features
from meme.support.files import cache_folder, expanded, settle_paths, write_text
from meme_nas.engines.local import LocalEngine
from meme_nas.engines.placement import check_engine, check_places
from meme_nas.record.storage import mend, place_of
from meme_nas.record.study import Study
from meme_nas.record.tasks import Outcome, SearchFault, Task, attempt
from meme_nas.report.page import write_report
from meme_nas.report.summary import Summary
from meme_nas.settings import SearchSettings
from meme_nas.worker.objective import BasisIds, Objective, open_basis
from meme_nas.worker.shared_sampling import StateCache


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MEME_CACHE", str(folder))
    return folder


def photos(folder: Path, count: int = 8, first: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(first, first + count):
        pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}.png")
    return folder


def tiny(data: Path | str):
    config = preset("thumbnails-meme" if data != "digits" else "digits-meme")
    quick = {
        "training": {"steps": 1, "batch_size": 2},
        "sampling": {"steps": 4},
        "evaluation": {"samples": 4, "features": "random"},
    }
    return config.with_(data=str(data), **quick)


# Paths in the environment


def test_relative_paths_in_the_environment_are_made_absolute_for_workers(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEME_CACHE", "cache")
    monkeypatch.setenv("MEME_INCEPTION", "x.pt")
    settle_paths()
    assert os.environ["MEME_CACHE"] == str(tmp_path / "cache") and os.environ["MEME_INCEPTION"] == str(tmp_path / "x.pt")
    monkeypatch.setenv("MEME_INCEPTION", "off")
    monkeypatch.setenv("MEME_CACHE", "off")  # which says nothing but where
    settle_paths()
    assert (os.environ["MEME_INCEPTION"], os.environ["MEME_CACHE"]) == ("off", str(tmp_path / "off"))


def test_a_cluster_is_handed_our_variables(monkeypatch):
    ray_cluster = pytest.importorskip("meme_nas.engines.ray_cluster")
    monkeypatch.setenv("MEME_INCEPTION", "off")
    handed = ray_cluster.variables_handed_on()
    assert handed == {"MEME_CACHE": os.environ["MEME_CACHE"], "MEME_INCEPTION": "off"}


def test_without_a_home_folder_a_sentence_names_the_variables(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: os.fspath(path))  # as it is where neither HOME nor passwd says

    def unknown(app):
        raise RuntimeError("could not determine the home directory")

    monkeypatch.setattr("platformdirs.user_cache_dir", unknown)
    assert cache_folder() == Path(os.environ["MEME_CACHE"])
    monkeypatch.delenv("MEME_CACHE")
    for wrong in (cache_folder, lambda: expanded("~/x"), lambda: check_engine(SearchSettings())):
        with pytest.raises(UserError, match="HOME"):
            wrong()
    check_engine(SearchSettings(engine="local"))


def test_a_long_folder_for_rays_sockets_is_refused_by_the_name_of_the_variable(monkeypatch):
    check_engine(SearchSettings())
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "a" * 60)
    with pytest.raises(UserError, match=r"engine: .* would have paths of \d+ bytes, and 107 is the most; .* in RAY_TMPDIR"):
        check_engine(SearchSettings())
    check_engine(SearchSettings(engine="local"))
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "a" * 20)
    check_engine(SearchSettings())


def test_folders_that_ray_cannot_name_are_refused_at_the_door(tmp_path, monkeypatch):
    """Ray failed on them with a traceback, or with the advice to try again."""
    other = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    other.mkdir()
    with pytest.raises(UserError, match=r"study: Ray writes to no folder whose path is not UTF-8, as .*/caf\\udce9/s; rename it"):
        check_engine(SearchSettings(study=other / "s"))
    check_engine(SearchSettings(study=other / "s", engine="local"))
    monkeypatch.chdir(other)
    with pytest.raises(UserError, match="engine: Ray works in no folder whose path is not UTF-8"):
        check_engine(SearchSettings(study=tmp_path / "s"))


def test_ray_notes_a_command_that_is_not_utf8(monkeypatch):
    """It would not start: 'utf-8' codec can't encode character."""
    ray_cluster = pytest.importorskip("meme_nas.engines.ray_cluster", reason="Ray is not installed")
    noted = ray_cluster.ray._private.utils.get_entrypoint_name
    monkeypatch.setattr(psutil.Process, "cmdline", lambda self: ["run_search.py", "--data", os.fsdecode(b"caf\xe9")])
    with ray_cluster.printable_command():
        assert ray_cluster.ray._private.utils.get_entrypoint_name() == "run_search.py --data caf\\udce9"
    assert ray_cluster.ray._private.utils.get_entrypoint_name is noted


def test_the_command_for_the_token_is_the_ray_of_this_python():
    engine = pytest.importorskip("meme_nas.engines.ray")
    program, *rest = engine.token_command().split()
    assert rest == ["get-auth-token"] and Path(program).is_file() and Path(program).parent == Path(sys.executable).parent


class _AsksForToken(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(401)

    def log_message(self, *message):
        """Nothing."""


def test_a_proxy_is_not_asked_for_the_dashboard(monkeypatch):
    engine = pytest.importorskip("meme_nas.engines.ray")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _AsksForToken)
    Thread(target=server.serve_forever, daemon=True).start()
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody listens
    try:
        assert engine._asks_for_token(f"http://127.0.0.1:{server.server_address[1]}")
    finally:
        server.shutdown()


# What is printed where


def run(command: str, **environment: str) -> subprocess.CompletedProcess:
    surroundings = os.environ | {"PYTHONPATH": str(ROOT), "MEME_INCEPTION": "off"} | environment
    return subprocess.run(["bash", "-c", command], capture_output=True, env=surroundings, cwd=ROOT)


def test_names_that_the_output_cannot_show_are_printed_as_escapes(tmp_path):
    folder = photos(Path(os.fsdecode(os.fsencode(str(tmp_path)) + b"/caf\xe9")))
    photos(folder / "größe")
    command = f"{sys.executable} -m meme data {os.fsdecode(b'caf?')}"
    done = run(f"cd {tmp_path}; {command}", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert b"8 in " not in done.stdout and b"images         16 in caf\\udce9" in done.stdout


def test_a_closed_output_is_no_error(tmp_path):
    done = run(f"{sys.executable} -m meme data {photos(tmp_path / 'photos')} >&-")
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_report_of_data_that_are_not_utf8_is_written(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    summary = Summary(
        title=name, folder=tmp_path, trials=[], winner=None, objectives=("fid", "macs"), facts={"command": f"--data {name}"}
    )
    write_report(summary, tmp_path / "report.html")
    assert "caf\\udce9" in (tmp_path / "report.html").read_text(encoding="utf-8")


# Data and features that are not the study's


def test_a_worker_whose_data_or_features_are_others_ends_the_search(tmp_path):
    config = tiny(photos(tmp_path / "photos"))
    ids = open_basis(config, "cpu", None).ids
    task = Task(0, config, "candidate", expert=1)
    objective = Objective(tmp_path / "study", tmp_path / "bank", "cpu", data=config.data, expected=ids)
    assert objective(task).loss is not None
    photos(tmp_path / "photos", count=1, first=99)
    with pytest.raises(SearchFault, match="data: the images are not those that the search began with"):
        attempt(_forgetful(objective), task)
    with pytest.raises(SearchFault, match=r"features: .* name a folder that all machines share in MEME_CACHE"):
        BasisIds(ids.data, "classifier-1").check(ids)


def _forgetful(objective: Objective):
    """``objective`` in a worker that has opened nothing yet."""
    from meme_nas.worker import objective as module

    module._opened.clear()
    return objective


def test_data_that_vanish_end_the_search_and_no_trial_is_recorded(tmp_path):
    config = tiny(tmp_path / "nowhere")
    objective = Objective(tmp_path / "study", tmp_path / "bank", "cpu")
    with pytest.raises(SearchFault, match="does not exist"):
        attempt(_forgetful(objective), Task(0, config, "candidate"))


class _Fails:
    """A search of one task, which its workers cannot run."""

    unit, done = "trials", False

    def __init__(self):
        self.tasks, self.recorded = [Task(0, tiny("digits"), "candidate")], []

    def next_task(self):
        return self.tasks.pop() if self.tasks else None

    def record(self, outcome):
        self.recorded.append(outcome)


def test_a_fault_in_a_worker_comes_out_of_the_engine(tmp_path):
    engine, search = LocalEngine(1), _Fails()
    objective = Objective(tmp_path / "study", tmp_path / "bank", "cpu", data=str(tmp_path / "nowhere"))
    try:
        with pytest.raises(UserError, match="does not exist"):
            engine.run(search, objective, lambda: None)
    finally:
        engine.close()
    assert search.recorded == []


def test_data_and_features_are_compared_by_content_and_not_by_name(tmp_path):
    for name in ("photos", "moved"):
        Study(tmp_path, {"data": f"{name} 0123", "features": f"classifier({name}) v-4567"}, ("fid", "macs")).close()
    with pytest.raises(UserError, match="data: the study in .* was made with moved 0123, not moved 89ab"):
        Study(tmp_path, {"data": "moved 89ab"}, ("fid", "macs"))


def test_the_tasks_of_a_study_whose_data_were_moved_are_run_where_they_are_now(tmp_path):
    config = tiny(photos(tmp_path / "photos"))
    ids = open_basis(config, "cpu", None).ids
    (tmp_path / "photos").rename(tmp_path / "moved")
    objective = Objective(tmp_path / "study", tmp_path / "bank", "cpu", data=str(tmp_path / "moved"), expected=ids)
    assert _forgetful(objective)(Task(0, config, "candidate", expert=1)).loss is not None


# Places


def test_a_search_does_not_leave_its_results_among_the_images(tmp_path, monkeypatch):
    monkeypatch.chdir(photos(tmp_path / "photos"))
    for wrong, field in (({}, "study"), ({"study": tmp_path / "s", "bank": Path("bank")}, "bank")):
        settings = SearchSettings(data=".", **wrong)
        with pytest.raises(UserError, match=f"{field}: .* lies inside the data"):
            check_places(settings, settings.full_config())
    settings = SearchSettings(data=".", study=tmp_path / "s")
    check_places(settings, settings.full_config())


def test_a_dry_run_needs_images_enough_for_a_score(tmp_path, capsys):
    from run_search import main

    photos(tmp_path / "photos", count=1)
    with pytest.raises(SystemExit) as ended:
        main(["--data", str(tmp_path / "photos"), "--study", str(tmp_path / "s"), "--dry-run"])
    assert ended.value.code == 2 and capsys.readouterr().err == "error: data: fid needs at least 2 images, and photos has 1\n"


@pytest.mark.parametrize("nothing", ["missing", "empty"])
def test_a_dry_run_needs_the_data(tmp_path, capsys, nothing):
    from run_search import main

    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as ended:
        main(["--data", str(tmp_path / nothing), "--study", str(tmp_path / "s"), "--dry-run"])
    assert ended.value.code == 2 and "error: data: " in capsys.readouterr().err


def test_only_half_written_files_of_the_study_itself_are_swept_up(tmp_path):
    ours = [".trials.csv.abcd1234.part", "trials/003/.expert-1.safetensors.abcd1234.part", "front/.trial-003.yaml.abcd1234.part"]
    ours += ["bank/ab/abc/.weights-000002.safetensors.abcd1234.part", "trials/expert1-003/.progress.json.abcd1234.part"]
    others = [".movie.mkv.part", "trials/.movie.mkv.part", "trials/003/.notes.txt.abcd1234.part", "mine/.film.download.part"]
    others += ["other/trials/003/.expert-1.safetensors.abcd1234.part", "other/.trials.csv.abcd1234.part"]
    for name in ours + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"half")
    mend(place_of(tmp_path))
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.part")}
    assert left == set(others)


def test_the_states_of_cascades_are_removed_and_nothing_beside_them(tmp_path):
    states = StateCache(tmp_path / "states")
    states.save("abc", np.zeros((2, 1, 4, 4), np.float32))
    (tmp_path / "states" / "mine.txt").write_text("kept")
    states.remove()
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["mine.txt"]
    (tmp_path / "states" / "mine.txt").unlink()
    states.remove()
    assert not (tmp_path / "states").exists()


# Results that cannot be written


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    config = tiny("digits")
    train(config, open_images("digits", size=8, channels=1), folder=folder)
    return folder


def test_scores_are_printed_before_they_are_written(trained, capsys, monkeypatch):
    def read_only(path, text):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr("meme.cli.commands.write_text", read_only)
    with pytest.raises(SystemExit) as ended:
        meme(["evaluate", str(trained), "--metrics", "fid", "--seeds", "1", "--features", "random"])
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out.startswith("FID ")
    assert said.err == f"error: {trained}/evaluation.json: the scores above can't be written there (Read-only file system)\n"


def test_images_are_not_drawn_for_a_place_that_cannot_be_written(trained, capsys, monkeypatch):
    monkeypatch.setattr("meme.cli.commands.draw", None)
    (trained / "file").touch()
    for command in (["sample", str(trained), "--out"], ["analyze", "latents", str(trained), "--out"]):
        with pytest.raises(SystemExit) as ended:
            meme([*command, str(trained / "file" / "x.png")])
        assert ended.value.code == 2 and "can't be written" in capsys.readouterr().err


def test_a_limit_on_the_size_of_files_is_told_in_a_sentence(trained):
    done = run(f"ulimit -f 1; {sys.executable} -m meme sample {trained} --json", MEME_CACHE=os.environ["MEME_CACHE"])
    assert done.returncode == 2 and b"Traceback" not in done.stderr and done.stderr.count(b"error: ") == 1


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EFBIG])
def test_any_place_that_cannot_be_written_is_told_in_a_sentence(number, capsys, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(number, os.strerror(number), "/results/x")

    monkeypatch.setattr("meme.cli.commands.train_config", refuse)
    with pytest.raises(SystemExit) as ended:
        meme(["train", "digits-meme"])
    assert ended.value.code == 2 and capsys.readouterr().err == f"error: /results/x: {os.strerror(number)}\n"


def test_a_loss_that_is_not_finite_is_told_in_a_sentence(tmp_path, capsys):
    config = tiny("digits").with_(training={"learning_rate": 1e30, "steps": 4})
    config.save(tmp_path / "config.yaml")
    with pytest.raises(SystemExit) as ended:
        meme(["train", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "out"), "--device", "cpu"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: expert 1: loss is ") and said.count("\n") == 1
    assert "a lower training.learning_rate or a training.gradient_clip may help" in said


def test_too_few_images_to_score_are_told_before_anything_is_drawn(tmp_path, capsys, trained):
    config = tiny(photos(tmp_path / "photos", count=3))
    train(config, open_images(tmp_path / "photos", size=16, channels=3), folder=tmp_path / "out")
    meme(["evaluate", str(tmp_path / "out"), "--seeds", "1", "--json"])
    said = capsys.readouterr()
    assert set(json.loads(said.out)["metrics"]) == {"fid", "sfid", "kid"}
    assert "left out, since 3 images are too few: precision, recall" in said.err


def test_a_search_in_which_nothing_was_scored_says_so_in_its_status(monkeypatch, tmp_path):
    import run_search

    nothing = Summary(title="", folder=tmp_path, objectives=("fid", "macs"), trials=[], winner=None)
    monkeypatch.setattr("meme_nas.run.run", lambda settings: nothing)
    with pytest.raises(SystemExit) as ended:
        run_search.main(["--study", str(tmp_path), "--retrain"])
    assert ended.value.code == 1


def test_text_with_odd_names_is_written(tmp_path):
    write_text(tmp_path / "a", os.fsdecode(b"caf\xe9"))
    assert (tmp_path / "a").read_text() == "caf\\udce9"


def test_an_outcome_is_not_a_fault():
    assert attempt(lambda task: Outcome(task.number), Task(3, tiny("digits"), "candidate")).failure is None
    failed = attempt(lambda task: 1 / 0, Task(3, tiny("digits"), "candidate"))
    assert failed.failure.startswith("ZeroDivisionError")


def test_the_feature_space_of_a_worker_is_that_of_the_driver():
    images = open_images("digits", size=8, channels=1)
    assert choose_features("random", images).feature_id == open_basis(tiny("digits"), "cpu", None).ids.features


def test_a_process_that_a_test_starts_keeps_what_it_compiles():
    """Also on a machine where PYTHONDONTWRITEBYTECODE is set, on which each would compile torch for 7 s."""
    code = "import sys; assert not sys.dont_write_bytecode"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
