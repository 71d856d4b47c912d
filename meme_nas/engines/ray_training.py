"""Full training of an ensemble on Ray, experts side by side, each by one process or by several of Ray Train.

A checkpoint in the ensemble's folder is the only state of a training. So it resumes in the same way after the death of a process,
the loss of a node or the end of the command. On a CPU, one process trains the same weights as ``meme.pipeline.train``, bit for
bit if both have the same number of threads.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

# Ray Train would change the working directory to its run's folder, which would break relative paths.
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")

import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer

from meme.config.schema import Config
from meme.data.images import TrainingData
from meme.diffusion.ensemble import Ensemble
from meme.errors import TrainingDiverged, UserError, in_one_line
from meme.network.pretrained import identified
from meme.pipeline import OnMessage, claim_folder, load_ensemble, open_reference, training_data, with_scale
from meme.support.files import write_text
from meme.training.distributed import WHOLE, Shard
from meme.training.trainer import TRUNK, OnProgress, Progress, train_expert, train_trunk
from meme_nas.engines.ray import LOOPBACK, start
from meme_nas.engines.ray_cluster import check_shared, join

DEATHS_ALLOWED = 3  # deaths of an expert's processes after which its training resumes from the checkpoint
LOOK_EVERY_SECONDS = 0.5
_STOP, RUNS = ".stop", "ray"


class Stopped(RuntimeError):
    """Raised in a training whose command is ending."""


@dataclass(frozen=True)
class RayTraining:
    """Function with the arguments and the effect of ``meme.pipeline.train`` with a folder, which trains on Ray."""

    cpus: int = 1
    """Cores of a process, which is also its number of threads."""
    on_gpus: bool = False
    """Give every process a GPU of its own."""
    workers_per_expert: int = 1
    address: str | None = None
    """Address of a cluster to join; None: Ray is started on this machine."""
    dashboard_host: str = LOOPBACK
    inputs: Sequence[Path] = ()
    """Files outside the folder that every node must see."""
    on_message: OnMessage = print
    checkpoint_seconds: float = 60.0

    def __call__(
        self,
        config: Config,
        data: TrainingData,
        *,
        folder: Path,
        device: torch.device | str = "cpu",
        on_progress: OnProgress = lambda progress: None,
    ) -> Ensemble:
        """Train the ensemble in ``folder`` and return it on ``device``.

        Raises the errors of ``meme.pipeline.train``, and ``UserError`` if there is no room for one expert.
        """
        Shard(0, self.workers_per_expert).check(config.training.batch_size)
        config = identified(with_scale(config, data))
        with claim_folder(folder, config):
            self._connect(folder)
            try:
                self._train(folder.absolute(), config, data.content_id, on_progress)
            finally:
                ray.shutdown()
        return load_ensemble(folder, device)

    def _connect(self, folder: Path) -> None:
        if self.address:
            join(self.address)
            check_shared(folder, self.inputs)
        else:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            start(cores, self.dashboard_host)

    def _train(self, folder: Path, config: Config, content_id: str, on_progress: OnProgress) -> None:
        """Train the trunk, if there is one, then all experts, as many at a time as the cluster holds."""
        numbers = range(1, len(config.experts) + 1)
        room = min(len(numbers), self._room())
        processes = f", {self.workers_per_expert} processes each" if self.workers_per_expert > 1 else ""
        self.on_message(f"training {room} experts at a time on Ray{processes}")
        if config.training.trunk_steps:
            self._train_side_by_side(folder, config, content_id, [TRUNK], on_progress)
        self._train_side_by_side(folder, config, content_id, numbers, on_progress)

    def _train_side_by_side(
        self, folder: Path, config: Config, content_id: str, numbers: Sequence[int], on_progress: OnProgress
    ) -> None:
        """Train the networks ``numbers``, as many at a time as the cluster holds."""
        room = min(len(numbers), self._room())
        (folder / _STOP).unlink(missing_ok=True)
        one = self._by_one if self.workers_per_expert == 1 else self._by_several
        pool = ThreadPoolExecutor(room)
        work = {number: pool.submit(one, self._work(folder, config, number, content_id)) for number in numbers}
        try:
            _watch(work.values(), partial(_tell, folder, numbers, on_progress))
        except BaseException:  # also Ctrl-C
            write_text(folder / _STOP, "")  # each training reads this at its next report, saves its checkpoint and stops
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            for number in numbers:
                _progress_file(folder, number).unlink(missing_ok=True)
            (folder / _STOP).unlink(missing_ok=True)
            shutil.rmtree(folder / RUNS, ignore_errors=True)

    def _room(self) -> int:
        """Return the number of experts that the cluster holds at a time. Raises ``UserError`` if it is 0."""
        there, wanted = ray.cluster_resources(), self._resources()
        room = min(int(there.get(name, 0) / (each * self.workers_per_expert)) for name, each in wanted.items())
        if room < 1:
            each = " and ".join(f"{count} {name}" for name, count in wanted.items())
            found = " and ".join(f"{there.get(name, 0):g} {name}" for name in wanted)
            raise UserError(
                f"workers_per_expert: {self.workers_per_expert} processes with {each} each need more than the {found} there are"
            )
        return room

    def _resources(self) -> dict[str, int]:
        return {"CPU": self.cpus, "GPU": 1} if self.on_gpus else {"CPU": self.cpus}

    def _work(self, folder: Path, config: Config, number: int, content_id: str) -> "_Work":
        device = "cuda" if self.on_gpus else "cpu"
        return _Work(
            folder, json.dumps(config.model_dump(mode="json")), number, content_id, device, self.cpus, self.checkpoint_seconds
        )

    def _by_one(self, work: "_Work") -> None:
        """Train in one Ray task, which Ray restarts if its process or node dies."""
        resources = {"num_cpus": self.cpus, "num_gpus": int(self.on_gpus)}
        task = _task.options(**resources, max_retries=DEATHS_ALLOWED, name=f"expert-{work.number} of {work.settings.name}")
        try:
            ray.get(task.remote(work))
        except ray.exceptions.RayTaskError as error:
            raise _ours(error.cause) from None
        except ray.exceptions.RayError as error:
            raise UserError(f"expert {work.number}: its process died {DEATHS_ALLOWED + 1} times ({in_one_line(error)})") from None

    def _by_several(self, work: "_Work") -> None:
        """Train in a group of processes, which Ray Train restarts as a whole if one dies."""
        trainer = TorchTrainer(
            _in_group,
            train_loop_config={"work": work},
            scaling_config=ray.train.ScalingConfig(
                num_workers=self.workers_per_expert, use_gpu=self.on_gpus, resources_per_worker=self._resources()
            ),
            run_config=ray.train.RunConfig(
                name=f"expert-{work.number}",
                storage_path=str(work.folder / RUNS),
                failure_config=ray.train.FailureConfig(max_failures=DEATHS_ALLOWED),
                logging_config=ray.train.LoggingConfig(log_level="ERROR"),  # type: ignore[call-arg]  # stubs are of Train's v1
            ),
        )
        try:
            trainer.fit()
        except ray.train.WorkerGroupError as error:
            raise _ours(next(iter(error.worker_failures.values()), error)) from None
        except ray.train.TrainingFailedError as error:
            raise UserError(f"expert {work.number}: Ray Train gave up ({in_one_line(error)})") from None


@dataclass(frozen=True)
class _Work:
    """Training of one expert or the trunk, as sent to a node."""

    folder: Path
    config: str
    number: int
    content_id: str
    """Content id of the data that the command has opened."""
    device: str
    threads: int
    checkpoint_seconds: float

    def run(self, shard: Shard) -> None:
        torch.set_num_threads(self.threads)
        config = self.settings
        data = training_data(config, open_reference(config), self.device)
        if data.content_id != self.content_id:
            raise UserError("data: the images are not those that the training began with; restore them, or give another folder")
        options: dict[str, Any] = {
            "folder": self.folder,
            "device": self.device,
            "on_progress": self._report,
            "checkpoint_seconds": self.checkpoint_seconds,
            "shard": shard,
        }
        if self.number == TRUNK:
            train_trunk(config, data, **options)
        else:
            train_expert(config, self.number, data, **options)

    @property
    def settings(self) -> Config:
        return Config.model_validate(json.loads(self.config))

    def _report(self, progress: Progress) -> None:
        write_text(_progress_file(self.folder, self.number), json.dumps(asdict(progress)))
        if self.is_to_stop:
            raise Stopped

    @property
    def is_to_stop(self) -> bool:
        return (self.folder / _STOP).exists()


@ray.remote
def _task(work: _Work) -> None:
    work.run(WHOLE)


def _in_group(config: dict) -> None:
    """Train in one process of a group.

    Ray Train restarts the group after a process has stopped. The processes agree on whether to stop, so that all do or none.
    """
    work, shard = config["work"], Shard.of_this_process()
    if shard.mean(torch.tensor(float(work.is_to_stop), device=work.device)) == 0:
        work.run(shard)


def _watch(work: Iterable[Future], look: Callable[[], None]) -> None:
    """Wait for all of ``work``, and call ``look`` regularly. Raises the first failure."""
    left = set(work)
    while left:
        done, left = wait(left, timeout=LOOK_EVERY_SECONDS, return_when=FIRST_EXCEPTION)
        look()
        for future in done:
            future.result()


def _tell(folder: Path, numbers: Iterable[int], on_progress: OnProgress) -> None:
    """Report the progress of each expert from the file that its process writes."""
    for number in numbers:
        try:
            on_progress(Progress(**json.loads(_progress_file(folder, number).read_text())))
        except (OSError, ValueError, TypeError):  # not begun
            continue


def _progress_file(folder: Path, number: int) -> Path:
    return folder / f".expert-{number}.progress.json"


def _ours(error: BaseException) -> BaseException:
    """Return the error of a training in the form that ``meme.pipeline.train`` would raise."""
    if isinstance(error, (UserError, TrainingDiverged, OSError, Stopped)):
        return error
    return RuntimeError(f"{type(error).__name__}: {in_one_line(error)}")
