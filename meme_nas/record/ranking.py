"""Ranking of trials: the Pareto front and its hypervolume, the winner, and both while a search runs."""

import math
from collections.abc import Iterable, Sequence

import moocore
import numpy as np

from meme.scoring.cost import ensemble_cost
from meme_nas.record.trial_log import TrialRecord


def front(trials: Iterable[TrialRecord], objectives: Sequence[str]) -> list[TrialRecord]:
    """Return the Pareto front of the complete trials of the searched space, cheapest first. Of equal trials, the first is kept.

    Yardsticks outside the space are excluded, because a strong single model could dominate all points of the space.
    """
    scored = [trial for trial in trials if trial.state == "complete" and trial.in_space]
    if not scored:
        return []
    kept = moocore.is_nondominated(values_of(scored, objectives), keep_weakly=False)
    chosen = [trial for trial, keep in zip(scored, kept, strict=True) if keep]
    return sorted(chosen, key=lambda trial: tuple(reversed(trial.scored.values(objectives))))


def winner(trials: Sequence[TrialRecord], objectives: Sequence[str], limits: Sequence[float] | None = None) -> TrialRecord | None:
    """Return the trial of the searched space with the best first objective, no worse than the hand-made pattern in the others.

    The hand-made pattern itself wins if no trial is better. ``limits`` are its costs. None: they are taken from ``trials``, even
    if the pattern has no score.
    """
    scored = [trial for trial in trials if trial.state == "complete" and trial.in_space]
    limits = cost_limits(trials, objectives) if limits is None else limits
    fitting = [t for t in scored if all(a <= b for a, b in zip(t.scored.values(objectives)[1:], limits, strict=True))]
    return min(fitting, key=lambda trial: trial.scored.values(objectives)[0], default=None)


def cost_limits(trials: Iterable[TrialRecord], objectives: Sequence[str]) -> list[float]:
    """Return the hand-made pattern's values of all objectives except the first. No winner may exceed these costs.

    Costs are known without a score, so they also apply if the pattern's trial failed. They are infinite if there is no such
    trial, as is a latency that was never measured.
    """
    hand_made = next((trial for trial in trials if trial.kind == "hand-made" and trial.in_space), None)
    return [math.inf if hand_made is None else _cost(hand_made, kind) for kind in objectives[1:]]


def _cost(trial: TrialRecord, kind: str) -> float:
    """Return a cost of a trial: the recorded one, else computed from its config."""
    recorded = trial.outcome.values([kind])[0] if trial.outcome else None
    if recorded is not None:
        return recorded
    return math.inf if kind == "latency_ms" else getattr(ensemble_cost(trial.config), kind)


def values_of(trials: Sequence[TrialRecord], objectives: Sequence[str]) -> np.ndarray:
    """Return the objectives of ``trials`` as float64 (len(trials), len(objectives))."""
    return np.array([trial.scored.values(objectives) for trial in trials], dtype=np.float64).reshape(len(trials), len(objectives))


def hypervolumes(trials: Sequence[TrialRecord], objectives: Sequence[str], reference: Sequence[float]) -> list[float]:
    """Return the hypervolume after each complete trial, in order, with the reference point ``reference``.

    Every objective is divided by its reference, so that the largest possible volume is 1.
    """
    values = values_of([trial for trial in trials if trial.state == "complete"], objectives) / np.asarray(reference)
    volumes, best = [], np.empty((0, len(objectives)))
    for row in values:
        best = np.vstack([best, row])
        best = best[moocore.is_nondominated(best, keep_weakly=False)]
        volumes.append(float(moocore.hypervolume(best, ref=np.ones(len(objectives)))))
    return volumes


class Standings:
    """Winner and Pareto front of a growing list of trials. Updates look at new trials only, so their cost does not grow."""

    def __init__(self, objectives: Sequence[str]):
        self.objectives = tuple(objectives)
        self.winner: TrialRecord | None = None
        self.front: list[TrialRecord] = []
        self.yardsticks: list[TrialRecord] = []
        """Finished yardsticks."""
        self.running: list[TrialRecord] = []
        self._limits: list[float] = []
        self._seen = 0

    def update(self, trials: Sequence[TrialRecord]) -> list[TrialRecord]:
        """Take in the new trials and return the newly finished ones, in order. ``trials`` extends the list of the last call."""
        looked_at = [*(trials[trial.number] for trial in self.running), *trials[self._seen :]]
        self.running = [trial for trial in looked_at if not trial.finished]
        self._seen = len(trials)
        new = [trial for trial in looked_at if trial.finished]
        self.yardsticks += [trial for trial in new if trial.is_yardstick]
        before, self._limits = self._limits, cost_limits(trials, self.objectives)
        # If the limits have changed, the winner so far may exceed them.
        known = trials if self._limits != before else [*([self.winner] if self.winner else []), *new]
        self.winner = winner(sorted(known, key=_number), self.objectives, self._limits)
        self.front = front(sorted([*self.front, *new], key=_number), self.objectives)
        return new

    @property
    def worth_keeping(self) -> set[int] | None:
        """Numbers of the trials whose weights are still needed: the front, the yardsticks and the winner.

        None, which means all, until every yardstick is finished, because the costs of the hand-made pattern limit the winner.
        """
        if any(trial.is_yardstick for trial in self.running):
            return None
        return {trial.number for trial in (*self.front, *self.yardsticks, *([self.winner] if self.winner else []))}


def _number(trial: TrialRecord) -> int:
    return trial.number
