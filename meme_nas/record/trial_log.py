"""List of the trials of one Optuna study. A trial is recorded when it starts, and its values when it ends."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from meme.config.schema import Config
from meme_nas.record.tasks import Outcome
from search_spaces.domain import Choices

_STATES = {
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.FAIL: "failed",
    TrialState.PRUNED: "refused",
}


@dataclass(frozen=True)
class TrialRecord:
    """One recorded trial."""

    number: int
    state: str
    """running (also: interrupted), complete, failed, or refused before training."""
    kind: str
    config: Config
    choices: Choices
    reason: str
    """Reason of a failure or refusal; else empty."""
    outcome: Outcome | None
    ended_at: float | None = None
    """Unix time at which the end was recorded."""
    expert: int = 0
    """Number of the expert that the trial trains; 0 if it scores an ensemble."""
    candidates: int = 0
    """Number of candidates of each expert from which a cascade was chosen; 0 for other trials."""

    @cached_property
    def architecture_id(self) -> str:
        """Id of the config's architecture. It is cached, because every proposal compares it with all earlier trials."""
        return self.config.architecture_id

    def is_same(self, other: "TrialRecord | None") -> bool:
        """Return True if ``other`` is this trial. Its p and scores may differ from those of the search."""
        return other is not None and (self.number, self.kind) == (other.number, other.kind)

    def is_same_config(self, other: "TrialRecord") -> bool:
        """Return True if ``other`` is this trial with the same experts, so that scores of one hold for the other."""
        return self.is_same(other) and self.config.experts == other.config.experts

    @property
    def scored(self) -> Outcome:
        """Outcome of the trial. Raises ``ValueError`` if it is running or was refused."""
        if self.outcome is None:
            raise ValueError(f"trial {self.number} has no outcome: it is {self.state}")
        return self.outcome

    @property
    def finished(self) -> bool:
        return self.state != "running"

    @property
    def is_yardstick(self) -> bool:
        return self.kind not in ("candidate", "expert")

    @property
    def in_space(self) -> bool:
        """True if the config is in the searched space. Some yardsticks are not."""
        return bool(self.choices)


class TrialLog:
    """Trials of the Optuna study ``name`` in ``storage``, opened or created, with the values ``objectives``."""

    def __init__(self, storage: BaseStorage, name: str, objectives: Sequence[str], expert: int = 0):
        self.objectives, self.expert = tuple(objectives), expert
        directions = [StudyDirection.MINIMIZE] * len(self.objectives)
        self.optuna_study = optuna.create_study(study_name=name, storage=storage, directions=directions, load_if_exists=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            self.optuna_study.set_metric_names(list(self.objectives))  # for Optuna's own dashboard
        self.records: list[TrialRecord] = []
        self.running: set[int] = set()
        """Numbers of the trials that are not finished."""
        self.refused = 0
        """Number of trials that were refused before training."""
        self.architecture_ids: set[str] = set()
        for trial in self.frozen():
            self._take_in(record_of(trial, expert))

    def frozen(self) -> list[FrozenTrial]:
        """Return all trials as Optuna objects, in order."""
        return self.optuna_study.get_trials(deepcopy=False)

    def start(
        self,
        config: Config,
        kind: str,
        choices: Choices,
        distributions: dict[str, BaseDistribution],
        refused: str | None = None,
        candidates: int = 0,
    ) -> TrialRecord:
        """Record a new trial as running, or as ``refused`` for that reason.

        It is one record of the journal, so that a kill leaves all of it or nothing. A trial that is running then is still
        recorded as running when the study is opened again.
        """
        attributes: dict[str, Any] = {
            "kind": kind,
            "config": config.model_dump(mode="json"),
            "architecture_id": config.architecture_id,
        }
        attributes |= {"candidates": candidates} if candidates else {}
        new = optuna.trial.create_trial(
            state=TrialState.PRUNED if refused else TrialState.RUNNING,
            params=choices,
            distributions={name: distributions[name] for name in choices},
            user_attrs=attributes | ({"reason": refused} if refused else {}),
        )
        self.optuna_study.add_trial(new)
        self._take_in(record_of(self.frozen()[-1], self.expert))
        return self.records[-1]

    def finish(self, outcome: Outcome) -> TrialRecord:
        """Record the outcome of a running trial. A second outcome of the same trial is ignored."""
        number = outcome.number
        if self.records[number].finished:
            return self.records[number]
        self._annotate(number, {"outcome": outcome.to_dict(), **({"reason": outcome.failure} if outcome.failure else {})})
        if outcome.failure is None:
            self.optuna_study.tell(number, outcome.values(self.objectives))
        else:
            self.optuna_study.tell(number, state=TrialState.FAIL)
        self.records[number] = record_of(self.frozen()[number], self.expert)
        self.running.discard(number)
        return self.records[number]

    @property
    def finished(self) -> int:
        """Number of finished trials."""
        return len(self.records) - len(self.running)

    def _take_in(self, trial: TrialRecord) -> None:
        """Append a trial and update the counts, so that proposals and displays need not iterate over all trials."""
        self.records.append(trial)
        self.architecture_ids.add(trial.architecture_id)
        self.refused += trial.state == "refused"
        if not trial.finished:
            self.running.add(trial.number)

    def _annotate(self, number: int, attributes: Mapping[str, Any]) -> None:
        trial = self.frozen()[number]
        for key, value in attributes.items():
            self.optuna_study._storage.set_trial_user_attr(trial._trial_id, key, value)


def record_of(trial: FrozenTrial, expert: int = 0) -> TrialRecord:
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
        expert=expert,
        candidates=attributes.get("candidates", 0),
    )
