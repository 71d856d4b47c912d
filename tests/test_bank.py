"""The expert bank: nothing is trained twice, nothing half written is read, nothing of others is overwritten."""

import json
import multiprocessing
import os

import pytest
import torch

from meme.config.presets import preset
from meme.config.schema import Config
from meme.data.images import open_images
from meme.errors import UserError
from meme.training.interval_loss import hold_out, interval_loss
from meme.training.trainer import train_expert
from meme_nas.worker import bank as bank_module
from meme_nas.worker.bank import ExpertBank

CONFIG = preset("digits-meme").with_(training={"steps": 4, "batch_size": 8})
TRAIN, HELD_OUT = hold_out(open_images("digits", size=8, channels=1))


@pytest.fixture
def bank(tmp_path) -> ExpertBank:
    return ExpertBank(tmp_path / "bank", TRAIN, HELD_OUT)


def with_steps(steps: int) -> Config:
    return CONFIG.with_(training={"steps": steps})


def no_training(*arguments, **options):
    pytest.fail("trained again")


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


def test_what_the_bank_holds_is_what_the_trainer_makes(bank):
    banked = bank.obtain(CONFIG, 2)
    expert = train_expert(CONFIG, 2, TRAIN)
    assert same(bank.load(CONFIG, 2, banked), expert)
    loss = interval_loss(expert, CONFIG, 2, HELD_OUT)
    assert (banked.loss, banked.loss_error) == (loss.mean, loss.error)
    assert banked.params == sum(weight.numel() for weight in expert.parameters())
    assert [step for step, _ in banked.curve] == [4]


def test_an_expert_is_trained_once(bank, monkeypatch):
    first = bank.obtain(CONFIG, 1)
    monkeypatch.setattr(bank_module, "run_training", no_training)
    assert bank.obtain(CONFIG, 1) == first
    again = ExpertBank(bank.folder, TRAIN, HELD_OUT)  # another process, or a later day
    assert again.find(CONFIG, 1) == again.obtain(CONFIG, 1) == first


@pytest.mark.parametrize(
    "change",
    [
        {"training": {"seed": 1}},
        {"training": {"learning_rate": 1e-3}},
        {"diffusion": {"beta_end": 0.02}},
        {"experts": [CONFIG.experts[0].model_dump() | {"p": 0.5}, *CONFIG.experts[1:]]},
        {"experts": [CONFIG.experts[0].model_dump() | {"low_channels": (16, 0)}, *CONFIG.experts[1:]]},
    ],
)
def test_what_determines_an_expert_is_in_its_id(bank, change):
    assert bank.key(CONFIG.with_(**change), 1) != bank.key(CONFIG, 1)


def test_what_does_not_is_not(bank):
    others = [expert.model_dump() | {"p": 1.0, "low_channels": (0, 0)} for expert in CONFIG.experts[1:]]
    changed = CONFIG.with_(name="x", experts=[CONFIG.experts[0], *others], evaluation={"samples": 7}, training={"steps": 9})
    assert bank.key(changed, 1) == bank.key(CONFIG, 1)


def test_p_of_an_expert_for_all_timesteps_is_not_in_its_id(bank):
    alone = preset("digits-iu-ldm-s")
    assert bank.key(alone.with_(experts=[alone.experts[0].model_dump() | {"p": 0.3}]), 1) == bank.key(alone, 1)


def test_training_further_is_one_training(bank):
    short, long = bank.obtain(with_steps(4), 3), bank.obtain(with_steps(9), 3)
    assert short.id == long.id and long.loss != short.loss
    assert same(bank.load(with_steps(9), 3, long), train_expert(with_steps(9), 3, TRAIN))
    assert [step for step, _ in long.curve] == [4, 9]
    assert same(bank.load(with_steps(4), 3, short), train_expert(with_steps(4), 3, TRAIN))  # the shorter one is still there


def test_a_shorter_training_after_a_longer_one_leaves_that_its_state(bank):
    bank.obtain(with_steps(9), 3)
    short = bank.obtain(with_steps(4), 3)
    assert same(bank.load(with_steps(4), 3, short), train_expert(with_steps(4), 3, TRAIN))
    assert same(bank.load(with_steps(12), 3, bank.obtain(with_steps(12), 3)), train_expert(with_steps(12), 3, TRAIN))


def test_an_interrupted_training_goes_on(bank):
    class Interrupted(Exception):
        pass

    def interrupt(progress):
        raise Interrupted

    with pytest.raises(Interrupted):
        bank.obtain(with_steps(30), 1, on_progress=interrupt)  # after the first report, at step 25
    assert bank.find(with_steps(30), 1) is None
    assert same(bank.load(with_steps(30), 1, bank.obtain(with_steps(30), 1)), train_expert(with_steps(30), 1, TRAIN))


