"""Training one expert: it learns, survives interruption bit for bit, and is never taken for another."""

import dataclasses
import functools
import os
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from meme.config.presets import preset
from meme.config.schema import Config
from meme.data.images import batch_indices, open_images
from meme.errors import TrainingDiverged, UserError
from meme.support.signals import terminated_by_sigterm
from meme.support.tensor_files import load_tensors, read_header, save_tensors
from meme.training import trainer
from meme.training.trainer import Training, expert_file, learning_rate, load_expert, train_expert

SMALL = preset("digits-meme").with_(
    network={"channels": 8, "head_channels": 4},
    experts=[{"interval": (0, 500), "p": 0.5, "low_channels": (4, 8)}, {"interval": (500, 1000), "low_channels": (4, 12)}],
    training={
        "steps": 8,
        "batch_size": 4,
        "learning_rate": 2e-3,
        "weight_decay": 0.01,
        "warmup_steps": 3,
        "gradient_clip": 1.0,
        "ema_decay": 0.995,
    },
)
BRIEF = SMALL.with_(training={"steps": 2})


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def images():
    return open_images("digits", size=8, channels=1)


@pytest.fixture(autouse=True)
def frequent_reports(monkeypatch):
    monkeypatch.setattr(trainer, "REPORT_EVERY", 2)


@pytest.fixture
def train(images, tmp_path):
    """Train expert 1 in the test's folder; also the steps and losses reported."""

    def train(config=SMALL, *, folder=tmp_path, stop_at=None, images=images, **arguments):
        reports = []

        def on_progress(progress):
            reports.append((progress.step, progress.loss))
            if progress.step == stop_at:
                raise Interrupted

        try:
            expert = train_expert(config, 1, images, folder=folder, on_progress=on_progress, **arguments)
        except Interrupted:
            expert = None
        return expert, reports

    return train


@pytest.fixture
def unfinished(tmp_path):
    """All that is kept of a stopped training: weights, averages and moments."""
    return lambda: load_tensors(tmp_path / "expert-1.training.safetensors")


def steps_of(reports: list) -> list[int]:
    return [step for step, _ in reports]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def same_experts(one, other) -> bool:
    return same(one.state_dict(), other.state_dict())


# Learning


def test_the_loss_falls_on_digits(train):
    _, reports = train(SMALL.with_(training={"steps": 60, "batch_size": 16}), folder=None)
    losses = [loss for _, loss in reports]
    assert losses[0] == pytest.approx(1.0, abs=0.1)  # the network starts at zero, and noise has variance 1
    assert sum(losses[-5:]) / 5 < 0.6


def test_the_first_losses_are_the_ones_known(train):
    _, reports = train(folder=None)
    assert steps_of(reports) == [2, 4, 6, 8]
    assert [loss for _, loss in reports] == pytest.approx([1.07428, 0.98952, 0.90807, 0.84365], rel=1e-3)


def test_a_diverging_training_is_stopped_and_leaves_nothing(train, tmp_path):
    with pytest.raises(TrainingDiverged, match=r"expert 1: loss is (nan|inf) at step 6, with 5 steps in a row"):
        train(SMALL.with_(training={"learning_rate": 1e30, "warmup_steps": 0}))
    assert list(tmp_path.iterdir()) == []


def test_poisoned_images_stop_the_training(train, images):
    class Poisoned:
        content_id = "poisoned"

        def __len__(self):
            return len(images)

        def tensor(self, indices):
            return torch.full((len(indices), 1, 8, 8), float("nan"))

    with pytest.raises(TrainingDiverged):
        train(images=Poisoned(), folder=None)


def test_the_result_does_not_depend_on_what_was_drawn_before(train):
    one, _ = train(BRIEF, folder=None)
    torch.rand(5), np.random.rand(5)
    other, _ = train(BRIEF, folder=None)
    assert same_experts(one, other)
    assert not one.training


@pytest.mark.parametrize("number", [1, 2])
def test_candidates_see_the_same_batches_timesteps_and_noise(number, images):
    experts = [expert.model_dump() | {"low_channels": (0, 16), "p": expert.p} for expert in SMALL.experts]
    one, other = (Training(config, number, images, "cpu") for config in (SMALL, SMALL.with_(experts=experts)))
    for step in (0, 1, 300):
        one.step = other.step = step
        assert all(map(torch.equal, one.batch()[:3], other.batch()[:3]))


