"""Pareto fronts: which trials no other beats in everything, and how much of the space of scores they leave behind."""

from collections.abc import Iterable, Sequence

import moocore
import numpy as np

from meme_nas.trial_log import TrialRecord

OBJECTIVES = ("quality", "macs")  # the first is FID or KID, whichever a search minimises


def front(trials: Iterable[TrialRecord], objectives: Sequence[str] = OBJECTIVES) -> list[TrialRecord]:
    """The completed trials that no other beats in all objectives, cheapest first; of equals the earliest."""
    scored = [trial for trial in trials if trial.state == "complete"]
    if not scored:
        return []
    kept = moocore.is_nondominated(values_of(scored, objectives), keep_weakly=False)
    chosen = [trial for trial, keep in zip(scored, kept, strict=True) if keep]
    return sorted(chosen, key=lambda trial: tuple(reversed(trial.outcome.values(objectives))))


def values_of(trials: Sequence[TrialRecord], objectives: Sequence[str] = OBJECTIVES) -> np.ndarray:
    """float64 (len(trials), len(objectives))"""
    return np.array([trial.outcome.values(objectives) for trial in trials], dtype=np.float64).reshape(
        len(trials), len(objectives)
    )


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
