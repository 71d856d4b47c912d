"""Storage of a study's record, a journal in its folder or a database, and repair after a kill during a write."""

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
WRITTEN = {  # files that a study writes: patterns of folders in it, and of the file names there
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
MAY_BE_LOST = {JournalOperation.CREATE_TRIAL, JournalOperation.SET_TRIAL_USER_ATTR}  # records that a power cut may lose


@dataclass(frozen=True)
class Place:
    """Location of one study's record."""

    folder: Path
    url: str | None = None
    """URL of a database, without a password; None for a journal in ``folder``."""
    name: str = NAME
    """Name of the study in the journal or database. It is unique in a database, which may hold other studies."""

    @property
    def journal(self) -> Path:
        return self.folder / JOURNAL

    @property
    def exists(self) -> bool:
        """True if a study was begun here."""
        return (self.folder / DATABASE).is_file() if self.url else self.journal.is_file()

    def open(self) -> BaseStorage:
        """Open the record for reading and writing. Raises ``UserError`` if a database can't be opened."""
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
        """Write the location of the database to the study's folder. The caller holds the folder's lock."""
        if self.url and not self.exists:
            write_text(self.folder / DATABASE, json.dumps({"url": self.url, "name": self.name}))


class _Journal(JournalFileBackend):
    """Optuna's journal with one fsync a trial in place of three.

    The start and the attributes of a trial are written without fsync. If a power cut loses them before the trial's end is
    recorded, the trial starts again.

    Ctrl-C and SIGTERM are delayed to the end of a record, because a signal during the release of Optuna's lock leaves the lock.
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
    """Return the location of the record of the study in ``folder``. A new record is in the database ``url``, if that is given.

    Raises ``UserError`` if ``url`` is invalid, holds a password, or is not the location of a study that exists.
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
    """Return ``url`` parsed by SQLAlchemy; None if it is invalid."""
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
    """Return ``url`` with psycopg 3 as the driver of PostgreSQL."""
    scheme, _, rest = url.partition("://")
    return f"postgresql+psycopg://{rest}" if scheme in ("postgresql", "postgres") else url


def mend(place: Place) -> str | None:
    """Remove what a process killed during a write leaves, and return a sentence on lost bytes. The caller holds the study's lock.

    Such remains are the journal's lock, an incomplete last line, and partly written files. Files are removed only by the names
    and folders that a study uses, because users may keep others there.

    Raises ``UserError`` if a damaged line precedes whole ones, which a kill cannot cause.
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
    """Return the number of bytes before the first line that is no record. Raises ``UserError`` if records follow that line."""
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
    """Convert exceptions of Optuna into ``UserError``. A damaged record can make it raise nearly any of them."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        where = place.url or place.journal
        raise UserError(
            f"study: {where} holds no readable study ({in_one_line(error)}); restore it or give another --study"
        ) from None