def test_experts_see_the_same_batches_and_noise_at_other_timesteps(images):
    one, other = (Training(SMALL, number, images, "cpu").batch() for number in (1, 2))
    assert torch.equal(one[0], other[0]) and torch.equal(one[2], other[2])
    assert (other[1] >= 500).all() and not torch.equal(one[1], other[1])


def test_steps_see_different_batches_and_dropout(images):
    training = Training(SMALL.with_(network={"dropout": 0.5}), 1, images, "cpu")
    first = [*training.batch()[:3], F.dropout(torch.ones(64))]
    training.step = 1
    assert not any(map(torch.equal, first, [*training.batch()[:3], F.dropout(torch.ones(64))]))


# Classes, and ADM's loss

CONDITIONAL = SMALL.with_(network={"classes": 10}, training={"label_dropout": 0.25, "batch_size": 64})


def test_labels_are_those_of_the_images_but_for_a_share_without(images):
    training, seen = Training(CONDITIONAL, 1, images, "cpu"), []
    for step in range(20):
        training.step = step
        labels = training.batch()[3]
        true = torch.tensor(images.labels[batch_indices(len(images), 64, CONDITIONAL.training.seed, step)])
        assert ((labels == true) | (labels == 10)).all()
        assert torch.equal(labels, training.batch()[3])
        seen.append(labels == 10)
    withheld = torch.stack(seen)
    assert withheld.float().mean().item() == pytest.approx(0.25, abs=0.05)
    assert len(withheld.unique(dim=0)) == 20


def test_without_classes_there_are_no_labels_and_the_same_noise(images):
    plain, conditional = (Training(config, 1, images, "cpu").batch() for config in (SMALL, CONDITIONAL))
    assert plain[3] is None
    same = Training(CONDITIONAL.with_(training={"batch_size": len(plain[0])}), 1, images, "cpu").batch()
    assert all(map(torch.equal, plain[:3], same[:3]))
    assert len(conditional[3]) == 64


def test_a_class_conditional_expert_learns_to_tell_classes_apart(train):
    steps = {"training": {"steps": 60, "batch_size": 32, "label_dropout": 0.1}}
    expert, _ = train(CONDITIONAL.with_(**steps), folder=None)
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([400])
    assert not torch.equal(expert(x, t, torch.tensor([3])), expert(x, t, torch.tensor([7])))


def test_the_hybrid_loss_trains_noise_and_variance(train):
    config = SMALL.with_(network={"learned_variance": True}, training={"p2_gamma": 1.0, "steps": 60})
    expert, losses = train(config, folder=None)
    assert losses[-1][1] < losses[0][1]
    predicted = expert(torch.randn(2, 1, 8, 8), torch.tensor([10, 700]))
    assert predicted.shape == (2, 2, 8, 8)
    assert predicted[:, 1].abs().max() > 0


# What one step does


@pytest.fixture
def weights_after(train, unfinished, tmp_path, monkeypatch):
    """Weights and averages after each of the first steps, read from the checkpoints of interruptions at every step."""

    def weights_after(config: Config, steps: int) -> list[tuple[dict, dict]]:
        monkeypatch.setattr(trainer, "REPORT_EVERY", 1)
        shutil.rmtree(tmp_path)
        found = []
        for step in range(1, steps + 1):
            train(config, stop_at=step)
            tensors = unfinished()
            weights = {name.removeprefix("expert."): each for name, each in tensors.items() if name.startswith("expert.")}
            found.append((weights, {name: tensors[f"averaged.module.{name}"] for name in weights}))
        return found

    return weights_after


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99])
def test_averaged_weights_are_the_ramped_moving_average(decay, weights_after):
    found = weights_after(SMALL.with_(training={"ema_decay": decay}), 5)
    for name in found[0][0]:
        expected = found[0][0][name].double()
        for seen, (weights, averages) in enumerate(found[1:], start=1):
            kept = min(decay, (1 + seen) / (10 + seen))
            expected = kept * expected + (1 - kept) * weights[name].double()
            torch.testing.assert_close(averages[name].double(), expected, rtol=1e-5, atol=1e-7)


