"""Audit of a search: some configurations are trained longer, with several seeds, to test the ranking at proxy length.

The finalists and a random sample of other candidates, drawn evenly over the range of their scores, are trained ``audit_factor``
times as long as in the search. One training uses the seed of the search, and its experts resume from the bank. The settings can
add fresh training seeds, each with its own sampling noise.

Seeds that choose a winner do not judge it. The audit chooses the winner, and ``meme_nas.rescoring.confirmation`` judges it with
other seeds. Without a confirmation, the last of the audit's seeds judge and have no part in the choice. The search's predictions
are compared with the scores of the fresh seeds, or of its own seed if there are none: by Kendall's tau, over all configurations
and among the best, and by the regret of the search's own choice.
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
FIRST_SAMPLING_SEED = 4_001  # sampling noise that no other score uses; each fresh training seed has its own
LEAST_JUDGES = 2  # training seeds; a single one has no spread


class Audit(Rescoring):
    """Longer trainings of the audited configurations. Each task is one configuration with one training seed."""

    unit = "audits"
    kind = "audit"

    def __init__(self, settings: SearchSettings, search: Strategy):
        super().__init__(settings, search, search.study.audit())

    @property
    def seeds(self) -> range:
        """Training seeds: the last one of the search, then fresh ones."""
        first = self.settings.seed + self.settings.training_seeds - 1
        return range(first, first + self.settings.audit_seeds)

    @cached_property
    def chosen(self) -> list[TrialRecord]:
        """Hand-made pattern, winner, best others, and a random sample of the rest, spread evenly over the range of scores."""
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
        """Number of seeds, the first ones, that choose the winner: all, unless the others must judge it."""
        return choosers_of(self.settings)

    def _seeds(self, config: Config) -> tuple[int, ...]:
        return (config.training.seed,)

    def _stands(self, record: TrialRecord) -> bool:
        """Return True if ``record`` counts. Records of old studies do not if they are the mean over several seeds."""
        return super()._stands(record) and (record.outcome is None or len(record.outcome.fids) <= 1)


def choosers_of(settings: SearchSettings) -> int:
    """Return the number of audit seeds that choose the winner: half of three or more if no confirmation follows, else all."""
    count = settings.audit_seeds
    return count if settings.confirm_share or count <= LEAST_JUDGES else count // 2


def pick(trials: Sequence[TrialRecord], settings: SearchSettings) -> list[TrialRecord]:
    """Return the trials to audit, from the complete trials of the searched space. Equal arguments give the same result."""
    scored = [trial for trial in trials if trial.state == "complete" and trial.choices]
    ranked = sorted(scored, key=lambda trial: (trial.scored.values(settings.objectives)[0], trial.number))
    best = winner(trials, settings.objectives)
    most = min(FINALISTS, settings.audited // 2 - 1)  # at most half, so that the sample has room
    first = [trial for trial in scored if trial.kind == "hand-made"] + ([best] if best else []) + ranked[:most]
    finalists = list({trial.number: trial for trial in first}.values())
    rest = [trial for trial in ranked if trial not in finalists]
    count = min(len(rest), max(0, settings.audited - len(finalists)))
    return finalists + _spread(rest, count, settings.objectives, random.Random(derive_seed(settings.seed, "audit")))


def _spread(ranked: Sequence[TrialRecord], count: int, objectives: Sequence[str], source: random.Random) -> list[TrialRecord]:
    """Return ``count`` random trials, one from each of ``count`` equal parts of the range of scores where a part has any.

    A uniform sample would mostly hold trials nearly as good as the best, whose order is chance.
    """
    if not count:
        return []
    scores = [trial.scored.values(objectives)[0] for trial in ranked]
    parts = np.digitize(scores, np.linspace(scores[0], scores[-1], count + 1)[1:-1])
    chosen = [
        source.choice([trial for trial, own in zip(ranked, parts, strict=True) if own == part]) for part in np.unique(parts)
    ]
    return chosen + source.sample([trial for trial in ranked if trial not in chosen], count - len(chosen))


def fresh(audited: Sequence[Rescored]) -> list[Rescored]:
    """Return ``audited`` with only the scores of fresh training seeds, or of the search's own seed if there are no others."""
    return [replace(each, scores=each.scores[1:] or each.scores) for each in audited]


def agreements(audited: Sequence[Rescored], signals: Mapping[str, Sequence[float]]) -> list[Agreement]:
    """Return Kendall's tau of every signal with the mean score of longer training.

    A signal has one value for each configuration, lower is better. Scores of fresh seeds are used if there are any, because the
    search's own seed shares its luck with the signals. The first signal defines the better half. The result is empty with fewer
    than ``LEAST_AUDITED`` configurations.
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
    """Return tau with its 95% bootstrap interval. Bootstrap samples in which all values are equal are left out."""
    draws = np.random.default_rng(0).integers(0, len(truth), (BOOTSTRAPS, len(truth)))
    low, high = np.nanquantile(_taus(values[draws], truth[draws]), (0.025, 0.975))
    return Agreement(name, float(_taus(values, truth)), float(low), float(high), len(truth))


def _taus(values: NDArray[np.float64], truth: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return Kendall's tau-b along the last axis; NaN if all values of one side are equal."""
    first, second = np.triu_indices(values.shape[-1], 1)
    ours, theirs = (np.sign(each[..., first] - each[..., second]) for each in (values, truth))
    with np.errstate(invalid="ignore"):
        return (ours * theirs).sum(-1) / np.sqrt((ours**2).sum(-1) * (theirs**2).sum(-1))


def regret(
    audited: Sequence[Rescored], picked: TrialRecord | None, objectives: Sequence[str], limits: Sequence[float]
) -> Regret | None:
    """Return the regret of ``picked``, the search's choice: its log score after longer training, less the best one.

    Only configurations within ``limits``, the costs of the hand-made pattern, are compared. None if ``picked`` is not among
    them, or if a score is not above 0, which an unbiased KID can be.
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
    """Return the comparison of the audit's winner ``best`` with the hand-made pattern, over seeds that did not choose it.

    None if fewer than two seeds were reserved for that, if the pattern won, or if a score is not above 0.
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
    """Return the search's predictors of quality, by name: the score, the surrogate's prediction, the sum of interval losses."""
    trials = [each.trial for each in audited]
    signals = {"score at proxy length": [trial.scored.values(search.settings.objectives)[0] for trial in trials]}
    for name, values in search.other_signals(trials).items():
        signals[name] = values
    return signals


def audited_winner(
    audited: Sequence[Rescored], objectives: Sequence[str], limits: Sequence[float], choosers: int | None = None
) -> TrialRecord | None:
    """Return the audited trial with the best mean score within ``limits``; None without an audit.

    ``limits`` are the costs of the hand-made pattern, whose own audit may have failed. The mean is over the first ``choosers``
    training seeds, or over all if that is None.
    """
    longer = [_as_audited(replace(each, scores=each.scores[:choosers]), objectives[0]) for each in audited]
    best = winner(longer, objectives, limits)
    return next((each.trial for each in audited if best and each.trial.number == best.number), None)


def _as_audited(each: Rescored, objective: str) -> TrialRecord:
    """Return the trial with the score of the longer training in place of the search's."""
    scores: dict[str, Any] = {objective: each.mean}
    return replace(each.trial, outcome=replace(each.trial.scored, **scores))
