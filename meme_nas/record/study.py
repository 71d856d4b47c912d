"""Record of a search: an Optuna study on disk. One process writes it, and a kill at any moment leaves it readable."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.importance import FanovaImportanceEvaluator
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

from meme.errors import UserError
from meme.support.folder_lock import FolderLock
from meme_nas.record.folder import LOCK, TRIALS
from meme_nas.record.storage import JOURNAL, NAME, Place, mend, place_of, readable
from meme_nas.record.tasks import Outcome
from meme_nas.record.trial_log import TrialLog, TrialRecord, record_of

LEAST_FOR_IMPORTANCE = 10  # scored trials
# Values of settings in studies that are older than the setting.
UNRECORDED = {"rungs": 1, "trunk_share": 0.0, "set_alpha_to_one": False, "precision": "auto"}
EXPERT_OBJECTIVES = ("loss", "macs")
NAMED = ("data", "features")  # settings that consist of a readable name, a space and an id

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Study:
    """Study in ``folder``, opened or created, with the lock that keeps other processes from writing it.

    ``settings`` are those that make scores comparable. Raises ``UserError`` for a study made with others, a folder that can't be
    written, and a study that another process is writing.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], objectives: Sequence[str], storage: str | None = None):
        """Open the record in the database of the URL ``storage``. None: an old record where it is, a new one in a journal."""
        self.folder = folder
        self._lock: FolderLock | None = _claim(folder)
        try:
            place = place_of(folder, storage)
            self.mended = mend(place)
            """Sentence on the incomplete bytes that a kill had left and that were dropped; None if there were none."""
            self._check(settings)
            with readable(place):
                opened = place.open()
                place.claim()
                self._open(opened, place.name, objectives)
                self.ensembles.optuna_study.set_user_attr("settings", settings)
        except BaseException:
            self.close()
            raise

    @classmethod
    def in_memory(cls, objectives: Sequence[str]) -> "Study":
        """Return a study in memory, without folder and lock."""
        study = cls.__new__(cls)
        study.folder, study._lock, study.mended = Path(), None, None
        study._open(InMemoryStorage(), NAME, objectives)
        return study

    def _open(self, storage: BaseStorage, name: str, objectives: Sequence[str]) -> None:
        self._storage, self._name = storage, name
        self._experts: dict[int, TrialLog] = {}
        self._rungs: dict[int, Study] = {}
        self._others: dict[str, TrialLog] = {}
        self.ensembles = TrialLog(storage, name, objectives)
        """Trials that score an ensemble."""

    def close(self) -> None:
        if self._lock:
            self._lock.release()

    @property
    def trials(self) -> list[TrialRecord]:
        """Trials that score an ensemble, in order of number."""
        return self.ensembles.records

    def frozen_trials(self) -> list[FrozenTrial]:
        """Return the same trials as Optuna objects."""
        return self.ensembles.frozen()

    def start(self, *trial: Any, **options: Any) -> TrialRecord:
        """Start a trial that scores an ensemble, with the arguments of ``TrialLog.start``."""
        return self.ensembles.start(*trial, **options)

    def experts(self, number: int) -> TrialLog:
        """Return the trials that train expert ``number`` alone: a separate Optuna study of interval loss and MACs."""
        if number not in self._experts:
            self._experts[number] = TrialLog(self._storage, _name_of_expert(self._name, number), EXPERT_OBJECTIVES, number)
        return self._experts[number]

    def rung(self, number: int) -> "Study":
        """Return the study of the rung that is ``number`` below proxy length, in the same journal.

        Its Optuna studies are separate, because scores of different rungs cannot be compared.
        """
        if not number:
            return self
        if number not in self._rungs:
            self._rungs[number] = study = Study.__new__(Study)
            study.folder, study._lock, study.mended = self.folder, None, None
            study._open(self._storage, f"{self._name}-rung-{number}", self.ensembles.objectives)
        return self._rungs[number]

    def audit(self) -> TrialLog:
        """Return the trials that train some configurations longer: a separate Optuna study in the same journal."""
        return self._other("audit")

    def finalists(self) -> TrialLog:
        """Return the trials that score the winner and the yardsticks again with fresh noise."""
        return self._other("finalists")

    def confirmation(self) -> TrialLog:
        """Return the trials that train winner and hand-made pattern with fresh seeds."""
        return self._other("confirmation")

    def probabilities(self) -> TrialLog:
        """Return the trials that score the winner with other p."""
        return self._other("probabilities")

    def _other(self, name: str) -> TrialLog:
        if name not in self._others:
            self._others[name] = TrialLog(self._storage, f"{self._name}-{name}", self.ensembles.objectives)
        return self._others[name]

    def finish(self, outcome: Outcome) -> TrialRecord:
        """Record the outcome of a running trial. A second outcome of the same trial is ignored."""
        return (self.experts(outcome.expert) if outcome.expert else self.ensembles).finish(outcome)

    def importance(self) -> dict[str, float]:
        """Return the share of the first objective's variance that each choice explains, largest first.

        The result is empty with fewer than ``LEAST_FOR_IMPORTANCE`` scored trials.
        """
        searched = [trial for trial in self.frozen_trials() if trial.state == TrialState.COMPLETE and trial.params]
        if len(searched) < LEAST_FOR_IMPORTANCE:
            return {}
        study = optuna.create_study()
        for trial in searched:  # without yardsticks outside the space, because fANOVA needs every choice in every trial
            params, distributions = trial.params, trial.distributions
            study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=trial.values[0]))
        return dict(optuna.importance.get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0)))

    def _check(self, settings: dict[str, Any]) -> None:
        """Raise ``UserError`` unless the study was made with ``settings``. Nothing is written before this check."""
        if not place_of(self.folder).exists and (self.folder / TRIALS).exists():
            raise UserError(f"study: {self.folder} holds trials but no {JOURNAL}; delete it or give another --study")
        found = recorded_settings(self.folder)
        for key in settings.keys() & found.keys():
            if _compared(key, found[key]) != _compared(key, settings[key]):
                raise UserError(
                    f"{key}: the study in {self.folder} was made with {found[key]}, not {settings[key]}; "
                    "give the same value or another --study"
                )


