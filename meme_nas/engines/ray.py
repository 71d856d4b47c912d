"""Engine that runs a search on Ray Tune.

Our search is Tune's searcher. Tune's own record is not used. The study on disk is the only record, so every run of the command
is a new Tune run that resumes from the study.
"""

import logging
import os
import shlex
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

# Tune's newer output prints boxes about an experiment at any verbosity.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
# Tune would write its state every few seconds, which takes longer with more trials, for a restore that we never do.
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "inf")
# Tune would write five files for every trial while a worker waits. Only TensorBoard's is read, and a callback below writes it.
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
# Without this, Ray warns at every start on a machine without a GPU that it will hide GPUs from CPU actors differently.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.logger import TBXLoggerCallback
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from meme.errors import UserError, in_one_line
from meme.support.signals import terminate_on_sigterm
from meme_nas.engines.protocols import Source
from meme_nas.engines.ray_cluster import check_shared, join, printable_command
from meme_nas.record.tasks import Outcome, SearchFault, Task, attempt

LOOPBACK = "127.0.0.1"
DEATHS_ALLOWED = 1  # further tries of a trial whose worker dies
START_SECONDS = 60.0  # longest wait for a worker of its own; there may be no room left, for example after a node's death


class RayEngine:
    """Engine of ``workers`` actors that stay alive from trial to trial, each with ``cpus`` cores and a share of a GPU."""

    def __init__(
        self,
        workers: int,
        cpus: float,
        gpus: float,
        folder: Path,
        *,
        address: str | None = None,
        dashboard_host: str = LOOPBACK,
        inputs: Sequence[Path] = (),
    ):
        """Start Ray on this machine, or join the cluster at ``address``.

        Raises ``UserError`` if Ray does not start, or a node of the cluster does not see ``folder`` or one of ``inputs``.
        """
        self.workers, self.folder = workers, folder
        self.resources = {"cpu": cpus, "gpu": gpus} if gpus else {"cpu": cpus}
        dashboard = join(address) if address else start(max(1, round(workers * cpus)), dashboard_host)
        if address:
            check_shared(folder, inputs)
        self.dashboard = f"http://{dashboard}" if dashboard else None
        """Address of the dashboard; None if Ray could not start it."""
        self.asks_for_token = self.dashboard is not None and _asks_for_token(self.dashboard)
        """True if the dashboard requires the token that ``ray get-auth-token`` prints, as it does by default."""

    def run(self, search: Source, objective: Callable[[Task], Outcome], on_change: Callable[[], None]) -> None:
        """Run ``search`` to its end. ``on_change`` is called when trials start or end, and about once a second.

        Raises ``UserError`` for a fault that every trial would meet.
        """
        logging.getLogger("ray.tune").setLevel(logging.ERROR)
        storage = self.folder.absolute() / "ray"
        shutil.rmtree(storage / search.unit, ignore_errors=True)  # the search's logs stay beside the audit's
        searcher = StudySearcher(search)
        tuner = tune.Tuner(
            _trainable(objective, self.resources),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=_KeepsWorkers(self.workers),
                num_samples=-1,
                max_concurrent_trials=self.workers,
                reuse_actors=True,
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
            ),
            run_config=tune.RunConfig(
                name=search.unit,
                storage_path=str(storage),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=DEATHS_ALLOWED),
                checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
                callbacks=[_OnChange(on_change), TBXLoggerCallback()],
            ),
        )
        tuner.fit()
        if searcher.fault:
            raise UserError(searcher.fault)

    def close(self) -> None:
        ray.shutdown()


class _NotPickled:
    """Base class of objects whose contents are not pickled. Tune pickles a run's settings for a restore that we never do."""

    def __getstate__(self) -> dict:
        return {}


class StudySearcher(_NotPickled, Searcher):
    """Adapter of our search to Tune's interface of a searcher."""

    def __init__(self, search: Source):
        super().__init__(metric="fid", mode="min")
        self._search = search
        self._tasks: dict[str, Task] = {}
        self.fault: str | None = None
        """Sentence on a fault that every trial would meet; None without one. No further trials are started then."""

    def suggest(self, trial_id: str) -> dict | str | None:  # type: ignore[override]  # Ray's own forgets its FINISHED
        if self.fault:
            return Searcher.FINISHED
        task = self._search.next_task()
        if task is None:
            return Searcher.FINISHED if self._search.done else None
        self._tasks[trial_id] = task
        return {"task": task}

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        task = self._tasks.pop(trial_id)
        expected = {"number": task.number, "expert": task.expert, "rung": task.rung}
        if result and result.get("fault"):
            self.fault = result["fault"]  # the trial stays unrecorded, to be run again
        elif error or not result or any(result.get(name) != value for name, value in expected.items()):
            self._search.record(task.failed("its worker process died (killed, or out of memory)"))
        else:
            self._search.record(Outcome.from_dict(result))

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the study on disk is the record."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: the study on disk is the record."""


