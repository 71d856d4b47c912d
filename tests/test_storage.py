"""The record of a study, in its journal or in a database: cut, damaged, moved, and gone on with."""

import functools
import os
import pwd
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import score

from meme.errors import UserError
from meme_nas.record.storage import DATABASE, JOURNAL, place_of
from meme_nas.record.study import Study, read_trials, recorded_settings
from meme_nas.settings import SearchSettings
from meme_nas.strategies.joint import Joint


def searched(folder: Path, budget: int = 6, storage: str | None = None, stop_after: int | None = None) -> list:
    """The trials of a search in this process, which may be broken off in the middle of a trial."""
    search_settings = SearchSettings(strategy="joint", budget=budget, study=folder, storage=storage)
    study = Study(folder, search_settings.in_force(), search_settings.objectives, storage=search_settings.storage)
    search, done = Joint(search_settings, study), 0
    while done != stop_after and (task := search.next_task()) is not None:
        search.record(score(task))
        done += 1
    if stop_after is not None:
        search.next_task()
    study.close()
    return study.trials


def told(trials: list) -> list:
    return [(trial.number, trial.state, trial.choices, trial.outcome) for trial in trials]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return told(searched(tmp_path_factory.mktemp("unbroken")))


# The journal


@functools.cache
def journal_of_a_search(scratch: Path) -> bytes:
    searched(scratch / "whole")
    return (scratch / "whole" / JOURNAL).read_bytes()


def test_the_disk_is_waited_for_when_a_trial_has_ended_and_not_when_it_begins(tmp_path, monkeypatch):
    search_settings = SearchSettings(strategy="joint", budget=2, study=tmp_path)
    search, synced = Joint(search_settings, Study(tmp_path, search_settings.in_force(), search_settings.objectives)), []
    monkeypatch.setattr(os, "fsync", synced.append)
    task = search.next_task()
    assert synced == []
    search.record(score(task))
    assert len(synced) == 1
    assert [trial.state for trial in read_trials(tmp_path)] == ["complete"]


@given(share=st.floats(0, 1))
@settings(max_examples=40)
def test_a_journal_cut_at_any_byte_loses_at_most_its_last_record_and_says_so(share, tmp_path_factory, unbroken):
    whole = journal_of_a_search(tmp_path_factory.getbasetemp())
    cut = whole[: round(share * len(whole))]
    folder = tmp_path_factory.mktemp("cut")
    (folder / JOURNAL).write_bytes(cut)
    study = Study(folder, SearchSettings(strategy="joint", study=folder).in_force(), ("fid", "macs"))
    kept = cut[: cut.rfind(b"\n") + 1]
    assert (folder / JOURNAL).read_bytes().startswith(kept)
    assert (study.mended is not None) == (kept != cut)
    assert study.mended is None or f"ended in {len(cut) - len(kept)} bytes that are no whole record" in study.mended
    finished = {trial.number: trial.outcome for trial in study.trials if trial.finished}
    study.close()
    after = searched(folder)
    assert {number: after[number].outcome for number in finished} == finished
    assert told(after) == unbroken


@pytest.mark.parametrize("garbage", [b"\0" * 4096, b"\0\n" * 3, b'{"half', b"[]\n", b"\xff\xfe\n"])
def test_garbage_after_the_last_record_is_dropped(tmp_path, garbage, unbroken):
    searched(tmp_path, stop_after=3)
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(garbage)
    assert told(searched(tmp_path)) == unbroken


def test_a_damaged_line_in_the_middle_is_refused_and_left_alone(tmp_path):
    searched(tmp_path)
    lines = (tmp_path / JOURNAL).read_bytes().splitlines(keepends=True)
    damaged = b"".join([*lines[:4], b"{damaged\n", *lines[5:]])
    (tmp_path / JOURNAL).write_bytes(damaged)
    with pytest.raises(UserError, match=r"study: .*study\.journal"):
        searched(tmp_path)
    assert (tmp_path / JOURNAL).read_bytes() == damaged
    with pytest.raises(UserError, match="holds no readable study"):
        read_trials(tmp_path)


def test_what_kills_left_half_written_is_swept_up(tmp_path):
    searched(tmp_path, stop_after=2)
    left = tmp_path / "trials" / "002" / ".expert-1.safetensors.abcd1234.part"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    searched(tmp_path)
    assert not left.exists()


