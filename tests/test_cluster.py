"""A search on a Ray cluster of several nodes, each of its own processes, all on this machine."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from meters import Measured
from toys import OnNode, visits

from meme.config.presets import preset
from meme.errors import UserError
from meme.pipeline import open_reference, train
from meme.scoring.cost import timed_network
from meme.support.devices import DeviceKind, device_kind
from meme.support.tensor_files import load_tensors
from meme.training.trainer import Progress
from meme_nas.engines.placement import room_for_trials, training_of
from meme_nas.record.study import Study, read_trials
from meme_nas.settings import SearchSettings
from meme_nas.strategies.joint import Joint
from meme_nas.worker.latency import LatencyMeter, LatencyRecord

ray = pytest.importorskip("ray", reason="Ray is not installed")

from ray.cluster_utils import Cluster  # noqa: E402

from meme_nas.engines import ray_cluster, ray_training  # noqa: E402
from meme_nas.engines.ray import RayEngine, TrialActor, _trainable  # noqa: E402
from meme_nas.engines.ray_training import RayTraining  # noqa: E402


@pytest.fixture(scope="module")
def cluster():
    """A head that runs no trials, and two nodes that run one at a time."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def engine(cluster, tmp_path):
    engine = RayEngine(2, cpus=1, gpus=0, folder=tmp_path, address=cluster.address)
    yield engine
    engine.close()


@pytest.mark.slow
def test_trials_run_on_every_node(engine, tmp_path):
    seen = tmp_path / "seen"
    seen.mkdir()
    settings = SearchSettings(strategy="joint", budget=8, study=tmp_path / "study")
    study = Study(tmp_path / "study", settings.in_force(), settings.objectives)
    engine.run(Joint(settings, study), OnNode(seen, 0.3, at_once=2), lambda: None)
    assert [trial.state for trial in study.trials] == ["complete"] * 8
    nodes = visits(seen)
    assert len(nodes) == 8 and all(len(attempts) == 1 for attempts in nodes.values())
    assert len({attempts[0] for attempts in nodes.values()}) == 2
    assert ray_cluster.room(1, 0) == 2 and ray_cluster.room(2, 0) == 0 and not ray_cluster.has_gpus()


@pytest.mark.slow
def test_a_node_killed_mid_trial_loses_only_the_trials_it_ran(cluster, engine, tmp_path):
    seen = tmp_path / "seen"
    seen.mkdir()
    cluster.add_node(num_cpus=1)  # so that two are left
    nodes = {node.all_processes["raylet"][0].process.pid: node for node in cluster.worker_nodes}
    settings = SearchSettings(strategy="joint", budget=8, study=tmp_path / "study")
    study = Study(tmp_path / "study", settings.in_force(), settings.objectives)
    killed, outcomes = [], {}

    def kill_once() -> None:
        """As soon as another trial is finished while the one that does not end holds its node."""
        stuck = visits(seen).get(1)
        finished = {trial.number: trial.outcome for trial in study.trials if trial.finished}
        if stuck and finished and not killed:
            killed.extend(stuck)
            outcomes.update(finished)
            cluster.remove_node(nodes[stuck[0]], allow_graceful=False)

    engine.run(Joint(settings, study), OnNode(seen, 0.3, stuck_once=1), kill_once)
    assert len(killed) == 1 and outcomes
    assert [trial.state for trial in study.trials] == ["complete"] * 8
    assert {number: study.trials[number].outcome for number in outcomes} == outcomes
    attempts = visits(seen)
    assert {number: len(nodes) for number, nodes in attempts.items()} == {number: 1 + (number == 1) for number in range(8)}
    assert attempts[1][1] != killed[0]
    deadline = time.monotonic() + 600
    while ray_cluster.room(1, 0) != 2 and time.monotonic() < deadline:  # Ray takes a while to see a death; the next test counts
        time.sleep(0.2)
    assert ray_cluster.room(1, 0) == 2


