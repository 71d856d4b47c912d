"""Index of one expert's candidates, with lookups by choices and by expert in constant time: there may be thousands."""

from collections.abc import Iterator, Mapping
from functools import cached_property

import numpy as np

from meme.config.schema import Config, ExpertConfig
from meme_nas.record.trial_log import TrialLog, TrialRecord
from meme_nas.surrogate.costs import Array, Costs
from meme_nas.surrogate.kernel import Candidates, Indices
from search_spaces.domain import Choices, Domain, encoded, points, size

MOST_LISTED = 500  # points of an expert's space; a larger space is never trained completely, so its points are not listed


class Roster:
    """Index of the trials of ``log``. It follows the log as that grows. Candidates are numbered from 0, like the trials."""

    def __init__(self, log: TrialLog, number: int, domains: Mapping[str, Domain], costs: Costs):
        self.log, self.number, self.domains, self._costs = log, number, domains, costs
        self._first: dict[tuple, int] = {}
        self._experts: set[ExpertConfig] = set()
        self._encoded: list[list[float]] = []
        self._cost_rows: list[Array] = []
        self._finished = 0

    @property
    def trials(self) -> list[TrialRecord]:
        return self.log.records

    @property
    def finished(self) -> int:
        """Number of candidates before the first unfinished one."""
        while self._finished < len(self.trials) and self.trials[self._finished].finished:
            self._finished += 1
        return self._finished

    def place(self, choices: Choices) -> int | None:
        """Return the index of the first candidate with these choices; None if there is none."""
        self._catch_up()
        return self._first.get(self._key(choices))

    def has(self, config: Config) -> bool:
        """Return True if a candidate is the same expert as that of ``config``."""
        self._catch_up()
        return config.canonical_expert(self.number) in self._experts

    @property
    def limit(self) -> int:
        """Number of different experts that can keep the limits. If the space is too large to list, its number of points."""
        return len(self._listed) if self._listed else size(self.domains)

    @property
    def is_complete(self) -> bool:
        """True if every point of the space that can keep the limits has been a candidate."""
        self._catch_up()
        return len(self._first) >= size(self.domains) or (bool(self._listed) and next(self.untried(), None) is None)

    def untried(self) -> Iterator[Choices]:
        """Yield the choices that no candidate has; nothing if the space is too large to list."""
        self._catch_up()
        return (choices for expert, choices in self._listed.items() if expert not in self._experts)

    @cached_property
    def _listed(self) -> dict[ExpertConfig, Choices]:
        """Choices of every expert that can keep the limits, and of the hand-made expert in any case.

        Empty if the space is too large to list, or if the limits would need latency measurements.
        """
        if size(self.domains) > MOST_LISTED or "latency_ms" in self._costs.settings.limits:
            return {}
        space = self._costs.space
        found = {space.base.canonical_expert(self.number): space.expert_choices(space.base, self.number)}
        for choices in points(self.domains):
            config = space.with_expert(space.base, self.number, choices)
            if self._costs.may_fit(config, self.number):
                found.setdefault(config.canonical_expert(self.number), choices)
        return found

    def usable(self, end: int) -> Indices:
        """Return the indices of the first ``end`` candidates that are trained, without repeats of the same choices."""
        trials = self.trials[:end]
        return np.array([i for i, t in enumerate(trials) if t.state == "complete" and self.place(t.choices) == i], dtype=int)

    def known(self, end: int) -> Candidates:
        """Return the choices and interval losses of the first ``end`` candidates."""
        self._catch_up()
        losses = [trial.scored.loss if trial.state == "complete" else np.nan for trial in self.trials[:end]]
        return Candidates(np.array(self._encoded[:end]), np.array(losses))

    def costs(self, end: int) -> Array:
        """Return the costs (end, K) that the first ``end`` candidates add to a cascade."""
        self._catch_up()
        return np.array(self._cost_rows[:end])

    def _catch_up(self) -> None:
        if len(self._encoded) == len(self.trials):
            return
        new = self.trials[len(self._encoded) :]
        self._cost_rows += list(self._costs.rows([(trial.config, self.number) for trial in new]))
        for trial in new:
            self._first.setdefault(self._key(trial.choices), trial.number)
            self._experts.add(trial.config.canonical_expert(self.number))
            self._encoded.append(encoded(self.domains, trial.choices))

    def _key(self, choices: Choices) -> tuple:
        return tuple(choices[name] for name in self.domains)