def largest_move(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    return max((after[name] - before[name]).abs().max().item() for name in before)


@pytest.fixture
def first_move(weights_after, images):
    """How far the first step moves any weight."""

    def first_move(**training) -> float:
        config = SMALL.with_(training={"warmup_steps": 0, "weight_decay": 0.0, **training})
        return largest_move(Training(config, 1, images, "cpu").expert.state_dict(), weights_after(config, 1)[0][0])

    return first_move


def test_adams_first_step_is_the_learning_rate_and_warm_up_its_part(first_move):
    assert first_move(learning_rate=1e-2) == pytest.approx(1e-2, rel=1e-3)
    assert first_move(learning_rate=1e-2, warmup_steps=8) == pytest.approx(1e-2 / 8, rel=1e-3)


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_all_weights_in_one_piece_train_as_the_weights_by_themselves(clip, images):
    """Against AdamW, clipping and averages of torch on a network of its own, weight by weight."""
    config = SMALL.with_(training={"gradient_clip": clip})
    training = Training(config, 1, images, "cpu")
    alone = trainer.starting_expert(config, 1).train()
    optimizer = torch.optim.AdamW(alone.parameters(), weight_decay=config.training.weight_decay, fused=False)
    rate = functools.partial(learning_rate, config.training.learning_rate, config.training.warmup_steps)
    for _ in range(config.training.steps):
        x_0, t, epsilon, _ = training.batch()
        x_t = training.process.add_noise(x_0, epsilon, t)
        training.loss(alone(x_t, t), x_0, x_t, epsilon, t).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(alone.parameters(), clip, foreach=False)
        optimizer.param_groups[0]["lr"] = rate(training.step)
        optimizer.step()
        optimizer.zero_grad()
        trainer._run(stopped_after(training, training.step + 1), lambda progress: None, None, 60.0)
    for name, weight in alone.state_dict().items():
        torch.testing.assert_close(training.expert.state_dict()[name], weight, rtol=1e-4, atol=1e-5)


def stopped_after(training: Training, steps: int) -> Training:
    """The same training, whose loop ends after ``steps``."""
    training.config = training.config.model_copy(
        update={"training": training.config.training.model_copy(update={"steps": steps})}
    )
    return training


def test_a_clipped_gradient_moves_less(first_move):
    assert first_move(learning_rate=1e-2, gradient_clip=1e-12) < 1e-5


def test_the_learning_rate_rises_linearly_and_stays():
    assert [learning_rate(1.0, 4, step) for step in (0, 1, 3, 4, 1_000)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    assert learning_rate(0.5, 0, 0) == 0.5


# Interruption


@pytest.fixture(scope="module")
def unbroken(images, tmp_path_factory):
    """All that a training holds that is stopped once only, after its last step."""

    @functools.cache
    def unbroken(config: Config) -> dict[str, Tensor]:
        def stop_at_last(progress):
            if progress.step == config.training.steps:
                raise Interrupted

        folder = tmp_path_factory.mktemp("unbroken")
        with pytest.raises(Interrupted):
            train_expert(config, 1, images, folder=folder, on_progress=stop_at_last)
        return load_tensors(folder / "expert-1.training.safetensors")

    return unbroken


def is_average_of(expert, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(weight, state[f"averaged.module.{name}"]) for name, weight in expert.state_dict().items())


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("stops", [[4], [2, 6], [2, 4, 6]], ids=str)
def test_an_interrupted_training_ends_as_an_unbroken_one(stops, dropout, train, unfinished, unbroken):
    config = SMALL.with_(network={"dropout": dropout})
    for stop in [*stops, 8]:
        train(config, stop_at=stop)
    assert same(unfinished(), unbroken(config))
    assert is_average_of(train(config)[0], unbroken(config))


FINISHED = ["expert-1.safetensors", "expert-1.training.safetensors"]  # the expert, and the state that more steps go on from


def test_a_continued_training_begins_where_it_stopped_and_leaves_the_finished_expert_and_its_state(train, tmp_path):
    train(stop_at=4)
    assert os.listdir(tmp_path) == ["expert-1.training.safetensors"]
    assert steps_of(train()[1]) == [6, 8]
    assert sorted(os.listdir(tmp_path)) == FINISHED


def test_a_training_killed_between_reports_continues_from_its_timed_checkpoint(train, unbroken, images, tmp_path):
    source, copy = tmp_path / "killed" / "expert-1.training.safetensors", tmp_path / "expert-1.training.safetensors"

    def keep_copy(progress):
        if progress.step == 4:
            shutil.copy(source, copy)  # of step 3: this step's is written after the report

    train_expert(SMALL, 1, images, folder=source.parent, on_progress=keep_copy, checkpoint_seconds=0.0)
    assert read_header(copy)["step"] == 3
    assert is_average_of(train()[0], unbroken(SMALL))


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def interruption(request):
    """A signal that raises KeyboardInterrupt, also where the tests run in the background, whose shell has them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with terminated_by_sigterm():
        yield request.param
    signal.signal(signal.SIGINT, before)


def test_an_interruption_while_weights_are_updated_waits_for_them(interruption, train, unbroken, monkeypatch):
    def average(training):
        if training.averaged.n_averaged == 4:
            signal.raise_signal(interruption)
        averaged(training)

    averaged = Training.average
    with monkeypatch.context() as patch:
        patch.setattr(Training, "average", average)
        with pytest.raises(KeyboardInterrupt):
            train()
    expert, reports = train()
    assert is_average_of(expert, unbroken(SMALL))
    assert steps_of(reports)[0] == 6  # the fifth step is whole and kept


@pytest.mark.parametrize("checkpoint_seconds", [0.0, 60.0])
def test_an_error_within_a_step_does_not_count_that_step_twice(checkpoint_seconds, train, unbroken, tmp_path, monkeypatch):
    def interrupted(training):
        if training.averaged.n_averaged == 5:
            raise MemoryError
        average(training)

    average = Training.average
    with monkeypatch.context() as patch:
        patch.setattr(Training, "average", interrupted)
        with pytest.raises(MemoryError):
            train(checkpoint_seconds=checkpoint_seconds)
    expert, reports = train()
    assert is_average_of(expert, unbroken(SMALL))
    assert steps_of(reports)[0] == (6 if checkpoint_seconds == 0 else 2)


def test_what_a_killed_process_left_half_written_goes_with_the_end_and_nothing_else(train, tmp_path):
    left = [".expert-1.training.safetensors.7j4iiiec.part", ".expert-1.safetensors.abcd1234.part"]
    others = [".expert-2.training.safetensors.abcd1234.part", "notes.part"]
    for name in (*left, *others):
        (tmp_path / name).touch()
    train()
    assert {path.name for path in tmp_path.iterdir()} == {*FINISHED, *others}


def test_more_steps_continue_an_unfinished_training(train, unbroken):
    train(BRIEF.with_(training={"steps": 5}), stop_at=4)
    expert, reports = train()
    assert steps_of(reports) == [6, 8]
    assert is_average_of(expert, unbroken(SMALL))


def test_more_steps_continue_a_finished_training(train, unbroken):
    train(SMALL.with_(training={"steps": 5}))
    expert, reports = train()
    assert steps_of(reports) == [6, 8]
    assert is_average_of(expert, unbroken(SMALL))


@pytest.mark.parametrize("finish", [False, True])
def test_fewer_steps_than_are_done_start_anew(finish, train, unbroken):
    train(stop_at=None if finish else 4)
    expert, reports = train(BRIEF)
    assert steps_of(reports) == [2]
    assert is_average_of(expert, unbroken(BRIEF))


# Reuse


def test_a_finished_expert_is_returned_without_training(train, tmp_path):
    expert, _ = train()
    found, reports = train()
    assert reports == []
    assert same_experts(found, expert) and not found.training
    assert sorted(os.listdir(tmp_path)) == FINISHED


@pytest.mark.parametrize("sections", [{"name": "x"}, {"data": "x"}, {"sampling": {"steps": 4}}, {"evaluation": {"samples": 3}}])
def test_a_finished_expert_serves_configs_that_train_the_same(sections, train):
    train(BRIEF)
    assert train(BRIEF.with_(**sections))[1] == []


def first_expert(**fields) -> dict:
    first, second = (expert.model_dump() for expert in BRIEF.experts)
    return {"experts": [first | fields, second]}


def test_a_finished_expert_serves_any_choice_of_the_other_experts(train):
    train(BRIEF)
    first, second = (expert.model_dump() for expert in BRIEF.experts)
    assert train(BRIEF.with_(experts=[first, second | {"low_channels": (0, 0), "p": 0.1}]))[1] == []


OTHERS = [
    {"training": {"learning_rate": 1e-3}},
    {"training": {"seed": 1}},
    {"training": {"ema_decay": 0.5}},
    {"network": {"dropout": 0.1}},
    {"network": {"pool_strides": (1, 1)}},
    {"diffusion": {"schedule": "linear"}},
    {"experts": [BRIEF.experts[0].model_dump() | {"interval": (0, 1000)}]},
    first_expert(p=0.6),
    first_expert(low_channels=(8, 8)),
]


@pytest.mark.parametrize("stop_at", [2, None], ids=["unfinished", "finished"])
@pytest.mark.parametrize("sections", OTHERS, ids=str)
def test_another_config_trains_its_own_expert(sections, stop_at, train):
    train(BRIEF, stop_at=stop_at)
    other = BRIEF.with_(**sections)
    expert, reports = train(other)
    assert steps_of(reports) == [2]
    assert same_experts(expert, train(other, folder=None)[0])


def test_other_images_train_their_own_expert(train, images):
    train(BRIEF)
    others = dataclasses.replace(images, pixels=255 - images.pixels, content_id="inverted")
    expert, reports = train(BRIEF, images=others)
    assert steps_of(reports) == [2]
    assert same_experts(expert, train(BRIEF, images=others, folder=None)[0])


# Files


def test_a_loaded_expert_is_the_trained_one(train, tmp_path):
    expert, _ = train(BRIEF)
    loaded = load_expert(BRIEF, 1, tmp_path)
    x, t = torch.ones(2, 1, 8, 8), torch.tensor([3, 400])
    with torch.no_grad():
        assert torch.equal(loaded(x, t), expert(x, t))


def test_a_missing_expert_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"expert-2\.safetensors: missing; train this config first"):
        load_expert(BRIEF, 2, tmp_path)


@pytest.mark.parametrize("sections", [first_expert(low_channels=(8, 8)), {"network": {"channels": 16, "head_channels": 4}}])
def test_an_expert_of_another_architecture_is_a_user_error(sections, train, tmp_path):
    train(BRIEF)
    with pytest.raises(UserError, match="another architecture"):
        load_expert(BRIEF.with_(**sections), 1, tmp_path)


class Exploit:
    """Unpickling it would make the folder ``executed``."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (f"{self.folder}/executed",)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES = {
    "truncated": truncate,
    "garbage": lambda path: path.write_bytes(b"garbage" * 100),
    "empty": lambda path: path.write_bytes(b""),
    "pickle": lambda path: torch.save(Exploit(path.parent), path),
    "without header": lambda path: save_file({"x": torch.zeros(1)}, path),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("stop_at", [2, None], ids=["unfinished", "finished"])
def test_a_damaged_checkpoint_is_a_user_error(damage, stop_at, train, tmp_path):
    train(BRIEF, stop_at=stop_at)
    path = sorted(tmp_path.iterdir())[0]
    DAMAGES[damage](path)
    with pytest.raises(UserError, match="not a readable checkpoint of this program"):
        train(BRIEF)
    assert not (tmp_path / "executed").exists()


def without(tensors):
    return dict(list(tensors.items())[1:])


TAMPERED = {
    "a tensor less": without,
    "a tensor more": lambda tensors: tensors | {"more": torch.zeros(1)},
    "another shape": lambda tensors: {name: tensor[..., None] for name, tensor in tensors.items()},
    "another type": lambda tensors: {name: tensor.double() for name, tensor in tensors.items()},
}


@pytest.mark.parametrize("tampered", TAMPERED)
@pytest.mark.parametrize("stop_at", [2, None], ids=["unfinished", "finished"])
def test_tensors_that_are_not_what_the_header_claims_are_a_user_error(tampered, stop_at, train, tmp_path):
    train(SMALL, stop_at=stop_at)
    path = sorted(tmp_path.iterdir())[0]
    save_tensors(path, TAMPERED[tampered](load_tensors(path)), read_header(path))
    with pytest.raises(UserError, match="not a readable checkpoint of this program"):
        train(SMALL)


@pytest.mark.parametrize("step", ["8", 8.5, True, None, -1, 10**20])
def test_a_checkpoint_of_no_such_step_is_trained_anew(step, train, tmp_path):
    train(SMALL, stop_at=2)
    (path,) = tmp_path.iterdir()
    save_tensors(path, load_tensors(path), read_header(path) | {"step": step})
    _, reports = train(SMALL)
    assert steps_of(reports) == [2, 4, 6, 8]


def test_tensors_and_header_come_back_as_they_were_saved(tmp_path):
    path = tmp_path / "new" / "x.safetensors"
    tensors = {"strided": torch.arange(6.0).view(2, 3).T, "scalar": torch.tensor(3)}
    save_tensors(path, tensors, {"step": 3, "training": "é"})
    assert same(load_tensors(path), tensors)
    assert read_header(path) == {"step": 3, "training": "é"}
    assert os.listdir(path.parent) == ["x.safetensors"]


def test_experts_lie_in_files_of_their_own(tmp_path):
    assert expert_file(tmp_path, 1) != expert_file(tmp_path, 2)
