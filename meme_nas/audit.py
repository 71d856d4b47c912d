"""How far the proxy's ranking can be trusted: some configurations trained longer, with several seeds, and ranked anew.

The finalists and a random sample of other candidates, drawn evenly over the range of their scores, are trained ``audit_factor``
times as long as in the search: with the seed they were searched with, where their experts go on from the bank, and with others
where the settings say so. The audit chooses the winner; ``meme_nas.confirmation`` judges it with other seeds. What the search
knew of the configurations is compared with how they turned out, by Kendall's tau with a bootstrap interval over configurations.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from scipy.stats import kendalltau

from meme.config import Config
from meme.seeding import derive_seed
from meme_nas.rescoring import Rescoring
from meme_nas.settings import LEAST_AUDITED, SearchSettings
from meme_nas.strategy import Strategy, winner
from meme_nas.summary import Agreement, Rescored
from meme_nas.trial_log import TrialRecord

FINALISTS = 3
BOOTSTRAPS = 2_000


class Audit(Rescoring):
    """The longer trainings: each is of a configuration with one seed."""

    unit = "audits"
    kind = "audit"

    def __init__(self, settings: SearchSettings, search: Strategy):
        super().__init__(settings, search, search.study.audit())

    @property
    def seeds(self) -> range:
        """The search's last one and others."""
        first = self.settings.seed + self.settings.training_seeds - 1
        return range(first, first + self.settings.audit_seeds)

    @cached_property
    def chosen(self) -> list[TrialRecord]:
        """Hand-made pattern and winner, the best others, and a random sample of the rest, evenly over the range of scores."""
        return pick(self._search.study.trials, self.settings)

    def _ways(self, trial: TrialRecord) -> list[Config]:
        steps = self.settings.audit_factor * trial.config.training.steps
        return [trial.config.with_(training={"steps": steps, "seed": seed}) for seed in self.seeds]

    def _seeds(self, config: Config) -> tuple[int, ...]:
        return (config.training.seed,)

    def _stands(self, record: TrialRecord) -> bool:
        """Studies from before every seed was a trial of its own have some that are the mean of all."""
        return super()._stands(record) and (record.outcome is None or len(record.outcome.fids) <= 1)


def pick(trials: Sequence[TrialRecord], settings: SearchSettings) -> list[TrialRecord]:
    """What to audit, the same whenever it is asked: of complete trials of the searched space."""
    scored = [trial for trial in trials if trial.state == "complete" and trial.choices]
    ranked = sorted(scored, key=lambda trial: (trial.scored.values(settings.objectives)[0], trial.number))
    best = winner(trials, settings.objectives)
    most = min(FINALISTS, settings.audited // 2 - 1)  # and room is left for the others
    first = [trial for trial in scored if trial.kind == "hand-made"] + ([best] if best else []) + ranked[:most]
    finalists = list({trial.number: trial for trial in first}.values())
    rest = [trial for trial in ranked if trial not in finalists]
    count = min(len(rest), max(0, settings.audited - len(finalists)))
    return finalists + _spread(rest, count, settings.objectives, random.Random(derive_seed(settings.seed, "audit")))


def _spread(ranked: Sequence[TrialRecord], count: int, objectives: Sequence[str], source: random.Random) -> list[TrialRecord]:
    """``count`` of the trials at random, but evenly over the range of their scores as far as there are such: most of what a
    search has scored is nearly as good as its best, and how those rank among each other is chance."""
    if not count:
        return []
    scores = [trial.scored.values(objectives)[0] for trial in ranked]
    parts = np.digitize(scores, np.linspace(scores[0], scores[-1], count + 1)[1:-1])
    chosen = [
        source.choice([trial for trial, own in zip(ranked, parts, strict=True) if own == part]) for part in np.unique(parts)
    ]
    return chosen + source.sample([trial for trial in ranked if trial not in chosen], count - len(chosen))


def agreements(audited: Sequence[Rescored], signals: Mapping[str, Sequence[float]], seed: int = 0) -> list[Agreement]:
    """Kendall's tau of every signal (one value a configuration, lower is better) with the mean score of the longer training.

    Empty with fewer than ``LEAST_AUDITED`` configurations. Bootstrap samples in which all are equal are left out.
    """
    if len(audited) < LEAST_AUDITED:
        return []
    truth, source = np.array([each.mean for each in audited]), np.random.default_rng(seed)
    draws = source.integers(0, len(audited), (BOOTSTRAPS, len(audited)))
    found = []
    for name, signal in signals.items():
        values = np.asarray(signal, dtype=float)
        taus = np.array([kendalltau(values[draw], truth[draw]).statistic for draw in draws])
        low, high = np.nanquantile(taus, (0.025, 0.975))
        found.append(Agreement(name, float(kendalltau(values, truth).statistic), float(low), float(high), len(audited)))
    return found


def signals_of(audited: Sequence[Rescored], search: Strategy) -> dict[str, list[float]]:
    """What the search knew of each configuration: its score, what the surrogate says, the sum of its experts' interval losses."""
    trials = [each.trial for each in audited]
    signals = {"score at proxy length": [trial.scored.values(search.settings.objectives)[0] for trial in trials]}
    for name, values in search.other_signals(trials).items():
        signals[name] = values
    return signals


def audited_winner(audited: Sequence[Rescored], objectives: Sequence[str], limits: Sequence[float]) -> TrialRecord | None:
    """The finalist that turned out best on average, within ``limits``, the costs of the hand-made pattern, which need not have
    come through the audit; None without one."""
    longer = [_as_audited(each, objectives[0]) for each in audited]
    best = winner(longer, objectives, limits)
    return next((each.trial for each in audited if best and each.trial.number == best.number), None)


def _as_audited(each: Rescored, objective: str) -> TrialRecord:
    """The trial as if the search had scored it as the longer training did."""
    scores: dict[str, Any] = {objective: each.mean}
    return replace(each.trial, outcome=replace(each.trial.scored, **scores))