def _compared(key: str, value: Any) -> Any:
    """Return the part of a setting that must not change: for data and features the id after their name, as folders may move."""
    return value.rpartition(" ")[2] if key in NAMED and isinstance(value, str) else value


def recorded_settings(folder: Path) -> dict[str, str | int | float | None]:
    """Return the settings that the study in ``folder`` was made with; empty if there is no study."""
    study = _load(place_of(folder))
    found = study.user_attrs.get("settings") if study else None
    return UNRECORDED | found if found else {}


def read_trials(folder: Path) -> list[TrialRecord]:
    """Return the trials of a study, also while a search runs. Raises ``UserError`` if there is no study."""
    place = place_of(folder)
    study = _load(place)
    if study is None:
        raise UserError(f"study: {folder} holds no study")
    with readable(place):
        return [record_of(trial) for trial in study.get_trials(deepcopy=False)]


def read_everything(folder: Path) -> list[TrialRecord]:
    """Return the trials of a study with those of single experts, rungs and all stages after the search."""
    trials = read_trials(folder)
    place = place_of(folder)
    with readable(place):
        storage = place.open()
        names = {study.study_name for study in storage.get_all_studies()}
        for name in sorted(name for name in names if name.startswith(f"{place.name}-")):
            study = optuna.load_study(study_name=name, storage=storage)
            trials += [record_of(trial, _expert_of(name, place.name)) for trial in study.get_trials(deepcopy=False)]
    return trials


def _name_of_expert(study: str, number: int) -> str:
    return f"{study}-expert-{number}"


def _expert_of(name: str, study: str) -> int:
    """Return the expert whose trainings the Optuna study ``name`` records; 0 for ensembles."""
    _, is_expert, number = name.removeprefix(study).rpartition(_name_of_expert("", 0).removesuffix("0"))  # a rung may precede it
    return int(number) if is_expert else 0


def _load(place: Place) -> optuna.Study | None:
    """Return the Optuna study; None if there is none, also if a kill preceded its creation in the journal or database."""
    if not place.exists:
        return None
    with readable(place):
        storage = place.open()
        names = {study.study_name for study in storage.get_all_studies()}
        return optuna.load_study(study_name=place.name, storage=storage) if place.name in names else None


def _claim(folder: Path) -> FolderLock:
    """Lock ``folder``. Raises ``UserError`` if it can't be written or another process searches in it."""
    refusal = f"study: another search is running in {folder} ({{holder}}); give another --study or wait for it"
    try:
        return FolderLock(folder / LOCK, refusal)
    except OSError as error:
        raise UserError(f"study: {folder} can't be written ({error.strerror}); give another --study") from None
