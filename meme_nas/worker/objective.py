"""Objective function of a search: train experts that the bank lacks, sample, score. It runs in a worker, one task at a time."""

import gc
import os
import shutil
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from meme.config.schema import Config
from meme.data.images import Images, TrainingData
from meme.diffusion.ensemble import Ensemble, OneAtATime
from meme.errors import UserError
from meme.network.unet import Denoiser
from meme.pipeline import OnMessage, Score, evaluate, open_reference, pick_device, training_data
from meme.scoring.features import FeatureSpace, choose_features
from meme.scoring.metrics import Metric
from meme.support.grids import save_grid
from meme.support.threads import threads
from meme.training.interval_loss import hold_out
from meme.training.trainer import Progress, expert_file
from meme_nas.record.folder import LOCK, trial_folder
from meme_nas.record.tasks import FINALIST, Outcome, SearchFault, Task
from meme_nas.worker.bank import Banked, ExpertBank
from meme_nas.worker.latency import LatencyMeter
from meme_nas.worker.progress import ProgressFile
from meme_nas.worker.shared_sampling import StateCache, draw_cascade

STATES = "states"


@dataclass(frozen=True)
class Basis:
    """Data and feature space that all trials of a study share."""

    images: Images
    """Reference images of the scores."""
    data: TrainingData
    """Training data of the experts: the images or their latents, without those held out."""
    held_out: TrainingData
    """Data on which interval losses are measured."""
    space: FeatureSpace

    @property
    def ids(self) -> "BasisIds":
        return BasisIds(self.data.content_id, self.space.feature_id)


@dataclass(frozen=True)
class BasisIds:
    """Ids of data and feature space, which must be equal for all scores of one study."""

    data: str
    features: str

    def check(self, found: "BasisIds") -> None:
        """Raise ``SearchFault`` if ``found``, a worker's ids, are different: its scores could not be compared with others."""
        if found.data != self.data:
            raise SearchFault("data: the images are not those that the search began with; restore them, or give another --study")
        if found.features != self.features:
            raise SearchFault(
                f"features: a worker's feature space is {found.features}, and the study's is {self.features}; "
                "name a folder that all machines share in MEME_CACHE"
            )


def open_basis(
    config: Config,
    device: str,
    inception_weights: Path | None,
    *,
    strict: bool = False,
    fresh: bool = False,
    on_message: OnMessage = lambda message: None,
) -> Basis:
    """Open a study's data and feature space. Raises ``UserError`` if they cannot be used."""
    images = open_reference(config, strict=strict, fresh=fresh, on_message=on_message)
    chosen = pick_device(device)
    kind = config.evaluation.features
    space = choose_features(kind, images, inception_weights=inception_weights, device=chosen, on_message=on_message)
    return Basis(images, *hold_out(training_data(config, images, chosen, on_message)), space)


class _Loaded:
    """Cache of the networks used last, up to ``MOST_PARAMS`` parameters."""

    MOST_PARAMS = 2**26  # 256 MiB

    def __init__(self):
        self._held: OrderedDict[tuple[str, int], tuple[int, Denoiser]] = OrderedDict()

    def get(self, banked: Banked, load: Callable[[], Denoiser]) -> Denoiser:
        key = banked.id, banked.steps
        if key not in self._held:
            while self._held and sum(params for params, _ in self._held.values()) + banked.params > self.MOST_PARAMS:
                self._held.popitem(last=False)
            self._held[key] = banked.params, load()
        self._held.move_to_end(key)
        return self._held[key][1]


_loaded = _Loaded()
_opened: dict[tuple, tuple[Basis, ExpertBank]] = {}  # by this worker process, which serves one study at a time


