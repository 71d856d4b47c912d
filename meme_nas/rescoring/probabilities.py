"""Choice of the winner's expertization probabilities p, one expert at a time, at a longer training than the proxy's.

The best p depends on the length of the training more than on the architecture: short trainings from scratch favour p near 1,
short ones from a trunk favour p near 0 (docs/proxy.md). The search therefore uses the hand-made p. Then half and twice each
expert's p are tried in its winner.

The logarithm of FID is nearly a sum over experts. So each alternative replaces one of the winner's experts and is scored beside
the others, with the same noise, and the best p of every expert are combined.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

from meme.config.schema import Config
from meme.support.intervals import log_ratios
from meme_nas.record.tasks import PROBABILITIES
from meme_nas.record.trial_log import TrialRecord
from meme_nas.rescoring.base import Rescoring
from meme_nas.settings import SearchSettings
from meme_nas.strategies.base import Strategy

FACTORS = (0.5, 2.0)
SAMPLING_SEEDS = (3_001, 3_002)  # sampling noise that no other score uses
LEAST_GAIN = 0.005  # of log FID; an alternative with a smaller gain is ignored


class Probabilities(Rescoring):
    """Trainings and scores of the alternative p. It may only be used when search and audit are done."""

    unit = "probabilities"
    kind = PROBABILITIES

    def __init__(self, settings: SearchSettings, search: Strategy, found: Callable[[], TrialRecord | None]):
        """Take ``found``, a function that returns the winner of search and audit."""
        super().__init__(settings, search, search.study.probabilities())
        self._found = found

    @cached_property
    def chosen(self) -> list[TrialRecord]:
        """The winner, if it has several experts; else nothing."""
        best = self._found()
        return [best] if best and len(best.config.experts) > 1 else []

    @cached_property
    def alternatives(self) -> list[tuple[int, float]]:
        """Pairs (expert, p) of all alternatives."""
        return [
            (number, p)
            for trial in self.chosen
            for number, expert in enumerate(trial.config.experts, start=1)
            for p in sorted({min(1.0, round(factor * expert.p, 4)) for factor in FACTORS} - {expert.p})
        ]

    def _ways(self, trial: TrialRecord) -> list[Config]:
        own = self.settings.trained_to(trial.config, self.settings.p_share)
        configs = [own, *(_with_p(own, {number: p}) for number, p in self.alternatives)]
        return [config.with_(evaluation={"seed": seed}) for seed in SAMPLING_SEEDS for config in configs]

    def _seeds(self, config: Config) -> tuple[int, ...]:
        return self.settings.seeds[:1]

    def gains(self) -> dict[tuple[int, float], float]:
        """Return log FID with each alternative less log FID without it, averaged over the sampling seeds.

        The result is empty until all are scored, and if one could not be scored. Alternatives with a KID that is not above 0 are
        left out.
        """
        results = self.results()
        if not results:
            return {}
        size = 1 + len(self.alternatives)
        rows = [results[0].scores[first : first + size] for first in range(0, len(results[0].scores), size)]
        found = {}
        for place, alternative in enumerate(self.alternatives, start=1):
            ratios = log_ratios([row[place] for row in rows], [row[0] for row in rows])
            if ratios is not None:
                found[alternative] = statistics.fmean(ratios)
        return found

    def said(self) -> str:
        """Return a line for the report: the changed p, and the change of FID that each brought."""
        changed, trial = self.applied(), self._found()
        if changed is None or trial is None or not self.alternatives:
            return "as hand-made: none was tried"
        if not self.gains():
            return "as hand-made: the alternatives could not all be scored"
        if changed is trial:
            return "as hand-made: no alternative was better"
        gains, steps = self.gains(), self.settings.trained_to(trial.config, self.settings.p_share).training.steps
        pairs = enumerate(zip(trial.config.experts, changed.config.experts, strict=True), start=1)
        parts = [
            f"expert {number} {before.p:g} to {after.p:g} ({100 * math.expm1(gains[number, after.p]):+.1f}%)"
            for number, (before, after) in pairs
            if before.p != after.p
        ]
        return f"{', '.join(parts)}; chosen at {steps:,} steps an expert"

    def applied(self) -> TrialRecord | None:
        """Return the winner with the best p of each expert, as a candidate; the winner itself if its own p are best."""
        best: dict[int, tuple[float, float]] = {}
        for (number, p), gain in self.gains().items():
            if gain < min(-LEAST_GAIN, best.get(number, (0.0, 0.0))[0]):
                best[number] = gain, p
        trial = self._found()
        if trial is None or not best:
            return trial
        config = _with_p(trial.config, {number: p for number, (_, p) in best.items()})
        choices = trial.choices | {f"expert{n}.p": p for n, (_, p) in best.items() if f"expert{n}.p" in trial.choices}
        return replace(trial, kind="candidate", config=config, choices=choices)


def _with_p(config: Config, probabilities: dict[int, float]) -> Config:
    """Return ``config`` with p replaced for the experts in ``probabilities``."""
    experts = [expert.model_dump() for expert in config.experts]
    for number, p in probabilities.items():
        experts[number - 1]["p"] = p
    return config.with_(experts=experts)