# A database


def test_a_study_in_a_database_is_the_one_a_journal_would_hold(tmp_path, unbroken):
    url = f"sqlite:///{tmp_path}/studies.db"
    folder = tmp_path / "study"
    searched(folder, storage=url, stop_after=3)
    assert not (folder / JOURNAL).exists()
    assert [trial.state for trial in read_trials(folder)] == ["complete"] * 3 + ["running"]
    assert told(searched(folder)) == unbroken  # it knows where it lies
    assert recorded_settings(folder)["sampler"] == "tpe"


def test_two_studies_share_a_database(tmp_path, unbroken):
    url = f"sqlite:///{tmp_path}/studies.db"
    searched(tmp_path / "a", storage=url, budget=3)
    assert told(searched(tmp_path / "b", storage=url)) == unbroken
    assert len(read_trials(tmp_path / "a")) == 3


def test_a_study_is_not_looked_for_in_another_place(tmp_path):
    searched(tmp_path / "journal", budget=3)
    with pytest.raises(UserError, match=r"storage: .* lies in its study\.journal"):
        searched(tmp_path / "journal", storage=f"sqlite:///{tmp_path}/x.db")
    searched(tmp_path / "database", budget=3, storage=f"sqlite:///{tmp_path}/x.db")
    with pytest.raises(UserError, match=r"storage: the study in .* lies in sqlite:////.*x\.db, not in"):
        searched(tmp_path / "database", storage=f"sqlite:///{tmp_path}/y.db")
    (tmp_path / "database" / DATABASE).write_text("{}")
    with pytest.raises(UserError, match="does not say where the study lies"):
        searched(tmp_path / "database")


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("results/elsewhere", "must be a database URL"),
        ("postgresql://me:secret@host/db", "leave the password out"),
        ("nosuchdatabase://host/db", "can't be opened|nosuchdatabase"),
        ("postgresql://me@127.0.0.1:1/db", "can't be opened"),
        ("sqlite:////nowhere/at/all.db", "can't be opened"),
    ],
)
def test_a_database_that_cannot_be_had_is_said(tmp_path, url, sentence):
    if url.startswith("postgresql"):
        pytest.importorskip("psycopg", reason="psycopg is not installed (pip install 'meme-nas[postgres]')")
    with pytest.raises(UserError, match=f"storage: .*({sentence})") as caught:
        searched(tmp_path / "study", storage=url)
    assert "secret" not in str(caught.value)
    assert place_of(tmp_path / "study").url is None  # so that the next try may name another one


# PostgreSQL


def postgres_programs() -> Path | None:
    """The folder of PostgreSQL's programs, where Debian has it or on the path."""
    on_path = shutil.which("initdb")
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return Path(on_path).parent if on_path else installed[-1].parent if installed else None


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    """The URL of a database of a server of our own, on a free port of this machine alone; it never runs as root."""
    programs = postgres_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    pytest.importorskip("psycopg", reason="psycopg is not installed (pip install 'meme-nas[postgres]')")
    user = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    folder = Path(f"/tmp/meme-postgres-{os.getpid()}")  # a folder of pytest's is closed to other users
    folder.mkdir()
    shutil.chown(folder, user)

    def call(program: str, *arguments: str) -> None:
        subprocess.run(
            [programs / program, "-D", folder / "data", *arguments],
            user=user if os.geteuid() == 0 else None,
            cwd=folder,
            check=True,
            stdout=subprocess.DEVNULL,
        )

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        call("initdb", "--auth", "trust", "--username", "meme", "--no-sync")
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1"
        call("pg_ctl", "start", "--wait", "--log", str(folder / "log"), "-o", options)
        yield f"postgresql://meme@127.0.0.1:{port}/postgres"
        call("pg_ctl", "stop", "--mode", "immediate")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_a_study_in_postgresql_goes_on_and_equals_the_journals(postgres, tmp_path, unbroken):
    folder = tmp_path / "study"
    searched(folder, storage=postgres, stop_after=3)
    assert [trial.state for trial in read_trials(folder)] == ["complete"] * 3 + ["running"]
    assert told(searched(folder, storage=postgres)) == unbroken
    assert told(read_trials(folder)) == unbroken