class _KeepsWorkers(_NotPickled, FIFOScheduler):
    """FIFO scheduler that keeps all workers alive and replaces dead ones.

    By default Tune keeps one idle actor and ends the others whenever the search waits for a result. A new actor takes about as
    long to start as a short trial, and Tune abandons it as soon as a running actor is free. One worker then does all the work.
    """

    def __init__(self, workers: int):
        super().__init__()
        self._workers = workers
        self._waiting_since: dict[str, float] = {}

    def on_trial_add(self, tune_controller, trial) -> None:
        if self._workers:
            tune_controller._actor_cache.increase_max(trial.placement_group_factory, by=self._workers)
            self._workers = 0

    def choose_trial_to_run(self, tune_controller) -> Trial | None:
        """Return a pending trial for which no worker is being started.

        The others wait for their workers. After ``START_SECONDS`` they may take any free worker.
        """
        waiting = [trial for trial in tune_controller.get_live_trials() if trial.status == Trial.PENDING]
        for trial in waiting:
            if trial in tune_controller._trial_to_actor:
                for_any_worker = tune_controller._resources_to_pending_trials[trial.placement_group_factory]
                since = self._waiting_since.setdefault(trial.trial_id, time.monotonic())
                if time.monotonic() < since + START_SECONDS:
                    for_any_worker.discard(trial)
                else:
                    for_any_worker.add(trial)
        return next((trial for trial in waiting if trial not in tune_controller._trial_to_actor), None)


class TrialActor(tune.Trainable):
    """Worker of the engine. A Tune trial is one step, which calls the objective once."""

    def setup(self, config: dict, objective: Callable[[Task], Outcome]) -> None:  # type: ignore[override]  # as with_parameters asks
        self._task, self._objective = config["task"], objective

    def reset_config(self, new_config: dict) -> bool:
        self._task = new_config["task"]
        return True

    def step(self) -> dict:
        # An actor runs many trials. These lines separate them in its log on the dashboard.
        print(f"trial {self._task.name}: begins", flush=True)
        try:
            result = attempt(self._objective, self._task).to_dict()
        except SearchFault as error:
            result = self._task.failed(str(error)).to_dict() | {"fault": str(error)}
        print(f"trial {self._task.name}: {_in_words(result)}", flush=True)
        return result | {"done": True}


def _trainable(objective: Callable[[Task], Outcome], resources: dict[str, float]) -> type[TrialActor]:
    trainable = tune.with_resources(tune.with_parameters(TrialActor, objective=objective), resources)
    trainable.__qualname__ = TrialActor.__qualname__  # the dashboard's name of the actor, which Tune's wrappers replace
    return trainable


def _in_words(result: dict) -> str:
    """Return the result of a trial as text for a log."""
    for key in ("fault", "failure"):
        if result.get(key):
            return str(result[key])
    scores = {key: result.get(key) for key in ("fid", "kid", "loss", "macs", "params")}
    return ", ".join(f"{key} {value:.6g}" for key, value in scores.items() if value is not None)


class _OnChange(_NotPickled, tune.Callback):
    def __init__(self, on_change: Callable[[], None]):
        self._on_change = on_change

    def on_step_end(self, iteration: int, trials: list, **info) -> None:
        self._on_change()


def start(cpus: int, dashboard_host: str) -> str | None:
    """Start Ray on this machine and return the address of its dashboard, or None.

    Raises ``UserError`` if Ray does not start, for example on a very busy machine.
    """
    try:
        with printable_command():
            context = ray.init(
                address="local",  # not a cluster that happens to run here
                num_cpus=cpus,
                include_dashboard=True,
                dashboard_host=dashboard_host,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except Exception as error:  # Ray raises a bare Exception
        raise UserError(f"engine: Ray does not start here ({in_one_line(error)}); try again, or take --engine local") from None
    terminate_on_sigterm()  # Ray replaces the handler of SIGTERM by one that ends this process without clean-up
    return context.dashboard_url


def token_command() -> str:
    """Return the shell command that prints the dashboard's token, with the ``ray`` of this Python."""
    beside = Path(sys.executable).parent / "ray"
    found = str(beside) if beside.is_file() else shutil.which("ray")
    return (
        shlex.join([found, "get-auth-token"])
        if found
        else shlex.join([sys.executable, "-m", "ray.scripts.scripts", "get-auth-token"])
    )


def _asks_for_token(dashboard: str) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy cannot reach this machine's loopback
    try:
        with direct.open(f"{dashboard}/api/version", timeout=5):
            return False
    except urllib.error.HTTPError as error:
        return error.code == 401
    except OSError:
        return False


def _trial_name(trial) -> str:
    return trial.config["task"].name
