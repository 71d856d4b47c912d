"""A bank that several searches share: what one of them needs, the others leave alone, whenever a file vanishes."""

import os
import shutil
import threading
import time

import filelock
import pytest

from meme.config.presets import preset
from meme.data.images import open_images
from meme.support import files
from meme.support.files import remove_abandoned, remove_partials, written_whole
from meme.support.folder_lock import FolderLock, is_held
from meme.training.interval_loss import hold_out
from meme_nas.record.folder import LOCK
from meme_nas.record.storage import Place, mend
from meme_nas.record.study import Study
from meme_nas.settings import SearchSettings
from meme_nas.worker import bank as bank_module
from meme_nas.worker.bank import ExpertBank

CONFIG = preset("digits-meme").with_(training={"steps": 1, "batch_size": 4})
TRAIN, HELD_OUT = hold_out(open_images("digits", size=8, channels=1))


def seeded(seed):
    return CONFIG.with_(training={"seed": seed})


@pytest.fixture
def opened(tmp_path):
    """Banks in one folder, each as the workers of one search open it."""
    return lambda study, limit_gib=None: ExpertBank(tmp_path / "bank", TRAIN, HELD_OUT, limit_gib, tmp_path / study / LOCK)


@pytest.fixture
def running(tmp_path):
    """Searches that run, each with the lock of its study."""
    held = []

    def running(name):
        held.append(Study(tmp_path / name, SearchSettings(study=tmp_path / name).in_force(), ("fid", "macs")))
        return held[-1]

    yield running
    for study in held:
        study.close()


# Leases


def test_what_a_running_search_asked_for_is_not_evicted_by_another(opened, running):
    running("one")
    banked = opened("one").obtain(seeded(0), 1)
    other = opened("other", limit_gib=0.0)
    running("other")
    other.obtain(seeded(1), 1)  # over the limit: all goes that may go
    assert other.weights(banked).is_file()
    assert opened("one").find(seeded(0), 1) == banked


def test_what_was_found_there_is_leased_as_well(opened, running):
    banked = opened("earlier").obtain(seeded(0), 1)
    running("one")
    assert opened("one").obtain(seeded(0), 1) == banked
    opened("other", limit_gib=0.0).obtain(seeded(1), 1)
    assert opened("one").find(seeded(0), 1) == banked


def test_a_lease_ends_with_its_search_and_begins_again_with_it(opened, running):
    study = running("one")
    banked = opened("one").obtain(seeded(0), 1)
    study.close()
    study = running("one")  # it goes on
    opened("other", limit_gib=0.0).obtain(seeded(1), 1)
    assert opened("one").find(seeded(0), 1) == banked
    study.close()
    opened("other", limit_gib=0.0).obtain(seeded(2), 1)
    assert opened("one").find(seeded(0), 1) is None
    assert not bank_folder(opened("one"), banked).exists()


def bank_folder(bank, banked):
    return bank.folder / banked.id[:2] / banked.id


def test_a_lease_of_a_study_that_is_gone_or_is_not_readable_holds_nothing(opened, tmp_path):
    banked = opened("one").obtain(seeded(0), 1)
    (lease,) = bank_folder(opened("one"), banked).glob("*.lease")
    assert lease.read_text() == str(tmp_path / "one" / LOCK)
    lease.write_bytes(b"\xff\x00")
    opened("other", limit_gib=0.0).obtain(seeded(1), 1)
    assert opened("one").find(seeded(0), 1) is None


def test_a_lease_that_comes_while_an_entry_is_evicted_brings_it_back(opened, running, monkeypatch):
    running("one")
    banked, asking = opened("before").obtain(seeded(0), 1), opened("one")
    looked = bank_module._is_leased

    def lease_after_looking(entry, still_running):
        found = looked(entry, still_running)
        if entry.name == banked.id:
            assert asking.obtain(seeded(0), 1) == banked
        return found

    monkeypatch.setattr(bank_module, "_is_leased", lease_after_looking)
    opened("other", limit_gib=0.0).obtain(seeded(1), 1)
    monkeypatch.undo()
    assert asking.weights(banked).is_file() and asking.find(seeded(0), 1) == banked