@pytest.mark.slow
def test_four_trials_share_the_cluster_s_one_gpu(cluster, tmp_path):
    """One that Ray only counts: what is tested is where trials run, and how many at a time."""
    node = cluster.add_node(num_cpus=6, num_gpus=1)
    raylet = node.all_processes["raylet"][0].process.pid
    seen = tmp_path / "seen"
    seen.mkdir()
    settings = SearchSettings(strategy="joint", budget=10, study=tmp_path / "study", proposal_lag=4, gpus_per_trial=0.25)
    settings = settings.model_copy(update={"ray_address": cluster.address})
    assert room_for_trials(settings) == 4
    engine = RayEngine(4, cpus=1, gpus=0.25, folder=tmp_path, address=cluster.address)
    study = Study(tmp_path / "study", settings.in_force(), settings.objectives)
    try:
        engine.run(Joint(settings, study), OnNode(seen, 0.3, at_once=4), lambda: None)
    finally:
        engine.close()
        cluster.remove_node(node)
    assert [trial.state for trial in study.trials] == ["complete"] * 10
    nodes = {place for places in visits(seen).values() for place in places}
    assert nodes == {raylet}
    stays = [(int(path.name.partition("-")[2]), path.stat().st_mtime_ns) for path in seen.iterdir()]
    assert max(sum(begun <= moment < ended for begun, ended in stays) for moment, _ in stays) == 4


@pytest.mark.slow
def test_the_winner_is_trained_on_every_node_and_goes_on_where_one_is_killed(cluster, tmp_path, monkeypatch):
    """Its experts, one on each node; they come out as in one process."""
    cluster.add_node(num_cpus=1)  # so that two are left
    config = preset("digits-iu-ldm-s").with_(training={"steps": 100, "batch_size": 8})
    expert = config.experts[0].model_dump()
    config = config.with_(experts=[expert | {"interval": (0, 500), "p": 0.8}, expert | {"interval": (500, 1000), "p": 0.5}])
    killed, nodes = [], {}
    monkeypatch.setattr(ray_training, "LOOK_EVERY_SECONDS", 0.05)  # so that an expert is met at work, however short that is

    def kill_once(progress: Progress) -> None:
        """The node of an expert that tells of itself while it trains, when both have been seen at work: one may end early."""
        at_work = {name: node for node in cluster.worker_nodes for name in _tasks_on(node)}
        if not killed:
            nodes.update(at_work)
            if len(nodes) == 2 and (node := at_work.get(f"expert-{progress.expert}")):
                killed.append(node)
                cluster.remove_node(node, allow_graceful=False)

    images = open_reference(config)
    training = RayTraining(address=cluster.address, checkpoint_seconds=0.0)
    training(config, images, folder=tmp_path / "cluster", on_progress=kill_once)
    train(config, images, folder=tmp_path / "alone")
    assert len(killed) == 1 and len(set(nodes.values())) == 2
    for number in (1, 2):
        found, alone = (load_tensors(tmp_path / folder / f"expert-{number}.safetensors") for folder in ("cluster", "alone"))
        assert found.keys() == alone.keys() and all(torch.equal(found[name], alone[name]) for name in alone)


