"""The one record of a search: an Optuna study on disk, written by one process, that survives being killed at any moment."""

import json
from collections.abc import Sequence
from pathlib import Path

import filelock
import optuna
from optuna.importance import FanovaImportanceEvaluator
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from meme.errors import UserError
from meme_nas.trial import Outcome
from meme_nas.trial_log import TrialLog, TrialRecord, record_of

JOURNAL = "study.journal"
TRIALS = "trials"
STUDY_NAME = "meme-nas"
LEAST_FOR_IMPORTANCE = 10  # scored trials
EXPERT_OBJECTIVES = ("loss", "macs")

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Study:
    """Opens or creates the study in ``folder``.

    ``settings`` are those that make scores comparable: a study made with others is refused with a ``UserError``, as are a folder
    that can't be written and a study that another process is writing.
    """

    def __init__(self, folder: Path, settings: dict, objectives: Sequence[str] = ("fid", "macs")):
        self.folder = folder
        self._lock = _claim(folder)
        journal = folder / JOURNAL
        _mend(journal)
        self._check(settings)
        self._open(JournalStorage(JournalFileBackend(str(journal))), objectives)
        self._ensembles.optuna_study.set_user_attr("settings", settings)

    @classmethod
    def in_memory(cls, objectives: Sequence[str] = ("fid", "macs")) -> "Study":
        """A study that leaves nothing: for replays."""
        study = cls.__new__(cls)
        study.folder, study._lock = Path(), None
        study._open(InMemoryStorage(), objectives)
        return study

    def _open(self, storage: BaseStorage, objectives: Sequence[str], name: str = STUDY_NAME) -> None:
        self._storage, self._name, self._experts, self._rungs, self._audit = storage, name, {}, {}, None
        self._ensembles = TrialLog(storage, name, objectives)

    def close(self) -> None:
        if self._lock:
            self._lock.release()

    @property
    def trials(self) -> list[TrialRecord]:
        """The trials that score an ensemble, in order of number."""
        return self._ensembles.records

    def frozen_trials(self) -> list[FrozenTrial]:
        """The same as Optuna has them."""
        return self._ensembles.frozen()

    def start(self, *trial, **options) -> TrialRecord:
        """As ``TrialLog.start``: a trial that scores an ensemble."""
        return self._ensembles.start(*trial, **options)

    def experts(self, number: int) -> TrialLog:
        """The trials that train expert ``number`` alone: a study of its own in the same journal, of interval loss and MACs."""
        if number not in self._experts:
            self._experts[number] = TrialLog(self._storage, f"{self._name}-expert-{number}", EXPERT_OBJECTIVES, number)
        return self._experts[number]

    def rung(self, number: int) -> "Study":
        """The trials trained to the rung that is ``number`` below proxy length: studies of their own in the same journal, as
        their scores compare with no others."""
        if not number:
            return self
        if number not in self._rungs:
            self._rungs[number] = study = Study.__new__(Study)
            study.folder, study._lock = self.folder, None
            study._open(self._storage, self._ensembles.objectives, f"{self._name}-rung-{number}")
        return self._rungs[number]

    def audit(self) -> TrialLog:
        """The trials that train some configurations longer: a study of its own in the same journal."""
        if self._audit is None:
            self._audit = TrialLog(self._storage, f"{self._name}-audit", self._ensembles.objectives)
        return self._audit

    def finish(self, outcome: Outcome) -> TrialRecord:
        """Record what a running trial came to. A second outcome of one trial is ignored: the first one stands."""
        return (self.experts(outcome.expert) if outcome.expert else self._ensembles).finish(outcome)

    def importance(self) -> dict[str, float]:
        """Share of the first objective's variation that each choice explains, largest first; empty with too few trials to
        tell."""
        searched = [trial for trial in self.frozen_trials() if trial.state == TrialState.COMPLETE and trial.params]
        if len(searched) < LEAST_FOR_IMPORTANCE:
            return {}
        study = optuna.create_study()
        for trial in searched:  # without the yardsticks outside the space: fANOVA wants every choice in every trial
            choices = {"params": trial.params, "distributions": trial.distributions}
            study.add_trial(optuna.trial.create_trial(**choices, value=trial.values[0]))
        return dict(optuna.importance.get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0)))

    def _check(self, settings: dict) -> None:
        """Nothing is written before this: a study that is refused stays as it was."""
        try:
            if not (self.folder / JOURNAL).exists() and (self.folder / TRIALS).exists():
                raise UserError(f"study: {self.folder} holds trials but no {JOURNAL}; delete it or give another --study")
            found = recorded_settings(self.folder)
            for key in settings.keys() & found.keys():
                if found[key] != settings[key]:
                    raise UserError(
                        f"{key}: the study in {self.folder} was made with {found[key]}, not {settings[key]}; "
                        "give the same value or another --study"
                    )
        except BaseException:
            self.close()
            raise


