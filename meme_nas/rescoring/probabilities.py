"""The winner's expertization probabilities, chosen one expert at a time at a length that tells.

Which p is best depends on the length of the training more than on the architecture: short trainings from scratch favour p near 1,
short ones from a trunk favour p near 0 (docs/proxy.md). So
the search looks for splits at the hand-made p, and here half and twice each expert's p are tried in its winner.

The logarithm of FID is nearly a sum over experts: each alternative is scored in place of the winner's own expert, beside the
winner's other experts, with noise common to all, and the best of each expert are put together.
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
SAMPLING_SEEDS = (3_001, 3_002)  # of noise that no other score has
LEAST_GAIN = 0.005  # of log FID; an alternative that gains less is not taken


class Probabilities(Rescoring):
    """Trains and scores the alternatives. To be asked when search and audit are done."""

    unit = "probabilities"
    kind = PROBABILITIES

    def __init__(self, settings: SearchSettings, search: Strategy, found: Callable[[], TrialRecord | None]):
        """``found`` returns the winner of search and audit."""
        super().__init__(settings, search, search.study.probabilities())
        self._found = found

    @cached_property
    def chosen(self) -> list[TrialRecord]:
        """Return the winner, if it has several experts."""
        best = self._found()
        return [best] if best and len(best.config.experts) > 1 else []

    @cached_property
    def alternatives(self) -> list[tuple[int, float]]:
        """Return (expert, p) of every alternative."""
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
        """Return for every alternative log FID with it less log FID without, the mean over the sampling seeds.

        Empty before all are scored, and where one could not be; without those of which a KID is not above 0.
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
        """Return which p were changed and by how much log FID gained, as a line for the report."""
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
        """Return the winner with the best p of each expert: a candidate of its own, unless its own p were best."""
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
    """Return ``config`` with other p of some experts."""
    experts = [expert.model_dump() for expert in config.experts]
    for number, p in probabilities.items():
        experts[number - 1]["p"] = p
    return config.with_(experts=experts)
