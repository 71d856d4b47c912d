"""Full training on Ray: experts side by side, several processes for one, deaths and ends on the way."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

import psutil
import pytest
import torch

from meme.config.presets import preset
from meme.config.schema import Config
from meme.errors import UserError
from meme.pipeline import open_reference, train
from meme.support.tensor_files import load_tensors, read_header
from meme.training.distributed import Shard
from meme.training.trainer import Progress, starting_expert
from meme_nas.settings import SearchSettings

ray = pytest.importorskip("ray", reason="Ray is not installed")

from meme_nas.engines import ray_training  # noqa: E402
from meme_nas.engines.ray_training import RayTraining  # noqa: E402

T = TypeVar("T")
STEPS = 100
ALONE = preset("digits-iu-ldm-s").with_(training={"steps": STEPS, "batch_size": 8})
_EXPERT = ALONE.experts[0].model_dump()
HALVES = [_EXPERT | {"interval": (0, 500), "p": 0.8}, _EXPERT | {"interval": (500, 1000), "p": 0.5}]
PAIR = ALONE.with_(experts=HALVES)


def trained_here(config: Config, folder: Path) -> list[dict[str, torch.Tensor]]:
    train(config, open_reference(config), folder=folder)
    return weights(config, folder)


def trained_on_ray(config: Config, folder: Path, while_it_goes_on: Callable[[], object] = lambda: None, **options) -> None:
    """Train in two calls. Ctrl-C ends the first; ``while_it_goes_on`` runs beside the second.

    A checkpoint at every step leaves time for both. Ctrl-C comes with the first report, at a quarter of the steps, and an expert
    stops with its next one: on a busy machine the rest would not last until the driver's usual look at the reports.
    """
    images, options = open_reference(config), options | {"checkpoint_seconds": 0.0}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ray_training, "LOOK_EVERY_SECONDS", 0.02)
        RayTraining(**options)(config, images, folder=folder, on_progress=interrupt)
    states = [read_header(state)["step"] for state in folder.glob("expert-*.training.safetensors")]
    assert states and all(0 < step < STEPS for step in states)
    with ThreadPoolExecutor(1) as beside:
        done = beside.submit(while_it_goes_on)
        RayTraining(**options)(config, images, folder=folder)
    done.result()


def kill_expert_1(folder: Path) -> None:
    """Kill the process that trains expert 1 when it has gone on by at least one step.

    Progress is too coarse to wait for: it comes every 25 steps, and what is left may be less.
    """
    state = folder / "expert-1.training.safetensors"
    begun_at = step_of(state)
    worker, *_ = wait_for(lambda: [each for each in psutil.Process().children(recursive=True) if is_of_expert_1(each)])
    assert wait_for(lambda: begun_at < step_of(state)) and step_of(state) < STEPS
    worker.kill()


def step_of(state: Path) -> int:
    """Return the step of a saved training; 0 in the moment when a new state takes the place of the old one."""
    try:
        return int(read_header(state)["step"])
    except UserError:
        return 0


def is_of_expert_1(process: psutil.Process) -> bool:
    try:
        return "ray::expert-1" in " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return False


def wait_for(look: Callable[[], T], seconds: float = 600.0) -> T:
    """Return what ``look`` returns as soon as it is true."""
    until = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.002)
    return found


def interrupt(progress: Progress) -> None:
    raise KeyboardInterrupt


def weights(config: Config, folder: Path) -> list[dict[str, torch.Tensor]]:
    return [load_tensors(folder / f"expert-{number}.safetensors") for number in range(1, len(config.experts) + 1)]


@pytest.mark.slow
def test_experts_side_by_side_are_those_trained_in_turn_though_the_command_is_stopped_and_a_process_killed(tmp_path):
    trained_on_ray(PAIR, tmp_path / "ray", while_it_goes_on=partial(kill_expert_1, tmp_path / "ray"))
    for found, alone in zip(weights(PAIR, tmp_path / "ray"), trained_here(PAIR, tmp_path / "alone"), strict=True):
        assert found.keys() == alone.keys() and all(torch.equal(found[name], alone[name]) for name in alone)
    left = {path.name for path in (tmp_path / "ray").iterdir() if not path.name.startswith(".")}
    kinds = ("safetensors", "training.safetensors")  # the state, to go on from with more steps
    assert left == {"config.yaml", *(f"expert-{number}.{kind}" for number in (1, 2) for kind in kinds)}


@pytest.mark.slow
def test_the_trunk_is_trained_before_the_experts_that_start_from_it(tmp_path):
    config = PAIR.with_(training={"steps": 4, "trunk_steps": 4})
    RayTraining()(config, open_reference(config), folder=tmp_path / "ray")
    for found, alone in zip(weights(config, tmp_path / "ray"), trained_here(config, tmp_path / "alone"), strict=True):
        assert all(torch.equal(found[name], alone[name]) for name in alone)
    assert read_header(tmp_path / "ray" / "trunk.safetensors")["step"] == 4


@pytest.mark.slow
def test_two_processes_train_what_one_does_with_the_whole_batch_though_the_command_is_stopped(tmp_path):
    trained_on_ray(ALONE, tmp_path / "ray", workers_per_expert=2)
    [found], [alone] = weights(ALONE, tmp_path / "ray"), trained_here(ALONE, tmp_path / "alone")
    untrained = starting_expert(ALONE, 1).state_dict()
    assert found.keys() == alone.keys()
    assert distance(found, alone) < 1e-3 * distance(untrained, alone)


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    return sum(float((first[name] - second[name]).square().sum()) for name in second) ** 0.5


def test_a_batch_that_can_not_be_dealt_out_evenly_is_refused():
    with pytest.raises(UserError, match=r"training.batch_size: 8 can't be dealt out evenly to 3 processes"):
        Shard(0, 3).check(8)


def test_several_processes_need_ray():
    with pytest.raises(ValueError, match="workers_per_expert: must be 1 with engine local, not 2"):
        SearchSettings(engine="local", workers_per_expert=2)
