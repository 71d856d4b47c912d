"""Winner and yardsticks scored again with fresh noise: the winner was picked for its score with the old one."""

from collections.abc import Sequence
from functools import cached_property

from meme.config import Config
from meme_nas.audit import Audit, audited_winner
from meme_nas.settings import SearchSettings
from meme_nas.strategy import Strategy, winner
from meme_nas.summary import Rescored
from meme_nas.trial import FINALIST, Outcome, Task
from meme_nas.trial_log import TrialRecord

FRESH_SEEDS = (1_001, 1_002, 1_003)  # of sampling noise that no trial was scored with


class Finalists:
    """Hands the scorings out to an engine, as a strategy hands out trials: each is of a configuration with one sampling seed, and
    with as many samples as its full training would be scored by. To be asked when search and audit are done."""

    unit = "finalists"

    def __init__(self, settings: SearchSettings, search: Strategy, audit: Audit | None):
        self.settings, self._search, self._audit = settings, search, audit
        self._log = search.study.finalists()
        self._interrupted = set(self._log.running)
        self._to_repeat = {record.number for record in self._log.records if record.state == "failed"}

    @cached_property
    def audited(self) -> list[Rescored]:
        """What the audit came to; empty without one."""
        return self._audit.results() if self._audit else []

    @cached_property
    def best(self) -> TrialRecord | None:
        """The winner: the audit's, where there was one, else the search's."""
        objectives = self.settings.objectives
        return audited_winner(self.audited, objectives) or winner(self._search.study.trials, objectives)

    @cached_property
    def chosen(self) -> list[TrialRecord]:
        """Winner and yardsticks, in the order of their trials."""
        trials = self._search.study.trials
        return [trial for trial in trials if trial.state == "complete" and (trial.is_yardstick or trial is self.best)]

    @cached_property
    def _planned(self) -> list[tuple[TrialRecord, list[Config]]]:
        """Every finalist with what is scored of it, one a sampling seed."""
        return [(trial, [self._fresh(trial, seed) for seed in FRESH_SEEDS]) for trial in self.chosen]

    def _fresh(self, trial: TrialRecord, seed: int) -> Config:
        return trial.config.with_(evaluation={"samples": self.settings.full_config().evaluation.samples, "seed": seed})

    def _begun(self, config: Config) -> TrialRecord | None:
        """The scoring of ``config`` that was started, now or by an earlier command; not one that failed then."""
        begun = (record for record in self._log.records if record.number not in self._to_repeat)
        return next((record for record in begun if record.config == config), None)

    @property
    def done(self) -> bool:
        finished, planned = self.spent
        return finished == planned

    @property
    def spent(self) -> tuple[int, int]:
        """Scorings that are done, and all that are to be."""
        begun = [self._begun(config) for _, configs in self._planned for config in configs]
        return sum(record is not None and record.finished for record in begun), len(begun)

    def next_task(self) -> Task | None:
        for trial, configs in self._planned:
            for config in configs:
                record = self._begun(config)
                if record is None:
                    return self._task(self._log.start(config, FINALIST, trial.choices, self._search.distributions))
                if record.number in self._interrupted:
                    self._interrupted.remove(record.number)
                    return self._task(record)
        return None

    def _task(self, record: TrialRecord) -> Task:
        return Task(record.number, record.config, FINALIST, seeds=self.settings.seeds)

    def record(self, outcome: Outcome) -> TrialRecord:
        return self._log.finish(outcome)

    def results(self) -> list[Rescored]:
        """Of the finalists that were scored with every sampling seed; means over the training seeds."""
        found = [(trial, self._scores(configs)) for trial, configs in self._planned]
        samples = self.settings.full_config().evaluation.samples
        return [Rescored(trial, scores, samples) for trial, scores in found if len(scores) == len(FRESH_SEEDS)]

    def _scores(self, configs: Sequence[Config]) -> tuple[float, ...]:
        records = [record for config in configs if (record := self._begun(config)) and record.state == "complete"]
        return tuple(record.scored.values(self.settings.objectives)[0] for record in records)
