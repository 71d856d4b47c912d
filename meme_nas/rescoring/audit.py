"""How far the proxy's ranking can be trusted: some configurations trained longer, with several seeds, and ranked anew.

The finalists and a random sample of other candidates, drawn evenly over the range of their scores, are trained ``audit_factor``
times as long as in the search: with the seed they were searched with, where their experts go on from the bank, and with fresh
seeds, each with sampling noise of its own, where the settings say so.

What chose does not judge. The audit chooses the winner, and ``meme_nas.rescoring.confirmation`` judges it with other seeds. Where
there is no confirmation, the last of the audit's seeds judge and have no part in the choice. What the search knew of the
configurations is compared with how they turned out with the fresh seeds, if there are any: by Kendall's tau, over the whole range
and among the best, and by how much the search's own choice costs.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meme.config.schema import Config
from meme.support.intervals import behind_best, pooled
from meme.support.seeding import derive_seed
from meme_nas.record.ranking import winner
from meme_nas.record.trial_log import TrialRecord
from meme_nas.rescoring.base import Rescoring
from meme_nas.rescoring.findings import Agreement, Judged, Regret, Rescored
from meme_nas.settings import LEAST_AUDITED, SearchSettings
from meme_nas.strategies.base import Strategy

FINALISTS = 3
BOOTSTRAPS = 2_000
FIRST_SAMPLING_SEED = 4_001  # of noise that no other score has; each fresh training seed has its own
LEAST_JUDGES = 2  # training seeds; one has no spread


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
        steps, (own, *fresh) = self.settings.audit_factor * trial.config.training.steps, self.seeds
        ways = [trial.config.with_(training={"steps": steps, "seed": own})]
        for place, seed in enumerate(fresh):
            noise = {"seed": FIRST_SAMPLING_SEED + place}
            ways.append(trial.config.with_(training={"steps": steps, "seed": seed}, evaluation=noise))
        return ways

    @property
    def choosers(self) -> int:
        """Return how many of the seeds, the first ones, choose the winner: all, unless the others must judge it."""
        return choosers_of(self.settings)

    def _seeds(self, config: Config) -> tuple[int, ...]:
        return (config.training.seed,)

    def _stands(self, record: TrialRecord) -> bool:
        """Studies from before every seed was a trial of its own have some that are the mean of all."""
        return super()._stands(record) and (record.outcome is None or len(record.outcome.fids) <= 1)


def choosers_of(settings: SearchSettings) -> int:
    """Return how many of the audit's seeds choose the winner: half where no confirmation follows and there are three or more."""
    count = settings.audit_seeds
    return count if settings.confirm_share or count <= LEAST_JUDGES else count // 2


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


def fresh(audited: Sequence[Rescored]) -> list[Rescored]:
    """Return the scores of the training seeds that the search has not used; where it has used all, those of its own."""
    return [replace(each, scores=each.scores[1:] or each.scores) for each in audited]


