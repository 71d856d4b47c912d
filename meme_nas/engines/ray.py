"""Run a search on Ray Tune. The only file that imports Ray.

Tune is given our search as its searcher and keeps no record of its own that matters: the study on disk is the one record, so
every run of the command is a new Tune run that goes on where the study stands.
"""

import logging
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

# Tune's newer output prints boxes about an experiment, whatever its verbosity.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
# Without it Ray warns, at every start on a machine without a GPU, of a change in how it hides GPUs from CPU actors.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray import tune
from ray.tune.search import Searcher

from meme_nas.strategy import Strategy
from meme_nas.trial import Outcome, Task, attempt

DEATHS_ALLOWED = 1  # a trial whose worker dies is run again so often


class RayEngine:
    """``workers`` actors that stay alive from trial to trial, each with ``cpus`` cores and a share of a GPU."""

    def __init__(self, workers: int, cpus: float, gpus: float, folder: Path):
        self.workers, self.folder = workers, folder
        self.resources = {"cpu": cpus, "gpu": gpus} if gpus else {"cpu": cpus}
        context = ray.init(
            num_cpus=max(1, round(workers * cpus)),
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        self.dashboard = f"http://{context.dashboard_url}" if context.dashboard_url else None
        """Address of the dashboard, or None where Ray could not start it."""
        self.asks_for_token = self.dashboard is not None and _asks_for_token(self.dashboard)
        """Whether the dashboard opens only with the token that ``ray get-auth-token`` prints, as Ray has it by default."""

    def run(self, search: Strategy, objective: Callable[[Task], Outcome], on_change: Callable[[], None]) -> None:
        """Run ``search`` to its end. ``on_change`` is called when trials start or end, and about once a second."""
        logging.getLogger("ray.tune").setLevel(logging.ERROR)
        storage = self.folder.absolute() / "ray"
        shutil.rmtree(storage, ignore_errors=True)
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(TrialActor, objective=objective), self.resources),
            tune_config=tune.TuneConfig(
                search_alg=StudySearcher(search),
                num_samples=-1,
                max_concurrent_trials=self.workers,
                reuse_actors=True,
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(storage),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=DEATHS_ALLOWED),
                checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
                callbacks=[_OnChange(on_change)],
            ),
        )
        tuner.fit()

    def close(self) -> None:
        ray.shutdown()


class _NotPickled:
    """Tune pickles its run's settings for a restore that we never do; what they refer to here stays out of the file."""

    def __getstate__(self) -> dict:
        return {}


class StudySearcher(_NotPickled, Searcher):
    """Our search in the form Tune asks."""

    def __init__(self, search: Strategy):
        super().__init__(metric="fid", mode="min")
        self._search = search
        self._tasks: dict[str, Task] = {}

    def suggest(self, trial_id: str) -> dict | str | None:
        task = self._search.next_task()
        if task is None:
            return Searcher.FINISHED if self._search.done else None
        self._tasks[trial_id] = task
        return {"task": task}

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        task = self._tasks.pop(trial_id)
        expected = {"number": task.number, "expert": task.expert, "rung": task.rung}
        if error or not result or any(result.get(name) != value for name, value in expected.items()):
            self._search.record(task.failed("its worker process died (killed, or out of memory)"))
        else:
            self._search.record(Outcome.from_dict(result))

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study on disk is the record."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the study on disk is the record."""


class TrialActor(tune.Trainable):
    """One worker: a Tune trial is one step, in which the objective does all of its work."""

    def setup(self, config: dict, objective: Callable[[Task], Outcome]) -> None:
        self._task, self._objective = config["task"], objective

    def reset_config(self, new_config: dict) -> bool:
        self._task = new_config["task"]
        return True

    def step(self) -> dict:
        return attempt(self._objective, self._task).to_dict() | {"done": True}


class _OnChange(_NotPickled, tune.Callback):
    def __init__(self, on_change: Callable[[], None]):
        self._on_change = on_change

    def on_step_end(self, iteration: int, trials: list, **info) -> None:
        self._on_change()


def _asks_for_token(dashboard: str) -> bool:
    try:
        with urllib.request.urlopen(f"{dashboard}/api/version", timeout=5):
            return False
    except urllib.error.HTTPError as error:
        return error.code == 401
    except OSError:
        return False


def _trial_name(trial) -> str:
    return trial.config["task"].name
