"""A short form of ``benchmarks/faults.py``: real searches are killed and lose nothing. And the ways a command may be ended."""

import random
import signal
import time
from pathlib import Path

import pytest
import torch
from faults import Command, Killer, Tally, broken_files, compare, full_disk, scores
from processes import LONGEST, training
from pydantic import BaseModel, model_serializer
from safetensors.torch import save_file

from meme.cli.parsing import exits_with_a_sentence
from meme.errors import UserError
from meme.support import tensor_files as checkpoint
from meme.support.tensor_files import save_tensors
from meme_nas.record.study import Study
from meme_nas.settings import SearchSettings


@pytest.mark.slow
def test_a_killed_search_loses_nothing_and_ends_as_the_unbroken_one(tmp_path):
    tally = Tally()
    Killer(tmp_path, "local", random.Random(1), tally, ["joint"]).kill(1)
    assert tally.details == []
    assert tally.kills == 1


@pytest.mark.slow
def test_a_search_on_a_full_disk_stops_and_goes_on_where_room_is_made(tmp_path):
    tally = Tally()
    if not full_disk(tmp_path, tally):
        pytest.skip("no small file system can be mounted here")
    assert tally.details == []


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_sigterm_ends_a_search_with_143_and_the_same_command_goes_on(tmp_path, engine):
    if engine == "ray":
        pytest.importorskip("ray", reason="Ray is not installed")
    command = Command(tmp_path / "study", "joint", engine)
    with command.started() as driver:
        deadline = time.monotonic() + LONGEST
        while not scores(command.study) and driver.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(timeout=LONGEST) == 143
    assert "terminated; the same command goes on from here" in command.study.with_suffix(".log").read_text()
    before, tally = scores(command.study), Tally()
    assert command.run() == 0
    compare(before, command.study, tally)
    assert tally.details == [] and [kind for kind, _ in scores(command.study)].count("ensembles") == 4


def test_a_training_ends_on_sigterm_with_its_checkpoint(tmp_path):
    with training(["train", "digits-meme", "--out", str(tmp_path / "run")], tmp_path / "trains") as process:
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=LONGEST)
    assert process.returncode == 143 and "terminated" in said
    assert list((tmp_path / "run").glob("expert-*.safetensors")) and broken_files(tmp_path) == []


@pytest.fixture
def ctrl_c_works():
    """Also where the tests run in the background, whose shell has them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_what_ended_a_command_is_known_though_a_library_raises_an_interruption_of_its_own(number, status, ctrl_c_works):
    with pytest.raises(SystemExit) as ended, exits_with_a_sentence(SearchSettings):
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None
    assert ended.value.code == status


@pytest.mark.parametrize("cause", [None, ValueError("of its own")])
def test_a_library_that_fails_as_it_is_interrupted_is_no_error_of_the_command(cause, capsys):
    """Such as the release of a lock file: a search that SIGTERM met there ended with a traceback and status 1."""
    with pytest.raises(SystemExit) as ended, exits_with_a_sentence(SearchSettings):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            raise FileNotFoundError(2, "No such file") from cause
    assert ended.value.code == 143
    assert "terminated; the same command goes on from here" in capsys.readouterr().err


# The counting itself


def test_what_is_lost_changed_or_broken_is_counted(tmp_path):
    settings = SearchSettings(study=tmp_path)
    Study(tmp_path, settings.in_force(), settings.objectives).close()
    (tmp_path / "half.yaml").write_text("name: [")
    (tmp_path / "half.json").write_text("{")
    save_file({"x": torch.zeros(3)}, tmp_path / "half.safetensors")
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "half.safetensors").read_bytes()[:-1])
    tally = Tally()
    compare({("ensembles", 0): ("complete", (), ())}, tmp_path, tally)
    assert tally.faults == {"lost": 1, "broken_files": 3}
    assert tally.as_json()["lost"] == 1


# Disk


def test_a_checkpoint_that_finds_no_room_is_an_error_of_the_disk_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"x": torch.zeros(3)}, {"step": 1})
    before = path.read_bytes()

    def no_room(*_, **__):
        raise checkpoint.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", no_room)
    with pytest.raises(OSError, match="No space left on device"):
        save_tensors(path, {"x": torch.ones(3)}, {"step": 2})
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_a_full_disk_is_said_in_a_sentence(capsys):
    with pytest.raises(SystemExit) as ended, exits_with_a_sentence(SearchSettings):
        raise OSError(28, "No space left on device", str(Path("/full/disk")))
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "error: /full/disk: No space left on device; make room, and the same command goes on from here\n"
    )


def test_an_interruption_that_a_library_wrapped_is_one(capsys):
    """As pydantic does in the middle of a serializer: a search that was terminated there ended in a traceback."""

    class Interrupted(BaseModel):
        @model_serializer
        def _content(self) -> dict:
            signal.raise_signal(signal.SIGTERM)
            return {}

    with pytest.raises(SystemExit) as ended, exits_with_a_sentence(SearchSettings):
        Interrupted().model_dump()
    assert ended.value.code == 143
    assert capsys.readouterr().err.strip() == "terminated; the same command goes on from here"


def test_a_state_that_vanishes_while_it_is_opened_is_told_in_a_sentence(tmp_path, monkeypatch):
    """safetensors looks for a file, and torch maps it."""

    def vanished(path, **options):
        raise RuntimeError(f"unable to open file <{path}> in read-only mode: No such file or directory (2)")

    monkeypatch.setattr(checkpoint, "safe_open", vanished)
    with pytest.raises(UserError, match="not a readable checkpoint"):
        checkpoint.read_header(tmp_path / "expert-1.training.safetensors")