@dataclass(frozen=True)
class Objective:
    """Function from a task to its outcome: train missing experts and score the config. Errors are raised, not recorded."""

    folder: Path
    """Folder of the study. A trial writes its weights and samples to ``trials/NNN``."""
    bank: Path
    device: str = "auto"
    threads: int = 1
    inception_weights: Path | None = None
    metric: Metric = "fid"
    bank_gib: float | None = None
    data: str | None = None
    """Current path of the images, which may have moved since the study began; None: the path in each task's config."""
    follow_links: bool = False
    """Follow links that lead out of ``data``."""
    expected: BasisIds | None = None
    """Ids that the driver found, to compare with the worker's; None: no comparison."""

    def __call__(self, task: Task) -> Outcome:
        if self.data:
            task = replace(task, config=task.config.with_(data=self.data, follow_links=self.follow_links))
        try:
            with threads(self.threads):
                return self._train_expert(task) if task.expert else self._train_and_score(task)
        except BaseException:
            gc.collect()  # after an out-of-memory failure, free this trial's memory for the next one
            raise
        finally:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _train_expert(self, task: Task) -> Outcome:
        """Train one expert with every seed."""
        _, bank = self._open(task.config)
        begun_at, begun, passes = time.time(), time.perf_counter(), bank.passes
        folder = trial_folder(self.folder, task.number, task.kind, task.rung)
        progress = ProgressFile(folder.parent / f"expert{task.expert}-{folder.name}", len(task.seeds))
        found = [
            self._obtain(bank, task.config, task.expert, seed, place, progress) for place, seed in enumerate(task.seeds, start=1)
        ]
        progress.remove()
        return Outcome(
            task.number,
            task.expert,
            loss=statistics.fmean(banked.loss for banked in found),
            loss_error=statistics.fmean(banked.loss_error for banked in found),
            macs=found[0].macs,
            params=found[0].params,
            steps=task.config.training.steps,
            begun_at=begun_at,
            training_seconds=time.perf_counter() - begun,
            training_passes=bank.passes - passes,
            scoring_passes=0,
        )

    def _train_and_score(self, task: Task) -> Outcome:
        basis, bank = self._open(task.config)
        folder, count = trial_folder(self.folder, task.number, task.kind, task.rung), len(task.config.experts)
        begun_at, begun, passes = time.time(), time.perf_counter(), bank.passes
        progress = ProgressFile(folder, count * len(task.seeds))
        banked: list[list[Banked]] = []
        for seed in task.seeds:
            done = count * len(banked)
            banked.append([self._obtain(bank, task.config, n, seed, done + n, progress) for n in range(1, count + 1)])
        training_seconds = time.perf_counter() - begun
        scores = [self._score(task, seed, found, basis, bank) for seed, found in zip(task.seeds, banked, strict=True)]
        if not task.rung and task.kind != FINALIST:  # the files of the others are never read
            keep_ensemble(folder, _seeded(task.config, task.seeds[0]), banked[0], bank)
            save_grid(folder / "samples.png", scores[0].grid)
        progress.remove()
        outcome = outcome_of(task, scores, begun_at, training_seconds)
        meter = LatencyMeter(self.folder, self.device, self.threads)
        return replace(
            outcome,
            latency_ms=meter.ensemble_ms(task.config),
            latency_device=meter.kind.name,
            training_passes=bank.passes - passes,
        )

    def _obtain(self, bank: ExpertBank, config: Config, number: int, seed: int, place: int, progress: ProgressFile) -> Banked:
        def report(now: Progress) -> None:
            progress.report(place, now.step, now.steps)

        return bank.obtain(_seeded(config, seed), number, pick_device(self.device), report)

    def _score(self, task: Task, seed: int, found: Sequence[Banked], basis: Basis, bank: ExpertBank) -> Score:
        config, device = _seeded(task.config, seed), pick_device(self.device)

        def load(number: int) -> Denoiser:
            banked = found[number - 1]
            return _loaded.get(banked, lambda: bank.load(config, number, banked, device))

        ensemble = Ensemble(config, OneAtATime(len(found), load))  # experts whose states are cached are not loaded
        batches = None
        if task.kind != FINALIST:  # no other cascade shares a finalist's noise
            ids = [f"{banked.id}-{banked.steps}" for banked in found]
            batches = draw_cascade(ensemble, ids, config.evaluation.seed, StateCache(self.folder / STATES), device)
        return evaluate(ensemble, basis.images, basis.space, metrics=(self.metric,), device=device, batches=batches)

    def _open(self, config: Config) -> tuple[Basis, ExpertBank]:
        data = (config.data, config.pixels, config.first_stage, config.training.flip, config.network.classes)
        key = (*data, config.evaluation.features, self.bank)
        if key not in _opened:
            _opened.clear()
            try:
                basis = open_basis(config, self.device, self.inception_weights)
                if self.expected:
                    self.expected.check(basis.ids)
                _opened[key] = basis, ExpertBank(self.bank, basis.data, basis.held_out, self.bank_gib, self.folder / LOCK)
            except UserError as error:  # moved or changed data, or a cache that cannot be written: not the candidate's fault
                raise SearchFault(str(error)) from None
        return _opened[key]


def keep_ensemble(folder: Path, config: Config, banked: Sequence[Banked], bank: ExpertBank) -> None:
    """Write a trained ensemble to ``folder``. Its weights are hard links into the bank, or copies if links are impossible."""
    config.save(folder / "config.yaml")
    for number, found in enumerate(banked, start=1):
        target = expert_file(folder, number)
        target.unlink(missing_ok=True)
        try:
            os.link(bank.weights(found), target)
        except OSError:  # another file system, or one without links
            shutil.copyfile(bank.weights(found), target)


def restore_ensemble(folder: Path, bank: ExpertBank, device: torch.device | str = "cpu") -> None:
    """Restore the deleted weights of a trial from the bank, which trains experts that it lacks."""
    config = Config.load(folder / "config.yaml")
    numbers = range(1, len(config.experts) + 1)
    if not all(expert_file(folder, number).is_file() for number in numbers):
        keep_ensemble(folder, config, [bank.obtain(config, number, device) for number in numbers], bank)


def _seeded(config: Config, seed: int) -> Config:
    return config.with_(training={"seed": seed})


def outcome_of(task: Task, scores: Sequence[Score], begun_at: float, training_seconds: float) -> Outcome:
    """Return the outcome of ``task`` from ``scores``, one for each training seed. It has no latency yet."""
    measured = {name: [score.measured[name].value for score in scores] for name in scores[0].measured}
    return Outcome(
        task.number,
        fid=statistics.fmean(measured["fid"]) if "fid" in measured else None,
        fids=tuple(next(iter(measured.values()))),
        kid=statistics.fmean(measured["kid"]) if "kid" in measured else None,
        macs=scores[0].macs,
        params=scores[0].params,
        features=scores[0].features,
        steps=task.config.training.steps,
        begun_at=begun_at,
        training_seconds=training_seconds,
        sampling_seconds=sum(score.sampling_seconds for score in scores),
        scoring_seconds=sum(score.scoring_seconds for score in scores),
        scoring_passes=sum(score.passes for score in scores),
    )
