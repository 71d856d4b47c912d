"""Base class of the stages after a search, which score some of its trials again under a fixed list of configs."""

from collections import Counter
from functools import cached_property
from typing import Any

from meme.config.schema import Config
from meme_nas.record.tasks import Outcome, Task
from meme_nas.record.trial_log import TrialLog, TrialRecord
from meme_nas.rescoring.findings import Rescored
from meme_nas.settings import SearchSettings
from meme_nas.strategies.base import Strategy

ATTEMPTS = 2  # tries of a scoring in one command: the first may fail because its neighbours took the memory


class Rescoring:
    """Source of scoring tasks for an engine, with the interface of a strategy.

    Every scoring is a task of its own, so that workers share them. Scorings of an earlier command are not repeated.
    """

    unit: str
    """Noun for what ``spent`` counts."""
    kind: str
    """Kind of the tasks."""

    def __init__(self, settings: SearchSettings, search: Strategy, log: TrialLog):
        self.settings, self._search, self._log = settings, search, log
        self._interrupted = set(log.running)
        self._to_repeat = {record.number for record in log.records if record.state == "failed"}
        self._failures: Counter[Any] = Counter()

    @property
    def chosen(self) -> list[TrialRecord]:
        """Trials to score again."""
        raise NotImplementedError

    def _ways(self, trial: TrialRecord) -> list[Config]:
        """Return the configs to score for ``trial``: its own with other seeds, longer training or more samples."""
        raise NotImplementedError

    def _seeds(self, config: Config) -> tuple[int, ...]:
        """Return the training seeds over which the score of ``config`` is averaged."""
        raise NotImplementedError

    def _stands(self, record: TrialRecord) -> bool:
        """Return True if ``record`` counts, so that its scoring is not started again.

        Scorings that failed in an earlier command do not count, because the cause may be gone. Neither does the first failure of
        a scoring in this command.
        """
        return record.number not in self._to_repeat

    @cached_property
    def _planned(self) -> list[tuple[TrialRecord, dict[Any, Config]]]:
        """Every chosen trial with its configs to score, by key."""
        return [(trial, {key_of(way, way.architecture_id): way for way in self._ways(trial)}) for trial in self.chosen]

    @property
    def _begun(self) -> dict[Any, TrialRecord]:
        """The last started record of every scoring, by key."""
        return {key_of(record.config, record.architecture_id): record for record in self._log.records if self._stands(record)}

    @property
    def done(self) -> bool:
        finished, planned = self.spent
        return finished == planned

    @property
    def spent(self) -> tuple[int, int]:
        """Number of finished scorings, and the number planned."""
        begun, planned = self._begun, [key for _, ways in self._planned for key in ways]
        return sum(key in begun and begun[key].finished for key in planned), len(planned)

    @property
    def under_way(self) -> int:
        """Number of scorings that workers run now."""
        return len(self._log.running) - len(self._interrupted)

    def next_task(self) -> Task | None:
        begun = self._begun
        for trial, ways in self._planned:
            for key, way in ways.items():
                if key not in begun:
                    return self._task(self._log.start(way, self.kind, trial.choices, self._search.distributions))
                if begun[key].number in self._interrupted:
                    self._interrupted.remove(begun[key].number)
                    return self._task(begun[key])
        return None

    def _task(self, record: TrialRecord) -> Task:
        return Task(record.number, record.config, self.kind, seeds=self._seeds(record.config))

    def record(self, outcome: Outcome) -> TrialRecord:
        """Record the outcome of a scoring. A failed one is started again, up to ``ATTEMPTS`` tries in all."""
        record = self._log.finish(outcome)
        if record.state == "failed":
            key = key_of(record.config, record.architecture_id)
            self._failures[key] += 1
            if self._failures[key] < ATTEMPTS:
                self._to_repeat.add(record.number)
        return record

    def results(self) -> list[Rescored]:
        """Return the scores of every trial whose scorings are all complete."""
        begun, found = self._begun, []
        for trial, ways in self._planned:
            complete = [begun[key] for key in ways if key in begun and begun[key].state == "complete"]
            scores = tuple(record.scored.values(self.settings.objectives)[0] for record in complete)
            if len(scores) == len(ways):
                config = complete[0].config
                found.append(Rescored(trial, scores, config.evaluation.samples, config.training.steps))
        return found


def key_of(config: Config, architecture_id: str) -> Any:
    """Return a key that is equal for equal scorings. The caller passes the id, which records have cached."""
    return architecture_id, config.sampling, config.evaluation
