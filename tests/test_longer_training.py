"""A finished training goes on with more steps, and two commands never train in one folder at once."""

import multiprocessing
import os
import socket

import pytest

from meme.cli.verbs import main
from meme.config.presets import preset
from meme.config.schema import Config
from meme.errors import UserError
from meme.pipeline import claim_folder, load_ensemble, open_reference, train
from meme.support.folder_lock import FolderLock

BRIEF = preset("digits-meme").with_(training={"steps": 2, "batch_size": 4})
LONGER = BRIEF.with_(training={"steps": 5})


@pytest.fixture(scope="module")
def images():
    return open_reference(BRIEF)


def same(one, other):
    pairs = zip(one.experts, other.experts, strict=True)
    return all(torch_equal(a, b) for a, b in pairs)


def torch_equal(a, b):
    return all(bool((x == y).all()) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_more_steps_go_on_from_where_a_finished_training_ended(images, tmp_path):
    train(BRIEF, images, folder=tmp_path)
    steps = []
    longer = train(LONGER, images, folder=tmp_path, on_progress=lambda progress: steps.append((progress.step, progress.expert)))
    assert same(longer, train(LONGER, images))
    assert same(load_ensemble(tmp_path), longer)
    assert Config.load(tmp_path / "config.yaml").training.steps == 5


def test_the_command_says_where_it_goes_on(tmp_path, capsys):
    BRIEF.save(tmp_path / "small.yaml")
    command = ["train", str(tmp_path / "small.yaml")]
    main(command)
    capsys.readouterr()
    main([*command, "--steps", "4"])
    said = capsys.readouterr()
    assert "expert 4 goes on from step 2" in said.out + said.err
    (tmp_path / "small" / "expert-1.training.safetensors").unlink()
    main([*command, "--steps", "5"])
    said = " ".join(" ".join(capsys.readouterr()).split())
    assert "expert 1 starts over" in said and "expert 2 goes on from step 4" in said
    with pytest.raises(SystemExit):
        main(command)
    assert "can only be made longer; give --steps 5 or more" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("steps", ["0", "-1"])
def test_a_number_of_steps_that_cannot_be_is_refused(steps, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["train", "digits-meme", "--steps", steps, "--out", str(tmp_path / "out")])
    assert "training.steps" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_training_half_made_longer_is_not_taken_for_a_finished_one(images, tmp_path):
    train(BRIEF, images, folder=tmp_path)

    def stop(progress):
        if progress.expert == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(LONGER, images, folder=tmp_path, on_progress=stop)
    with pytest.raises(UserError, match=r"expert-2\.safetensors: holds an expert of 2 training steps, not 5"):
        load_ensemble(tmp_path)
    assert same(train(LONGER, images, folder=tmp_path), train(LONGER, images))


def _hold(folder, is_held, may_end):
    with claim_folder(folder, BRIEF):
        is_held.set()
        may_end.wait(60)


def test_a_second_command_is_told_who_trains_in_the_folder(images, tmp_path):
    spawn = multiprocessing.get_context("spawn")
    is_held, may_end = spawn.Event(), spawn.Event()
    other = spawn.Process(target=_hold, args=(tmp_path, is_held, may_end))
    other.start()
    try:
        assert is_held.wait(60)
        with pytest.raises(UserError, match=f"out: .* is being trained in by process {other.pid} on {socket.gethostname()}"):
            train(BRIEF, images, folder=tmp_path)
        assert not (tmp_path / "expert-1.safetensors").exists()
    finally:
        may_end.set()
        other.join()
    train(BRIEF, images, folder=tmp_path)


def test_a_lock_ends_with_its_process_and_a_torn_note_of_its_holder_does_no_harm(tmp_path):
    lock = FolderLock(tmp_path / "x" / ".lock", "held by {holder}")
    with pytest.raises(UserError, match=f"held by process {os.getpid()} on "):
        FolderLock(tmp_path / "x" / ".lock", "held by {holder}")
    (tmp_path / "x" / ".lock.holder").write_text("{")
    with pytest.raises(UserError, match="held by another process"):
        FolderLock(tmp_path / "x" / ".lock", "held by {holder}")
    lock.release()
    lock.release()
    with FolderLock(tmp_path / "x" / ".lock", "held by {holder}"):
        pass
