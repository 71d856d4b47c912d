"""Work that comes after a search: some of its trials scored anew, each in several ways that are known beforehand."""

from collections import Counter
from functools import cached_property
from typing import Any

from meme.config.schema import Config
from meme_nas.record.tasks import Outcome, Task
from meme_nas.record.trial_log import TrialLog, TrialRecord
from meme_nas.rescoring.findings import Rescored
from meme_nas.settings import SearchSettings
from meme_nas.strategies.base import Strategy

ATTEMPTS = 2  # of a scoring in one command: what failed once may have had no memory left by its neighbours


class Rescoring:
    """Hands the scorings out to an engine, as a strategy hands out trials: each is a task of its own, so that many workers share
    them, and what an earlier command has scored is not scored again."""

    unit: str
    kind: str
    """Of its tasks."""

    def __init__(self, settings: SearchSettings, search: Strategy, log: TrialLog):
        self.settings, self._search, self._log = settings, search, log
        self._interrupted = set(log.running)
        self._to_repeat = {record.number for record in log.records if record.state == "failed"}
        self._failures: Counter[Any] = Counter()

    @property
    def chosen(self) -> list[TrialRecord]:
        """The trials to score anew."""
        raise NotImplementedError

    def _ways(self, trial: TrialRecord) -> list[Config]:
        """What is scored of ``trial``: its config with other seeds, trained longer or scored with more samples."""
        raise NotImplementedError

    def _seeds(self, config: Config) -> tuple[int, ...]:
        """Training seeds whose mean scores ``config``."""
        raise NotImplementedError

    def _stands(self, record: TrialRecord) -> bool:
        """Return whether a scoring that was started, now or by an earlier command, takes the place of another.

        One that failed in an earlier command does not: its worker may have died of what was wrong then. Neither does the first
        failure of a scoring in this command.
        """
        return record.number not in self._to_repeat

    @cached_property
    def _planned(self) -> list[tuple[TrialRecord, dict[Any, Config]]]:
        """Every chosen trial with what is scored of it."""
        return [(trial, {key_of(way, way.architecture_id): way for way in self._ways(trial)}) for trial in self.chosen]

    @property
    def _begun(self) -> dict[Any, TrialRecord]:
        """Scorings that were started, the last of each."""
        return {key_of(record.config, record.architecture_id): record for record in self._log.records if self._stands(record)}

    @property
    def done(self) -> bool:
        finished, planned = self.spent
        return finished == planned

    @property
    def spent(self) -> tuple[int, int]:
        """Scorings that are done, and all that are to be."""
        begun, planned = self._begun, [key for _, ways in self._planned for key in ways]
        return sum(key in begun and begun[key].finished for key in planned), len(planned)

    @property
    def under_way(self) -> int:
        """Scorings that workers have."""
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
        """Take what a scoring came to; one that failed is started again, ``ATTEMPTS`` times in all."""
        record = self._log.finish(outcome)
        if record.state == "failed":
            key = key_of(record.config, record.architecture_id)
            self._failures[key] += 1
            if self._failures[key] < ATTEMPTS:
                self._to_repeat.add(record.number)
        return record

    def results(self) -> list[Rescored]:
        """Of the trials that were scored in every way."""
        begun, found = self._begun, []
        for trial, ways in self._planned:
            complete = [begun[key] for key in ways if key in begun and begun[key].state == "complete"]
            scores = tuple(record.scored.values(self.settings.objectives)[0] for record in complete)
            if len(scores) == len(ways):
                config = complete[0].config
                found.append(Rescored(trial, scores, config.evaluation.samples, config.training.steps))
        return found


def key_of(config: Config, architecture_id: str) -> Any:
    """Equal for equal scorings; the id is handed in, as a record knows its own."""
    return architecture_id, config.sampling, config.evaluation
