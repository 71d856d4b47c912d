"""Searches in this process, for tests of what does not depend on the engine."""

import random
from collections.abc import Callable

from toys import score

from meme_nas.record.study import Study
from meme_nas.record.tasks import Outcome, Task, attempt
from meme_nas.strategies.joint import Joint
from meme_nas.strategies.rungs import factorised


class InThisProcess:
    """An engine without workers, which would take longer to start than all of their work."""

    def run(self, search, objective, on_change) -> None:
        while not search.done:
            if task := search.next_task():  # none is left where a search is found to be exhausted, and all else is done
                search.record(attempt(objective, task))
            on_change()

    def close(self) -> None:
        pass


def searched(settings, objective: Callable[[Task], Outcome] = score, workers: int = 1, stop: int = 0, on_disk: bool = True):
    """The study of a search in this process, ``workers`` tasks at a time; stopped when ``stop`` trials are finished, if any,
    with the other tasks running."""
    study = Study(settings.folder, settings.in_force(), settings.objectives) if on_disk else Study.in_memory(settings.objectives)
    search = factorised(settings, study) if settings.strategy_name == "factorised" else Joint(settings, study)
    running, ended, source = [], 0, random.Random(workers)
    while not search.done and not 0 < stop <= ended:
        while len(running) < workers and (task := search.next_task()):
            running.append(task)
        search.record(attempt(objective, running.pop(source.randrange(len(running)))))
        ended += 1
    study.close()
    return study


def record_of_choices(study: Study) -> list:
    """Return kind, choices and state of all trials, log by log."""
    rungs = [study.rung(number) for number in range(3)]
    logs = [rung.experts(number).records for rung in rungs for number in range(1, 5)] + [rung.trials for rung in rungs]
    return [[(trial.kind, trial.choices, trial.state) for trial in log] for log in logs]
