"""Who leads a search so far, told by its new trials alone: what a trial costs must not grow with how many there were."""

from collections.abc import Sequence

from meme_nas.record.pareto import cost_limits, front
from meme_nas.record.trial_log import TrialRecord
from meme_nas.strategies.base import winner


class Standings:
    """The winner and the Pareto front of a growing list of trials."""

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