@pytest.mark.parametrize("damage", ["{", "[]", '{"4": {"id": 1}}', ""])
def test_a_damaged_record_is_made_again(bank, damage):
    first = bank.obtain(CONFIG, 1)
    path = bank.folder / first.id[:2] / first.id / "entry.json"
    path.write_text(damage)
    again = ExpertBank(bank.folder, TRAIN, HELD_OUT)
    assert again.find(CONFIG, 1) is None
    assert again.obtain(CONFIG, 1).loss == first.loss


def test_a_record_without_its_weights_is_not_believed(bank):
    first = bank.obtain(CONFIG, 1)
    bank.weights(first).unlink()
    assert bank.find(CONFIG, 1) is None
    assert bank.obtain(CONFIG, 1) == first and bank.weights(first).is_file()


def _obtain(folder, results):
    trainings = []
    original = bank_module.run_training
    bank_module.run_training = lambda *arguments, **options: trainings.append(1) or original(*arguments, **options)
    torch.set_num_threads(1)
    ExpertBank(folder, TRAIN, HELD_OUT).obtain(with_steps(40), 1)
    results.put(len(trainings))


def test_two_processes_train_an_expert_once(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    workers = [spawn.Process(target=_obtain, args=(tmp_path / "bank", results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    counts = [results.get(timeout=600) for _ in workers]
    for worker in workers:
        worker.join()
    assert sorted(counts) == [0, 1]


def test_a_bank_of_other_data_is_refused_and_left_alone(bank):
    bank.obtain(CONFIG, 1)
    before = sorted(path.name for path in bank.folder.rglob("*"))
    other = hold_out(open_images("digits", size=16, channels=1))
    with pytest.raises(UserError, match="other data or another image size"):
        ExpertBank(bank.folder, *other)
    assert sorted(path.name for path in bank.folder.rglob("*")) == before


@pytest.mark.parametrize(
    "label, words", [({"format": 0, "data": "x"}, "format 0"), ({}, "not readable"), ([], "not readable"), ("{", "not readable")]
)
def test_an_older_or_broken_bank_is_refused(tmp_path, label, words):
    (tmp_path / "bank.json").write_text(label if label == "{" else json.dumps(label))
    with pytest.raises(UserError, match=words):
        ExpertBank(tmp_path, TRAIN, HELD_OUT)


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="holds other files"):
        ExpertBank(tmp_path, TRAIN, HELD_OUT)


def test_the_least_recently_used_go_first_and_states_before_entries(bank):
    trained = [bank.obtain(CONFIG.with_(training={"seed": seed}), 1) for seed in range(3)]
    for age, banked in zip((30, 10, 20), trained, strict=True):
        moment = 1_000_000 - age
        os.utime(bank.folder / banked.id[:2] / banked.id, (moment, moment))
    sizes = {path: path.stat().st_size for path in bank.folder.rglob("*.safetensors")}
    state = next(size for path, size in sizes.items() if path.name.startswith("state"))

    limit = (sum(sizes.values()) - 2 * state) / 2**30
    later = ExpertBank(bank.folder, TRAIN, HELD_OUT, limit_gib=limit)
    later._evict()
    left = [(bank.folder / banked.id[:2] / banked.id / "state.safetensors").exists() for banked in trained]
    assert left == [False, True, False]
    assert all(bank.weights(banked).exists() for banked in trained)

    later.limit_gib = 0.0
    later._evict()
    assert not any(bank.weights(banked).exists() for banked in trained)
    assert later.obtain(CONFIG, 1) == trained[0]


def test_what_was_asked_for_stays(bank):
    bank.limit_gib = 0.0
    banked = bank.obtain(CONFIG, 1)
    assert bank.weights(banked).exists()


# --- Validation -----------------------------------------------------------------------------------


def test_parts_are_disjoint_and_cover_the_data():
    assert len(TRAIN) + len(HELD_OUT) == 1_797 and len(HELD_OUT) == 112
    assert not set(TRAIN.indices) & set(HELD_OUT.indices)
    assert len({TRAIN.content_id, HELD_OUT.content_id, TRAIN.whole.content_id}) == 3
    assert torch.equal(HELD_OUT.tensor([3, 5]), TRAIN.whole.tensor(HELD_OUT.indices[[3, 5]]))
    assert len(HELD_OUT.labels) == 112 and TRAIN.classes == TRAIN.whole.classes


@pytest.mark.parametrize("number", [1, 4])
def test_the_interval_loss_is_the_mean_over_the_interval(number):
    class Zero(torch.nn.Module):
        def forward(self, x, t):
            first, end = CONFIG.expert(number).interval
            assert ((t >= first) & (t < end)).all()
            return torch.zeros_like(x)

    loss = interval_loss(Zero(), CONFIG, number, HELD_OUT)
    assert loss.mean == pytest.approx(1.0, abs=4 * loss.error) and 0 < loss.error < 0.02  # the noise itself: variance 1


def test_a_better_expert_has_a_lower_interval_loss(bank):
    losses = [bank.obtain(with_steps(steps), 1).loss for steps in (5, 40)]
    assert losses[1] < losses[0]
