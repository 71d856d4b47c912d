"""A gradient that is not finite costs its step alone; too many in a row end a training, which then goes on from a good state."""

import dataclasses
import math
import shutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from meme.cli.parsing import exits_with_a_sentence
from meme.config.presets import preset
from meme.config.schema import Config
from meme.data.images import open_images
from meme.errors import TrainingDiverged, UserError
from meme.support.tensor_files import load_tensors, read_header, save_tensors
from meme.training import trainer
from meme.training.kept_states import KeptStates
from meme.training.skipped_steps import LossWindow
from meme.training.trainer import Training, train_expert

CONFIG = preset("digits-meme").with_(
    network={"channels": 8, "head_channels": 4},
    experts=[{"interval": (0, 1000), "low_channels": (4, 8)}],
    training={"steps": 24, "batch_size": 4, "warmup_steps": 0, "gradient_clip": 1.0},
)


@pytest.fixture(autouse=True)
def frequent_reports(monkeypatch):
    monkeypatch.setattr(trainer, "REPORT_EVERY", 4)


@pytest.fixture(scope="module")
def images():
    return open_images("digits", size=8, channels=1)


@pytest.fixture
def broken_at(images, monkeypatch):
    """Images whose values are not numbers in the batches of some steps."""

    def broken_at(*steps):
        class Broken(type(images)):
            def tensor(self, indices):
                value = math.nan if trainer_step() in steps else 0.0
                return super().tensor(indices) + value

        current: list[Training] = []
        monkeypatch.setattr(Training, "batch", lambda training: current.append(training) or batch(training))

        def trainer_step():
            return current[-1].step if current else -1

        batch = original_batch
        return Broken(**{field.name: getattr(images, field.name) for field in dataclasses.fields(images)})

    original_batch = Training.batch
    return broken_at


def trained(data, config=CONFIG, **options):
    reports = []
    expert = train_expert(config, 1, data, on_progress=reports.append, **options)
    return expert, reports


def same(one, other):
    return all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


def finite(tensors):
    return all(bool(tensor.isfinite().all()) for tensor in tensors.values())


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_step_without_a_finite_gradient_changes_no_weight_and_is_counted(clip, broken_at):
    config = CONFIG.with_(training={"gradient_clip": clip})
    training = Training(config, 1, broken_at(2), "cpu")
    states = []
    for steps in (1, 2, 3, 4):
        training.config = config.with_(training={"steps": steps})
        # One skipped step would be half of so short a training, which is not what is tested here.
        training.window.mean = lambda number, step, steps: 0.5
        trainer._run(training, lambda progress: None, None, 60.0)
        moments = [training.optimizer.state[training.weights][key].clone() for key in trainer.ADAM_MOMENTS]
        states.append((training.weights.detach().clone(), *moments))
    assert all(map(torch.equal, states[1], states[2]))
    assert not torch.equal(states[2][0], states[3][0])
    assert training.skipped == 1 and training.step == 4
    assert training.optimizer.state[training.weights]["step"] == 3  # Adam's correction of bias counts steps that were taken


def test_a_training_with_one_bad_batch_ends_well_and_says_how_many_steps_it_skipped(broken_at):
    expert, reports = trained(broken_at(9))
    assert finite(expert.state_dict())
    assert [(report.step, report.skipped) for report in reports] == [(4, 0), (8, 0), (12, 1), (16, 1), (20, 1), (24, 1)]
    assert all(math.isfinite(report.loss) for report in reports)


def test_the_reported_loss_is_the_mean_of_the_steps_taken():
    window, zero, one = LossWindow(), torch.tensor(0.0), torch.tensor(1.0)
    for loss, skipped in ((2.0, zero), (math.nan, one), (4.0, zero)):
        window.add(torch.tensor(loss), skipped)
    assert window.mean(1, 3, 100) == 3.0
    window.add(torch.tensor(math.nan), one)
    assert window.mean(1, 4, 100) is None


class Stopped(Exception):
    pass


def test_a_state_is_never_saved_with_numbers_that_are_not_finite_and_resumes_bit_for_bit(broken_at, tmp_path):
    seen = []

    def look(progress):
        for path in tmp_path.glob("*.training*"):
            seen.append(finite(load_tensors(path)))
        if progress.step == 12:
            raise Stopped

    data = broken_at(9, 10, 11)
    unbroken, _ = trained(data)
    with pytest.raises(Stopped):
        train_expert(CONFIG, 1, data, folder=tmp_path, on_progress=look, checkpoint_seconds=0.0)
    assert seen and all(seen)
    assert read_header(tmp_path / "expert-1.training.safetensors")["step"] == 9  # the last one that was taken
    resumed, reports = trained(data, folder=tmp_path)
    assert same(resumed, unbroken)
    assert reports[-1].skipped == 3


