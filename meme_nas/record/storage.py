"""Where a study's record lies: a journal in its folder, or a database; opened whole, whatever was killed while it wrote."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import get_lock_file
from optuna.storages.journal._storage import JournalOperation
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from meme.errors import UserError, in_one_line
from meme.support.files import remove_partials, write_text
from meme.support.signals import interrupted_afterwards
from meme_nas.record.folder import LATENCY

JOURNAL = "study.journal"
DATABASE = "study.database.json"
NAME = "meme-nas"
_TRIAL = r"config\.yaml|samples\.png|evaluation\.json|expert-\d+(\.training)?\.safetensors|progress\.json"
WRITTEN = {  # what a study writes: the folders in it, and the names of files there
    "": r"trials\.csv|winner\.yaml|best-of-search\.yaml|report\.html|samples\.png|study\.database\.json|\.seen-[0-9a-f]+",
    "yardsticks": r"[a-z-]+\.yaml",
    "front": r"trial-\d+\.yaml",
    "states": r"[\w-]+\.npy",
    LATENCY: r"([0-9a-f]+|device)\.json",
    "trials/*": _TRIAL,
    "rung-*/*": _TRIAL,
    "audit/*": _TRIAL,
    "probabilities/*": _TRIAL,
    "confirmation/*": _TRIAL,
    "finalists/*": _TRIAL,
    "bank": r"bank\.json",
    "bank/??/*": r"entry\.json|(state|weights-\d+)\.safetensors",
}
MAY_BE_LOST = {JournalOperation.CREATE_TRIAL, JournalOperation.SET_TRIAL_USER_ATTR}  # in a power cut


@dataclass(frozen=True)
class Place:
    """Where one study's record lies."""

    folder: Path
    url: str | None = None
    """Of a database, without a password; None: a journal in ``folder``."""
    name: str = NAME
    """The study's name there; in a database, where others may lie beside it, no other study's."""

    @property
    def journal(self) -> Path:
        return self.folder / JOURNAL

    @property
    def exists(self) -> bool:
        """Whether a study was begun here."""
        return (self.folder / DATABASE).is_file() if self.url else self.journal.is_file()

    def open(self) -> BaseStorage:
        """The record, for reading and writing; ``UserError`` for a database that can't be had."""
        if self.url is None:
            return JournalStorage(_Journal(str(self.journal)))
        try:
            return RDBStorage(_with_driver(self.url), engine_kwargs={"pool_pre_ping": True})
        except (ImportError, ArgumentError) as error:
            raise UserError(
                f"storage: {self.url}: {in_one_line(error)}; for PostgreSQL: pip install 'meme-nas[postgres]'"
            ) from None
        except (SQLAlchemyError, RuntimeError, ValueError) as error:
            raise UserError(f"storage: the database {self.url} can't be opened ({in_one_line(error)})") from None

    def claim(self) -> None:
        """Note in the study's folder in which database its record lies. The folder's lock is held."""
        if self.url and not self.exists:
            write_text(self.folder / DATABASE, json.dumps({"url": self.url, "name": self.name}))


class _Journal(JournalFileBackend):
    """Optuna's, which waits for the disk after every record, three times a trial, less two: that a trial has begun, and what is
    noted of it, need not outlast a power cut before its end is recorded. Without them the trial is begun anew.

    Ctrl-C and SIGTERM wait for the end of a record: Optuna's lock fails, and stays behind, where they come as it is released.
    """

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        with interrupted_afterwards():
            if not {log["op_code"] for log in logs} <= MAY_BE_LOST:
                super().append_logs(logs)
                return
            lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
            with get_lock_file(self._lock), open(self._file_path, "ab") as file:
                file.write(lines.encode())


def place_of(folder: Path, url: str | None = None) -> Place:
    """Where the record of the study in ``folder`` lies; a new one is put into the database of ``url``, if one is given.

    ``UserError`` where a study goes on and ``url`` names another place than its own.
    """
    if url and ("://" not in url or make_url_or_none(url) is None):
        raise UserError(f"storage: must be a database URL such as postgresql://user@host/name or sqlite:////path, not {url}")
    if url and make_url(url).password:
        raise UserError("storage: leave the password out of the URL, where others see it; PGPASSWORD or ~/.pgpass may give it")
    found = _noted(folder)
    if found and url and found.url != url:
        raise UserError(f"storage: the study in {folder} lies in {found.url}, not in {url}")
    if url and (folder / JOURNAL).exists():
        raise UserError(
            f"storage: the study in {folder} lies in its {JOURNAL}, not in {url}; leave --storage out, or give another --study"
        )
    return found or Place(folder, url, f"{NAME}-{uuid4().hex[:12]}" if url else NAME)


def make_url_or_none(url: str):
    """SQLAlchemy's form of a URL; None where it is none."""
    try:
        return make_url(url)
    except ArgumentError:
        return None


def _noted(folder: Path) -> Place | None:
    try:
        noted = json.loads((folder / DATABASE).read_text(encoding="utf-8"))
        return Place(folder, str(noted["url"]), str(noted["name"]))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"study: {folder / DATABASE} does not say where the study lies; restore it or give another --study"
        ) from None


def _with_driver(url: str) -> str:
    """PostgreSQL is spoken to by psycopg 3."""
    scheme, _, rest = url.partition("://")
    return f"postgresql+psycopg://{rest}" if scheme in ("postgresql", "postgres") else url


def mend(place: Place) -> str | None:
    """Undo what a process killed while writing leaves, and say what was lost. The study's lock is held.

    That is the lock of the journal, a last line that is not whole, and files half written beside the one they were to replace:
    only those of a study, by name and place, as users keep files of their own there.
    ``UserError`` where a line is damaged that others follow: a kill does not do that.
    """
    for pattern, names in WRITTEN.items():
        for folder in place.folder.glob(pattern) if pattern else [place.folder]:
            if folder.is_dir() and not folder.is_symlink():
                remove_partials(folder, names)
    Path(f"{place.journal}.lock").unlink(missing_ok=True)
    if not place.journal.exists():
        return None
    content = place.journal.read_bytes()
    whole = _whole_lines(content, place.journal)
    if whole == len(content):
        return None
    with place.journal.open("rb+") as file:
        file.truncate(whole)
    return f"{place.journal} ended in {len(content) - whole} bytes that are no whole record; they were dropped"


def _whole_lines(content: bytes, journal: Path) -> int:
    """Bytes of ``content`` up to its first line that is no record; ``UserError`` if records come after that."""
    whole, broken = 0, None
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        if not _is_record(line):
            broken = broken or number
        elif broken:
            raise UserError(f"study: line {broken} of {journal} is damaged; restore the file or give another --study")
        else:
            whole += len(line)
    return whole


def _is_record(line: bytes) -> bool:
    try:
        return line.endswith(b"\n") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


@contextlib.contextmanager
def readable(place: Place) -> Iterator[None]:
    """Turn what a damaged record makes Optuna raise, which is nearly anything, into a ``UserError``."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        where = place.url or place.journal
        raise UserError(
            f"study: {where} holds no readable study ({in_one_line(error)}); restore it or give another --study"
        ) from None
