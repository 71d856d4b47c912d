"""Base class of all strategies: run yardsticks first, repeat interrupted trials, keep cost limits, record every outcome."""

import math
from collections.abc import Sequence
from dataclasses import replace

from meme.config.presets import yardsticks
from meme.config.schema import Config
from meme_nas.record.study import Study
from meme_nas.record.tasks import Outcome, Task
from meme_nas.record.trial_log import TrialRecord
from meme_nas.record.warm_start import WarmStart, warm_start
from meme_nas.settings import SearchSettings
from meme_nas.strategies.optuna_proposer import distribution
from meme_nas.surrogate.costs import Costs, Latency
from search_spaces.space import Space, build_space


class Strategy:
    """Source of tasks and recorder of outcomes. Every answer is a function of the study on disk and the settings.

    Until ``done``, an engine calls ``next_task`` whenever a worker is free, and ``record`` whenever a task has ended.
    """

    unit = "trials"
    """Noun for what ``spent`` counts."""
    rung = 0
    """Number of rungs below proxy length at which trials are trained."""

    def __init__(
        self,
        settings: SearchSettings,
        study: Study,
        space: Space | None = None,
        yardsticks: Sequence[tuple[str, Config]] | None = None,
        latency: Latency | None = None,
    ):
        """Search ``space`` with ``yardsticks`` (kind and config). The defaults are those that the settings name.

        ``latency`` measures latencies. It may be None if latency is neither minimised nor limited.
        """
        self.settings, self.study = settings, study
        self.space = space or proxy_space(settings)
        self.costs = Costs(settings, self.space, latency)
        self.yardsticks = yardsticks_of(settings) if yardsticks is None else list(yardsticks)
        self.distributions = {name: distribution(domain) for name, domain in self.space.domains.items()}
        self._interrupted = [trial for trial in study.trials if not trial.finished]
        self.repeats = 0
        """Number of proposals that were rejected because they had been tried before. They cost no training."""
        found = warm_start(settings.warm_start, self.space, settings.objectives) if settings.warm_start else WarmStart()
        self.warm, self.warm_said = found.points, found.said
        """Points of an earlier study that are proposed first, and a sentence on their number."""

    def next_task(self) -> Task | None:
        """Return a task to run now. None means: wait for an outcome, or stop if ``done``."""
        if self._interrupted:
            return self._task(self._interrupted.pop(0))
        trial = self._next()
        return None if trial is None else self._task(trial)

    def record(self, outcome: Outcome) -> TrialRecord:
        """Record the outcome of a task. A score that is not a finite number makes it a failure."""
        names = ("loss", "macs") if outcome.expert else self.settings.objectives
        if outcome.failure is None and not all(map(_finite, outcome.values(names))):
            said = ", ".join(f"{name} {value}" for name, value in zip(names, outcome.values(names), strict=True))
            outcome = replace(outcome, failure=f"score is not a finite number ({said})")
        return self.study.finish(outcome)

    def other_signals(self, trials: Sequence[TrialRecord]) -> dict[str, list[float]]:
        """Return further predictors of quality, beside the score: by name, one value a trial in ``trials``, lower is better."""
        return {}

    @property
    def every_trial(self) -> list[TrialRecord]:
        """All trials of the search: those that score ensembles, and those that train single experts."""
        return list(self.study.trials)

    @property
    def exhausted(self) -> bool:
        """True if the space has fewer new points within the limits than the budget pays for."""
        raise NotImplementedError

    @property
    def done(self) -> bool:
        """True if every trial is finished and the budget is spent or the space exhausted."""
        raise NotImplementedError

    @property
    def spent(self) -> tuple[int, int]:
        """The spent part of the budget and the whole budget, counted in ``unit``."""
        raise NotImplementedError

    def _next(self) -> TrialRecord | None:
        """Start and return the next trial; None if there is none to start now."""
        raise NotImplementedError

    def _next_yardstick(self) -> TrialRecord | None:
        number = len(self.study.trials)
        if number >= len(self.yardsticks):
            return None
        kind, config = self.yardsticks[number]
        choices = self.space.choices(config) if config.network.splits_channels else {}
        return self.study.start(config, kind, choices, self.distributions)

    def _task(self, trial: TrialRecord) -> Task:
        return Task(trial.number, trial.config, trial.kind, trial.expert, self.settings.seeds, self.rung)


def proxy_space(settings: SearchSettings) -> Space:
    """Return the space of the searched dimensions around the hand-made pattern at proxy length."""
    return build_space(settings.as_proxy(settings.full_config()), settings.searched)


def yardsticks_of(settings: SearchSettings) -> list[tuple[str, Config]]:
    """Return kind and config of every yardstick at proxy length, the hand-made pattern first."""
    named = yardsticks(settings.preset_name)
    return [(kind, settings.as_proxy(settings.applied_to(config))) for kind, config in named.items()]


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