def test_a_lock_is_seen_from_elsewhere_and_looking_does_not_take_it(tmp_path):
    path = tmp_path / LOCK
    assert not is_held(path) and not path.exists()
    with FolderLock(path, "held"):
        assert is_held(path)
    assert not is_held(path)
    with FolderLock(path, "held"):
        pass


def test_a_search_may_start_while_another_looks_whether_it_runs(tmp_path):
    probe = filelock.FileLock(tmp_path / LOCK, thread_local=False)
    probe.acquire()
    threading.Timer(0.1, probe.release).start()
    FolderLock(tmp_path / LOCK, "held").release()


# Files that vanish


def test_files_that_vanish_while_sizes_are_added_up_fail_nothing(opened, monkeypatch):
    bank = opened("one", limit_gib=100.0)
    banked = bank.obtain(seeded(0), 1)
    expected = bank_module._size(bank.folder)
    gone = bank_folder(bank, banked) / "state.safetensors"
    size = gone.stat().st_size
    original = os.stat

    def stat(path, *arguments, **options):
        if str(path) == str(gone):
            gone.unlink(missing_ok=True)
        return original(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", stat)
    assert bank_module._size(bank.folder) == expected - size


def test_entries_that_vanish_while_they_are_put_in_order_fail_no_finished_training(opened, monkeypatch):
    first = opened("one").obtain(seeded(0), 1)
    second = opened("one").obtain(seeded(2), 1)
    bank = opened("other", limit_gib=0.0)
    vanishing, original = bank_folder(bank, first), bank_module._size

    def size(folder):
        found = original(folder)
        shutil.rmtree(vanishing, ignore_errors=True)  # as another process does it, after sizes were added up
        return found

    monkeypatch.setattr(bank_module, "_size", size)
    assert bank.obtain(seeded(1), 1).steps == 1
    assert not bank_folder(bank, second).exists()


def test_an_entry_that_vanishes_after_it_was_listed_is_passed_over(tmp_path):
    assert bank_module._used_at(tmp_path / "gone") is None
    assert bank_module._removed(tmp_path / "gone", "state.safetensors", is_held) == 0
    assert bank_module._removed(tmp_path / "gone", "", is_held) == 0


# Half-written files


def test_opening_a_study_leaves_what_others_are_writing_into_a_bank_in_its_folder(tmp_path):
    target = tmp_path / "bank" / "ab" / "weights.safetensors"
    left = tmp_path / "bank" / ".bank.json.killed01.part"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    with written_whole(target) as partial:
        partial.write_bytes(b"first half, ")
        mend(Place(tmp_path))
        assert partial.exists() and not left.exists()
        with partial.open("ab") as file:
            file.write(b"second half")
    assert target.read_bytes() == b"first half, second half"


def test_a_file_that_was_made_just_now_may_not_be_locked_yet(tmp_path):
    new = tmp_path / ".x.abc.part"
    new.touch()
    remove_abandoned([new])
    assert new.exists()
    moment = time.time() - 2 * files.NEW_SECONDS
    os.utime(new, (moment, moment))
    remove_abandoned([new, tmp_path / ".vanished.part"])
    assert not new.exists()


def test_a_writer_that_finishes_leaves_others_halves_alone(tmp_path):
    with written_whole(tmp_path / "x") as partial:
        partial.write_bytes(b"1")
        remove_partials(tmp_path, "x")
        assert partial.exists()


def test_where_there_are_no_locks_age_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_lock", lambda handle: None)
    young, old = tmp_path / ".y.part", tmp_path / ".o.part"
    for path in (young, old):
        path.write_bytes(b"half")
    moment = time.time() - 2 * files.UNLOCKABLE_SECONDS
    os.utime(old, (moment, moment))
    remove_abandoned([young, old])
    assert young.exists() and not old.exists()
