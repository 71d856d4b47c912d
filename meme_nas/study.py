"""The one record of a search: an Optuna study on disk, written by one process, that survives being killed at any moment."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import filelock
import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.importance import FanovaImportanceEvaluator
from optuna.trial import FrozenTrial, TrialState

from meme.config import Config
from meme.errors import UserError
from meme_nas.storage import JOURNAL, Place, mend, place_of, readable
from meme_nas.trial import Outcome
from search_spaces.domain import Choices

TRIALS = "trials"
LEAST_FOR_IMPORTANCE = 10  # scored trials
_STATES = {
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.FAIL: "failed",
    TrialState.PRUNED: "refused",
}

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class TrialRecord:
    """One trial as the study has it."""

    number: int
    state: str
    """running (also: interrupted), complete, failed, or refused before training."""
    kind: str
    config: Config
    choices: Choices
    reason: str
    """Why it failed or was refused; empty otherwise."""
    outcome: Outcome | None
    ended_at: float | None = None
    """Unix time at which it was recorded as finished."""

    @property
    def finished(self) -> bool:
        return self.state != "running"

    @property
    def is_yardstick(self) -> bool:
        return self.kind != "candidate"


class Study:
    """Opens or creates the study in ``folder``.

    ``settings`` are those that make scores comparable: a study made with others is refused with a ``UserError``, as are a folder
    that can't be written and a study that another process is writing.
    """

    def __init__(self, folder: Path, settings: dict[str, str | int | float | None], storage: str | None = None):
        """``storage`` is the URL of a database for the record; None: where it lies, a new one in a journal in ``folder``."""
        self.folder = folder
        self._lock = _claim(folder)
        try:
            place = place_of(folder, storage)
            self.mended = mend(place)
            """What a kill had left and was dropped, in a sentence; None where nothing was."""
            self._check(settings)
            with readable(place):
                self._open(place, settings)
        except BaseException:
            self.close()
            raise

    def _open(self, place: Place, settings: dict) -> None:
        storage = place.open()
        place.claim()
        self.optuna_study = optuna.create_study(
            study_name=place.name, storage=storage, directions=["minimize", "minimize"], load_if_exists=True
        )
        self.optuna_study.set_user_attr("settings", settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            self.optuna_study.set_metric_names(["fid", "macs"])  # for Optuna's own dashboard
        self._records = [_record(trial) for trial in self.frozen_trials()]

    def close(self) -> None:
        self._lock.release()

    def frozen_trials(self) -> list[FrozenTrial]:
        """All trials as Optuna has them, in order."""
        return self.optuna_study.get_trials(deepcopy=False)

    @property
    def trials(self) -> list[TrialRecord]:
        """All trials, in order of number."""
        return self._records

    def start(
        self,
        config: Config,
        kind: str,
        choices: Choices,
        distributions: dict[str, BaseDistribution],
        refused: str | None = None,
    ) -> TrialRecord:
        """Record a new trial as running, or as ``refused`` for that reason.

        It is one record of the journal: a kill leaves all of it or nothing, and a running trial is found as such when the study
        is opened again.
        """
        attributes = {"kind": kind, "config": config.model_dump(mode="json"), "architecture_id": config.architecture_id}
        new = optuna.trial.create_trial(
            state=TrialState.PRUNED if refused else TrialState.RUNNING,
            params=choices,
            distributions=distributions if choices else {},
            user_attrs=attributes | ({"reason": refused} if refused else {}),
        )
        self.optuna_study.add_trial(new)
        self._records.append(_record(self.frozen_trials()[-1]))
        return self._records[-1]

    def finish(self, outcome: Outcome) -> TrialRecord:
        """Record what a running trial came to. A second outcome of one trial is ignored: the first one stands."""
        number = outcome.number
        if self._records[number].finished:
            return self._records[number]
        if outcome.failure is None:
            self._annotate(number, {"outcome": outcome.to_dict()})
            self.optuna_study.tell(number, [outcome.fid, outcome.macs])
        else:
            self._annotate(number, {"outcome": outcome.to_dict(), "reason": outcome.failure})
            self.optuna_study.tell(number, state=TrialState.FAIL)
        return self._reread(number)

    def importance(self) -> dict[str, float]:
        """Share of the FID's variation that each choice explains, largest first; empty with too few trials to tell."""
        searched = [trial for trial in self.frozen_trials() if trial.state == TrialState.COMPLETE and trial.params]
        if len(searched) < LEAST_FOR_IMPORTANCE:
            return {}
        study = optuna.create_study()
        for trial in searched:  # without the yardsticks outside the space: fANOVA wants every choice in every trial
            choices = {"params": trial.params, "distributions": trial.distributions}
            study.add_trial(optuna.trial.create_trial(**choices, value=trial.values[0]))
        return dict(optuna.importance.get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0)))

    def _annotate(self, number: int, attributes: dict) -> None:
        trial = self.frozen_trials()[number]
        for key, value in attributes.items():
            self.optuna_study._storage.set_trial_user_attr(trial._trial_id, key, value)

    def _reread(self, number: int) -> TrialRecord:
        self._records[number] = _record(self.frozen_trials()[number])
        return self._records[number]

    def _check(self, settings: dict) -> None:
        """Nothing is written before this: a study that is refused stays as it was."""
        if not place_of(self.folder).exists and (self.folder / TRIALS).exists():
            raise UserError(f"study: {self.folder} holds trials but no {JOURNAL}; delete it or give another --study")
        found = recorded_settings(self.folder)
        for key in settings.keys() & found.keys():
            if found[key] != settings[key]:
                raise UserError(
                    f"{key}: the study in {self.folder} was made with {found[key]}, not {settings[key]}; "
                    "give the same value or another --study"
                )