def trial_folder(study: Path, number: int, kind: str = "candidate", rung: int = 0) -> Path:
    """Where a trial keeps its config, weights and samples; those of the audit and of lower rungs are apart, as they have numbers
    of their own."""
    return study / ("audit" if kind == "audit" else f"rung-{rung}" if rung else TRIALS) / f"{number:03d}"


def recorded_settings(folder: Path) -> dict[str, str | int | float | None]:
    """The settings the study in ``folder`` was made with; empty where there is none."""
    try:
        return _load(folder).user_attrs.get("settings", {}) if (folder / JOURNAL).is_file() else {}
    except KeyError:  # killed before the study was created in its journal
        return {}


def read_trials(folder: Path) -> list[TrialRecord]:
    """The trials of a study, for reading beside a search that may be running; ``UserError`` where there is no study."""
    if not (folder / JOURNAL).is_file():
        raise UserError(f"study: {folder} holds no study")
    return [record_of(trial) for trial in _load(folder).get_trials(deepcopy=False)]


def read_everything(folder: Path) -> list[TrialRecord]:
    """As ``read_trials``, with the trials that train single experts and those of the audit."""
    read_trials(folder)
    storage = _storage(folder)
    names = sorted(study.study_name for study in storage.get_all_studies())
    studies = [(name, optuna.load_study(study_name=name, storage=storage)) for name in names]
    return [record_of(trial, _expert_of(name)) for name, study in studies for trial in study.get_trials(deepcopy=False)]


def _expert_of(name: str) -> int:
    """Whose trainings the study of this name records; 0: ensembles."""
    return int(name.rpartition("-")[2]) if "-expert-" in name.removeprefix(STUDY_NAME) else 0


def _storage(folder: Path) -> JournalStorage:
    return JournalStorage(JournalFileBackend(str(folder / JOURNAL)))


def _load(folder: Path) -> optuna.Study:
    return optuna.load_study(study_name=STUDY_NAME, storage=_storage(folder))


def _claim(folder: Path) -> filelock.FileLock:
    """Make sure that ``folder`` can be written and that no other process searches in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"study: another search is running in {folder}; give another --study or wait for it") from None
    except OSError as error:
        raise UserError(f"study: {folder} can't be written ({error.strerror}); give another --study") from None
    return lock


def _mend(journal: Path) -> None:
    """Undo what a process killed while writing leaves: its lock, and a last line that is not whole. We hold the study's lock."""
    Path(f"{journal}.lock").unlink(missing_ok=True)
    if not journal.exists():
        return
    content = journal.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content) or not _is_json(whole):
        lines = whole.splitlines(keepends=True)
        while lines and not _is_json(lines[-1]):
            lines.pop()
        with journal.open("rb+") as file:
            file.truncate(sum(map(len, lines)))


def _is_json(content: bytes) -> bool:
    """Whether the last line of ``content`` is a JSON record, or there is none."""
    last = content.splitlines()[-1:] or [b"{}"]
    try:
        json.loads(last[0])
    except ValueError:
        return False
    return True


def finished_before(trials: Sequence[FrozenTrial], end: int) -> list[FrozenTrial] | None:
    """Trials 0 to ``end - 1`` if all of them are finished, else None."""
    known = list(trials[: max(0, end)])
    return known if all(trial.state.is_finished() for trial in known) else None
