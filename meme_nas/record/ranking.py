"""Which trials are best: the Pareto front and the volume it beats, the winner, and who leads a search so far."""

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


def winner(trials: Sequence[TrialRecord], objectives: Sequence[str], limits: Sequence[float] | None = None) -> TrialRecord | None:
    """The best of the searched space by the first of ``objectives``, no worse than the hand-made pattern in the others.

    The hand-made pattern itself wins if nothing beats it. ``limits`` are its costs; None: as ``trials`` have it, scored or not.
    """
    scored = [trial for trial in trials if trial.state == "complete" and trial.in_space]
    limits = cost_limits(trials, objectives) if limits is None else limits
    fitting = [t for t in scored if all(a <= b for a, b in zip(t.scored.values(objectives)[1:], limits, strict=True))]
    return min(fitting, key=lambda trial: trial.scored.values(objectives)[0], default=None)


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


class Standings:
    """The winner and the Pareto front of a growing list of trials, told by its new trials alone: what a trial costs must not grow
    with how many there were."""

    def __init__(self, objectives: Sequence[str]):
        self.objectives = tuple(objectives)
        self.winner: TrialRecord | None = None
        self.front: list[TrialRecord] = []
        self.yardsticks: list[TrialRecord] = []
        """Those that are finished."""
        self.running: list[TrialRecord] = []
        self._limits: list[float] = []
        self._seen = 0

    def update(self, trials: Sequence[TrialRecord]) -> list[TrialRecord]:
        """Take in what is new in ``trials``, which are those of the last call and more; the newly finished ones, in order."""
        looked_at = [*(trials[trial.number] for trial in self.running), *trials[self._seen :]]
        self.running = [trial for trial in looked_at if not trial.finished]
        self._seen = len(trials)
        new = [trial for trial in looked_at if trial.finished]
        self.yardsticks += [trial for trial in new if trial.is_yardstick]
        before, self._limits = self._limits, cost_limits(trials, self.objectives)
        # Other limits may cost the winner so far its place.
        known = trials if self._limits != before else [*([self.winner] if self.winner else []), *new]
        self.winner = winner(sorted(known, key=_number), self.objectives, self._limits)
        self.front = front(sorted([*self.front, *new], key=_number), self.objectives)
        return new

    @property
    def worth_keeping(self) -> set[int] | None:
        """Numbers of the trials whose weights are looked at again: the front, the yardsticks and the winner. None, which is all,
        until every yardstick is finished, as the costs of the hand-made pattern decide on the winner."""
        if any(trial.is_yardstick for trial in self.running):
            return None
        return {trial.number for trial in (*self.front, *self.yardsticks, *([self.winner] if self.winner else []))}


def _number(trial: TrialRecord) -> int:
    return trial.number