def trial_folder(study: Path, number: int) -> Path:
    """Where trial ``number`` keeps its config, weights and samples."""
    return study / TRIALS / f"{number:03d}"


def recorded_settings(folder: Path) -> dict[str, str | int | float | None]:
    """The settings the study in ``folder`` was made with; empty where there is none."""
    study = _load(place_of(folder))
    return dict(study.user_attrs.get("settings", {})) if study else {}


def read_trials(folder: Path) -> list[TrialRecord]:
    """The trials of a study, for reading beside a search that may be running; ``UserError`` where there is no study."""
    place = place_of(folder)
    study = _load(place)
    if study is None:
        raise UserError(f"study: {folder} holds no study")
    with readable(place):
        return [_record(trial) for trial in study.get_trials(deepcopy=False)]


def _load(place: Place) -> optuna.Study | None:
    """The study, or None where there is none: also where a kill came before it was created in its journal or database."""
    if not place.exists:
        return None
    with readable(place):
        storage = place.open()
        names = {study.study_name for study in storage.get_all_studies()}
        return optuna.load_study(study_name=place.name, storage=storage) if place.name in names else None


def _record(trial: FrozenTrial) -> TrialRecord:
    attributes = trial.user_attrs
    outcome = attributes.get("outcome")
    return TrialRecord(
        number=trial.number,
        state=_STATES[trial.state],
        kind=attributes["kind"],
        config=Config.model_validate(attributes["config"]),
        choices=dict(trial.params),
        reason=attributes.get("reason", "") if trial.state != TrialState.RUNNING else "",
        outcome=Outcome.from_dict(outcome) if outcome else None,
        ended_at=trial.datetime_complete.timestamp() if trial.datetime_complete else None,
    )


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


def finished_before(trials: Sequence[FrozenTrial], end: int) -> list[FrozenTrial] | None:
    """Trials 0 to ``end - 1`` if all of them are finished, else None."""
    known = list(trials[: max(0, end)])
    return known if all(trial.state.is_finished() for trial in known) else None
