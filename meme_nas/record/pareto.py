"""Pareto fronts: which trials no other beats in everything, and how much of the space of scores they leave behind."""

import math
from collections.abc import Iterable, Sequence

import moocore
import numpy as np

from meme.scoring.cost import ensemble_cost
from meme_nas.record.trial_log import TrialRecord


def front(trials: Iterable[TrialRecord], objectives: Sequence[str]) -> list[TrialRecord]:
    """Return the completed trials of the searched space that no other of them beats in all objectives, cheapest first; of
    equals the earliest.

    Yardsticks outside the space are left out: a strong single model would beat all that a search can propose.
    """
    scored = [trial for trial in trials if trial.state == "complete" and trial.in_space]
    if not scored:
        return []
    kept = moocore.is_nondominated(values_of(scored, objectives), keep_weakly=False)
    chosen = [trial for trial, keep in zip(scored, kept, strict=True) if keep]
    return sorted(chosen, key=lambda trial: tuple(reversed(trial.scored.values(objectives))))


def cost_limits(trials: Iterable[TrialRecord], objectives: Sequence[str]) -> list[float]:
    """Return the costs of the hand-made pattern in all but the first of ``objectives``, which no winner may exceed.

    They are known without a score, so that they hold where its trial failed; infinite where there is no such trial, and where a
    latency was never measured.
    """
    hand_made = next((trial for trial in trials if trial.kind == "hand-made" and trial.in_space), None)
    return [math.inf if hand_made is None else _cost(hand_made, kind) for kind in objectives[1:]]


def _cost(trial: TrialRecord, kind: str) -> float:
    """Return a cost of a trial: as it was recorded, else as its config has it."""
    recorded = trial.outcome.values([kind])[0] if trial.outcome else None
    if recorded is not None:
        return recorded
    return math.inf if kind == "latency_ms" else getattr(ensemble_cost(trial.config), kind)


def values_of(trials: Sequence[TrialRecord], objectives: Sequence[str]) -> np.ndarray:
    """float64 (len(trials), len(objectives))"""
    return np.array([trial.scored.values(objectives) for trial in trials], dtype=np.float64).reshape(len(trials), len(objectives))


def hypervolumes(trials: Sequence[TrialRecord], objectives: Sequence[str], reference: Sequence[float]) -> list[float]:
    """After each completed trial, in order: the volume of scores that the trials so far beat, up to ``reference``.

    Every objective is divided by its reference, so that the largest volume there could be is 1.
    """
    values = values_of([trial for trial in trials if trial.state == "complete"], objectives) / np.asarray(reference)
    volumes, best = [], np.empty((0, len(objectives)))
    for row in values:
        best = np.vstack([best, row])
        best = best[moocore.is_nondominated(best, keep_weakly=False)]
        volumes.append(float(moocore.hypervolume(best, ref=np.ones(len(objectives)))))
    return volumes
