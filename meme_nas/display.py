"""Console display of a running search: one line for each trial, and a status line with the time left."""

import time

from rich.console import Console
from rich.status import Status
from rich.text import Text

from meme_nas.record.folder import trial_folder
from meme_nas.record.ranking import Standings
from meme_nas.record.trial_log import TrialRecord
from meme_nas.report.costs import costs_of
from meme_nas.report.words import costs_text, duration
from meme_nas.strategies.base import Strategy
from meme_nas.worker.progress import trained_share


class SearchDisplay:
    """Display that prints each finished trial once and keeps the status line current. Call ``update`` after every change."""

    def __init__(self, search: Strategy, workers: int, console: Console):
        self._search, self._workers, self._console = search, workers, console
        self._standings = Standings(search.settings.objectives)
        self._standings.update(search.study.trials)
        self._status: Status | None = None
        self._begun_at, self._begun_at_done = time.monotonic(), search.spent[0]

    def __enter__(self) -> "SearchDisplay":
        if self._console.is_terminal:
            self._status = self._console.status(Text("starting"))
            self._status.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._status:
            self._status.stop()

    def update(self) -> None:
        for trial in self._standings.update(self._search.study.trials):
            self._console.print(self._line(trial))
        if self._status:
            self._status.update(Text(self._status_line()))

    def _line(self, trial: TrialRecord) -> str:
        done, budget = self._search.spent
        head = f"{done:>3}/{budget} #{trial.number:<3} {trial.kind:<12}"
        if trial.state != "complete":
            return f"{head} {trial.state}: {trial.reason}"
        outcome, best = trial.scored, self._standings.winner
        mark = "best so far" if best and best.number == trial.number else f"best {self._quality(best):.3f}" if best else ""
        objectives = self._search.settings.objectives
        costs = costs_text(trial, costs_of(objectives))
        scores = f"{objectives[0].upper()} {self._quality(trial):.3f} {costs:>11} {outcome.seconds:3.0f} s"
        return f"{head} {scores} {mark:<11} {self._time_left()}"

    def _status_line(self) -> str:
        best = self._standings.winner
        shown = f", best {self._quality(best):.3f} (#{best.number})" if best else ""
        done, budget = self._search.spent
        return f"{done}/{budget} {self._search.unit}{shown}{self._running()}, {self._time_left()}"

    def _quality(self, trial: TrialRecord) -> float:
        return trial.scored.values(self._search.settings.objectives)[0]

    def _running(self) -> str:
        """Return the running trials with the progress of their training."""
        running = [trial.number for trial in self._standings.running]
        shares = [trained_share(trial_folder(self._search.study.folder, number)) or 0.0 for number in running]
        return "".join(f", #{number} at {share:.0%}" for number, share in zip(running, shares, strict=True))

    def _time_left(self) -> str:
        """Return the time left, extrapolated from the budget spent since the command began."""
        done, budget = self._search.spent
        if done <= self._begun_at_done:
            return "time left unknown"
        # An interrupted trial runs again even if a smaller budget no longer pays for it, so ``done`` can exceed ``budget``.
        seconds = max(0, budget - done) * (time.monotonic() - self._begun_at) / (done - self._begun_at_done)
        return f"{duration(seconds)} left"
