"""Full training on Ray: experts side by side, several processes for one, deaths and ends on the way."""

import psutil
import pytest
import torch

from meme.checkpoint import load_tensors, read_header
from meme.errors import UserError
from meme.pipeline import open_reference, train
from meme.presets import preset
from meme.sharding import Shard
from meme.trainer import Progress
from meme_nas.settings import SearchSettings

ray = pytest.importorskip("ray", reason="Ray is not installed")

from meme_nas.engines.ray_training import RayTraining  # noqa: E402

HALVES = [{"interval": (0, 500), "p": 0.8}, {"interval": (500, 1000), "p": 0.5}]


def config_of(steps: int):
    config = preset("digits-iu-ldm-s")
    experts = [config.experts[0].model_dump() | half for half in HALVES]
    return config.with_(experts=experts, training={"steps": steps, "batch_size": 8})


def trained_here(steps: int, folder):
    config = config_of(steps)
    train(config, open_reference(config), folder=folder)
    return weights(folder)


def weights(folder) -> dict[str, torch.Tensor]:
    found = {n: load_tensors(folder / f"expert-{n}.safetensors") for n in (1, 2)}
    return {f"{number}.{name}": tensor for number, tensors in found.items() for name, tensor in tensors.items()}


def on_ray(steps: int, folder, on_progress=lambda progress: None, **options) -> None:
    config = config_of(steps)
    RayTraining(**options)(config, open_reference(config), folder=folder, on_progress=on_progress)


def test_experts_side_by_side_are_those_trained_in_turn_though_a_process_is_killed(tmp_path):
    killed, seen = [], set()

    def kill_once(progress: Progress) -> None:
        seen.add(progress.expert)
        if (tmp_path / "ray" / "expert-1.training.safetensors").exists() and not killed:
            workers = [each for each in psutil.Process().children(recursive=True) if "ray::expert-1" in " ".join(each.cmdline())]
            killed.extend(worker.pid for worker in workers)
            for worker in workers:
                worker.kill()

    on_ray(100, tmp_path / "ray", kill_once, checkpoint_seconds=0.0)
    assert len(killed) == 1 and seen == {1, 2}
    alone, found = trained_here(100, tmp_path / "alone"), weights(tmp_path / "ray")
    assert found.keys() == alone.keys() and all(torch.equal(found[name], alone[name]) for name in alone)
    left = {path.name for path in (tmp_path / "ray").iterdir()}
    assert left == {"config.yaml", "expert-1.safetensors", "expert-2.safetensors"}


def test_two_processes_of_one_expert_train_what_one_does_with_the_whole_batch(tmp_path):
    on_ray(30, tmp_path / "ray", workers_per_expert=2)
    alone, found = trained_here(30, tmp_path / "alone"), weights(tmp_path / "ray")
    assert found.keys() == alone.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5)


def interrupt(progress: Progress) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("workers", [1, 2])
def test_what_stops_the_command_leaves_checkpoints_and_the_same_call_goes_on(tmp_path, workers):
    with pytest.raises(KeyboardInterrupt):
        on_ray(400, tmp_path, interrupt, workers_per_expert=workers)
    states = {state: read_header(state)["step"] for state in tmp_path.glob("expert-*.training.safetensors")}
    assert states and all(0 < step < 400 for step in states.values())
    first = []

    def stop_again(progress: Progress) -> None:
        first.append(progress)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        on_ray(400, tmp_path, stop_again, workers_per_expert=workers)
    assert first[0].step > min(states.values())


def test_a_batch_that_can_not_be_dealt_out_evenly_is_refused():
    with pytest.raises(UserError, match=r"training.batch_size: 8 can't be dealt out evenly to 3 processes"):
        Shard(0, 3).check(8)


def test_processes_without_room_are_refused(tmp_path):
    with pytest.raises(UserError, match="workers_per_expert: 4 processes with 64 CPU each need more than the"):
        on_ray(30, tmp_path, workers_per_expert=4, cpus=64)


def test_several_processes_need_ray():
    with pytest.raises(UserError, match="workers_per_expert: must be 1 with engine local, not 2"):
        SearchSettings(engine="local", workers_per_expert=2)