def agreements(audited: Sequence[Rescored], signals: Mapping[str, Sequence[float]]) -> list[Agreement]:
    """Return Kendall's tau of every signal (one value a configuration, lower is better) with the mean score of longer training.

    Scores of fresh seeds count, if there are any: the search's own share their luck with its signals. The better half is that
    of the first signal. Empty with fewer than ``LEAST_AUDITED`` configurations.
    """
    if len(audited) < LEAST_AUDITED:
        return []
    truth = np.array([each.mean for each in fresh(audited)])
    values = {name: np.asarray(signal, dtype=float) for name, signal in signals.items()}
    best = np.argsort(next(iter(values.values())), kind="stable")[: max(LEAST_AUDITED, len(audited) // 2)]
    return [
        replace(_agreement(name, own, truth), among_best=_agreement(name, own[best], truth[best])) for name, own in values.items()
    ]


def _agreement(name: str, values: NDArray[np.float64], truth: NDArray[np.float64]) -> Agreement:
    """Return tau with its bootstrap interval; samples in which all are equal are left out."""
    draws = np.random.default_rng(0).integers(0, len(truth), (BOOTSTRAPS, len(truth)))
    low, high = np.nanquantile(_taus(values[draws], truth[draws]), (0.025, 0.975))
    return Agreement(name, float(_taus(values, truth)), float(low), float(high), len(truth))


def _taus(values: NDArray[np.float64], truth: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return Kendall's tau-b along the last axis, nan where one side is all alike."""
    first, second = np.triu_indices(values.shape[-1], 1)
    ours, theirs = (np.sign(each[..., first] - each[..., second]) for each in (values, truth))
    with np.errstate(invalid="ignore"):
        return (ours * theirs).sum(-1) / np.sqrt((ours**2).sum(-1) * (theirs**2).sum(-1))


def regret(
    audited: Sequence[Rescored], picked: TrialRecord | None, objectives: Sequence[str], limits: Sequence[float]
) -> Regret | None:
    """Return how much worse than the best of the audited is ``picked``, the search's choice, after longer training.

    Compared are those within ``limits``, the costs of the hand-made pattern. None where ``picked`` is not among them, or a score
    is not above 0, as an unbiased KID can be.
    """
    costs = [each.trial.scored.values(objectives)[1:] for each in audited]
    fits = [all(a <= b for a, b in zip(own, limits, strict=True)) for own in costs]
    compared = [each for each, fit in zip(fresh(audited), fits, strict=True) if fit]
    place = next((place for place, each in enumerate(compared) if picked and each.trial.number == picked.number), None)
    if place is None or min(score for each in compared for score in each.scores) <= 0:
        return None
    best = min(compared, key=lambda each: each.mean).trial
    behind = behind_best([[math.log(score) for score in each.scores] for each in compared], place)
    return Regret(compared[place].trial, best, behind, len(audited[0].scores) > 1, len(compared))


def judged(audited: Sequence[Rescored], best: TrialRecord | None, choosers: int) -> Judged | None:
    """Return the audit's winner ``best`` against the hand-made pattern, over the training seeds that did not choose it.

    None where fewer than two seeds were kept for that, the pattern won, or a score is not above 0.
    """
    place = next((place for place, each in enumerate(audited) if each.trial.is_same(best)), None)
    rival = next((place for place, each in enumerate(audited) if each.trial.kind == "hand-made"), None)
    if place is None or rival in (None, place):
        return None
    scores = [each.scores[choosers:] for each in audited]
    if len(scores[0]) < LEAST_JUDGES or min(map(min, scores)) <= 0:
        return None
    return Judged(audited[place].trial, pooled([[math.log(score) for score in own] for own in scores], place, rival))


def signals_of(audited: Sequence[Rescored], search: Strategy) -> dict[str, list[float]]:
    """What the search knew of each configuration: its score, what the surrogate says, the sum of its experts' interval losses."""
    trials = [each.trial for each in audited]
    signals = {"score at proxy length": [trial.scored.values(search.settings.objectives)[0] for trial in trials]}
    for name, values in search.other_signals(trials).items():
        signals[name] = values
    return signals


def audited_winner(
    audited: Sequence[Rescored], objectives: Sequence[str], limits: Sequence[float], choosers: int | None = None
) -> TrialRecord | None:
    """Return the finalist that turned out best on average, within ``limits``; None without an audit.

    ``limits``: costs of the hand-made pattern, which need not have come through the audit. ``choosers``: how many of the training
    seeds, the first ones, have a say. None: all.
    """
    longer = [_as_audited(replace(each, scores=each.scores[:choosers]), objectives[0]) for each in audited]
    best = winner(longer, objectives, limits)
    return next((each.trial for each in audited if best and each.trial.number == best.number), None)


def _as_audited(each: Rescored, objective: str) -> TrialRecord:
    """The trial as if the search had scored it as the longer training did."""
    scores: dict[str, Any] = {objective: each.mean}
    return replace(each.trial, outcome=replace(each.trial.scored, **scores))