def _tasks_on(node) -> list[str]:
    """Which experts a node trains just now, by the names of its processes."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    lines = map(_command_of, raylet.children(recursive=True))
    return [line.removeprefix("ray::").split()[0] for line in lines if line.startswith("ray::expert-")]


def _command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return ""


def search_command(cluster, folder: Path) -> tuple[list[str], dict[str, str]]:
    """What a user types to search on the cluster, and the environment for it."""
    root = Path(__file__).parent.parent
    command = [
        sys.executable,
        str(root / "run_search.py"),
        "--budget",
        "3",
        "--proxy-steps",
        "3",
        "--samples",
        "32",
        "--strategy",
        "joint",
        "--audit-factor",
        "0",
        "--trunk-share",
        "0.002",
        "--p-share",
        "0",
        "--confirm-share",
        "0",
    ]
    return [*command, "--ray-address", cluster.address, "--study", str(folder)], os.environ | {"PYTHONPATH": str(root)}


@pytest.mark.slow
def test_a_search_command_joins_the_cluster(cluster, tmp_path):
    command, surroundings = search_command(cluster, tmp_path / "study")
    done = subprocess.run(command, capture_output=True, text=True, env=surroundings, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 trials at a time on Ray" in done.stdout
    assert [trial.state for trial in read_trials(tmp_path / "study")] == ["complete"] * 3


@pytest.mark.slow
def test_a_search_with_a_limit_on_latency_measures_on_the_nodes(cluster, tmp_path):
    command, surroundings = search_command(cluster, tmp_path / "study")
    options = ["--objectives", "fid", "latency_ms", "--max-latency-ms", "1000"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=surroundings, check=False)
    assert done.returncode == 0, done.stderr
    trials, kind = read_trials(tmp_path / "study"), device_kind("cpu", 1)
    assert [trial.state for trial in trials] == ["complete"] * 3
    assert {trial.outcome.latency_device for trial in trials} == {kind.name}
    assert LatencyRecord(tmp_path / "study").device == kind


@ray.remote(num_cpus=1)
class Busy:
    def begun(self) -> bool:
        return True


@pytest.mark.slow
def test_latency_is_measured_on_a_node_though_trials_hold_all_of_it(cluster, tmp_path):
    ray_cluster.join(cluster.address)
    trials = [Busy.remote() for _ in range(int(ray.cluster_resources()["CPU"]))]
    assert all(ray.get([trial.begun.remote() for trial in trials], timeout=300))
    network, other = (timed_network(preset("digits-meme"), number, "cpu") for number in (1, 2))
    meter = LatencyMeter(tmp_path, "cpu", 1, Measured(tmp_path / "seen"))
    measuring = ray_cluster.MeasuringNode(meter, cluster.address, 1, lambda: 0, tmp_path, DeviceKind("cpu", "of no node"))
    try:
        assert measuring([network]) == [1.5]
        assert measuring.kind == device_kind("cpu", 1)
        ray.kill(measuring._actor)
        assert measuring([network, other]) == [1.5, 2.5]
    finally:
        measuring.close()
        ray.shutdown()
    first, second = Measured.seen(tmp_path / "seen")
    assert len({first["pid"], second["pid"], os.getpid()}) == 3


@pytest.mark.slow
def test_the_full_training_asks_the_cluster_for_its_gpus_after_the_search_has_left_it(cluster):
    assert not ray.is_initialized()
    training = training_of(SearchSettings(ray_address=cluster.address, cpus_per_trial=2))
    ray.shutdown()
    assert isinstance(training, RayTraining)
    assert (training.address, training.cpus, training.on_gpus) == (cluster.address, 2, False)


@pytest.mark.slow
def test_a_study_that_the_nodes_do_not_see_is_refused(cluster, tmp_path):
    """The command has a file system of its own in the place of the study's folder."""
    private = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {tmp_path} && exec "$@"', "sh"]
    if subprocess.run([*private, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    command, surroundings = search_command(cluster, tmp_path / "study")
    done = subprocess.run([*private, *command], capture_output=True, text=True, env=surroundings, check=False)
    assert done.returncode == 2, done.stderr
    assert f"error: study: {tmp_path}/study is not visible from the cluster's node" in done.stderr


@pytest.mark.slow
def test_inputs_that_a_node_lacks_are_refused(cluster, tmp_path):
    ray_cluster.join(cluster.address)
    with pytest.raises(UserError, match="data: /nowhere/images is not visible from the cluster's node"):
        ray_cluster.check_shared(tmp_path, [Path(__file__), Path("/nowhere/images")])
    assert list(tmp_path.iterdir()) == []
    ray.shutdown()


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("127.0.0.1:1", "no Ray cluster can be joined at 127.0.0.1:1"),
        ("nowhere", "must be host:port, or auto"),
        ("ray://127.0.0.1:10001", "must be host:port, or auto"),
        ("127.0.0.1:99999", "no Ray cluster can be joined"),
    ],
)
def test_no_cluster_at_the_address_is_said(address, sentence):
    with pytest.raises(UserError, match=f"ray_address: {sentence}"):
        ray_cluster.join(address)


def test_actors_have_a_name_of_ours():
    assert _trainable(len, {"cpu": 1}).__qualname__ == TrialActor.__qualname__ == "TrialActor"