def test_too_many_in_a_row_end_the_training_which_then_goes_on_from_a_good_state(broken_at, images, tmp_path):
    with pytest.raises(TrainingDiverged, match=r"expert 1: loss is nan at step 20, with 11 steps in a row skipped"):
        trained(broken_at(*range(9, 30)), folder=tmp_path, checkpoint_seconds=0.0)
    assert all(finite(load_tensors(path)) for path in tmp_path.iterdir())
    resumed, reports = trained(broken_at(), folder=tmp_path)  # what was wrong has been mended
    assert same(resumed, trained(broken_at())[0])
    assert reports[0].step == 12 and reports[-1].skipped == 0


def test_skipped_steps_in_a_row_are_counted_over_reports():
    window = LossWindow()
    for step in range(1, 10):
        window.add(torch.tensor(math.nan), torch.tensor(1.0))
        assert window.mean(1, step, 100) is None
    window.add(torch.tensor(math.nan), torch.tensor(1.0))
    with pytest.raises(TrainingDiverged, match="10 steps in a row"):
        window.mean(1, 10, 100)


def test_weights_that_overflowed_are_no_finished_expert(images, tmp_path, monkeypatch):
    average = Training.average

    def overflowing(training):
        average(training)
        if training.step == CONFIG.training.steps - 1:
            training.weights.data[0] = math.inf

    monkeypatch.setattr(Training, "average", overflowing)
    with pytest.raises(TrainingDiverged, match="expert 1: weights are not finite at step 24"):
        trained(images, folder=tmp_path)
    assert not (tmp_path / "expert-1.safetensors").exists()


def stop_at(step):
    def stop(progress):
        if progress.step == step:
            raise Stopped

    return stop


@pytest.mark.parametrize("damage", ["torn", "not finite", "missing"])
def test_a_bad_state_gives_way_to_the_one_before(damage, images, tmp_path):
    for step in (8, 16):
        with pytest.raises(Stopped):
            train_expert(CONFIG, 1, images, folder=tmp_path, on_progress=stop_at(step))
    newest, previous = tmp_path / "expert-1.training.safetensors", tmp_path / "expert-1.training.previous.safetensors"
    assert [read_header(path)["step"] for path in (newest, previous)] == [16, 8]
    if damage == "torn":
        newest.write_bytes(newest.read_bytes()[:-100])
    elif damage == "missing":
        newest.unlink()
    else:
        tensors = load_tensors(newest)
        save_tensors(newest, {name: each * math.nan for name, each in tensors.items()}, read_header(newest))
    resumed, reports = trained(images, folder=tmp_path)
    assert reports[0].step == 12
    assert same(resumed, trained(images)[0])
    assert not previous.exists()


def test_a_state_from_before_such_checks_with_no_other_is_trained_anew(images, tmp_path):
    with pytest.raises(Stopped):
        train_expert(CONFIG, 1, images, folder=tmp_path, on_progress=stop_at(8))
    (path,) = tmp_path.iterdir()
    tensors = load_tensors(path)
    poisoned = {name: each * math.nan if each.is_floating_point() else each for name, each in tensors.items()}
    save_tensors(path, poisoned, read_header(path))
    expert, reports = trained(images, folder=tmp_path)
    assert reports[0].step == 4 and same(expert, trained(images)[0])


def test_an_unreadable_state_with_no_other_is_still_said(tmp_path):
    states = KeptStates(tmp_path / "expert-1.training.safetensors")
    states.newest.write_bytes(b"")

    def refuse(path):
        raise UserError(f"{path}: unreadable")

    with pytest.raises(UserError, match="unreadable"):
        states.load(refuse)
    shutil.copy(states.newest, states.previous)
    assert states.load(lambda path: path == states.previous)


class Reads(TorchDispatchMode):
    """Counts what makes the CPU wait for a device: reading a number from a tensor."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **(options or {}))


def test_no_step_between_reports_waits_for_the_device(images, monkeypatch):
    monkeypatch.setattr(trainer, "REPORT_EVERY", 1_000)

    def reads(steps):
        training = Training(CONFIG.with_(training={"steps": steps}), 1, images, "cpu")
        given = training.batch()
        monkeypatch.setattr(training, "batch", lambda: given)  # what is drawn is drawn on the CPU
        with Reads() as mode:
            trainer._run(training, lambda progress: None, None, 60.0)
        return mode.count

    assert reads(9) == reads(3)


def test_a_command_gives_up_in_one_sentence(capsys):
    with pytest.raises(SystemExit) as ended, exits_with_a_sentence(Config):
        raise TrainingDiverged("expert 1: loss is nan at step 20")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: expert 1: loss is nan at step 20\n"
