"""Latency: measured once for each network and kind of device, in a process like a trial's, and the same number everywhere."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from meters import Measured
from searches import record_of_choices
from toys import score

from meme.config.presets import preset
from meme.errors import UserError
from meme.scoring.cost import TimedNetwork, measure_pass_ms, passes_of, timed_network
from meme.support.devices import DeviceKind, device_kind
from meme_nas.engines.measuring import MeasuringProcess
from meme_nas.record.storage import mend, place_of
from meme_nas.record.study import Study
from meme_nas.record.tasks import Outcome, SearchFault, Task, attempt
from meme_nas.results import Kept
from meme_nas.run import _latency_of_trials
from meme_nas.settings import SearchSettings
from meme_nas.strategies.joint import Joint
from meme_nas.strategies.rungs import factorised
from meme_nas.surrogate.costs import Costs
from meme_nas.worker.latency import LatencyMeter, LatencyRecord, RecordedLatency
from meme_nas.worker.objective import Objective
from search_spaces.domain import Choices
from search_spaces.space import build_space

TESTS = Path(__file__).parent
BASE = preset("digits-meme")
NETWORK = timed_network(BASE, 1, "cpu")
CPU = DeviceKind("cpu", "A CPU, 1 thread")


class Unsteady:
    """A measurement whose values change at every call: about as long as there is attention, and what it was asked before."""

    def __init__(self, first: int = 0):
        self.networks: list[TimedNetwork] = []
        self._first = first

    def __call__(self, timed: TimedNetwork, device: torch.device) -> float:
        self.networks.append(timed)
        noise = (self._first + 7 * len(self.networks)) % 11
        return 0.1 + 0.001 * sum(timed.expert.low_channels) + 0.001 * noise


def latency_in(folder: Path, measure=measure_pass_ms) -> RecordedLatency:
    """As a command that has just begun has it, measured in this process."""
    return RecordedLatency(LatencyRecord(folder), LatencyMeter(folder, "cpu", 1, measure))


# The record


def test_the_first_value_stands(tmp_path):
    record = LatencyRecord(tmp_path)
    assert record.find(NETWORK, CPU) is None
    assert [record.keep(NETWORK, CPU, value) for value in (1.5, 2.5)] == [1.5, 1.5]
    assert LatencyRecord(tmp_path).find(NETWORK, CPU) == 1.5


@pytest.mark.parametrize(
    "other",
    [
        (timed_network(BASE, 2, "cpu"), CPU),
        (replace(NETWORK, images=NETWORK.images - 1), CPU),
        (replace(NETWORK, precision="bf16"), CPU),
        (replace(NETWORK, image=NETWORK.image.model_copy(update={"size": 16})), CPU),
        (replace(NETWORK, network=NETWORK.network.model_copy(update={"dropout": 0.25})), CPU),
        (NETWORK, DeviceKind("cpu", "A CPU, 2 threads")),
        (NETWORK, DeviceKind("cuda", "A CPU, 1 thread")),
    ],
    ids=["expert", "images", "precision", "image", "network", "threads", "type"],
)
def test_all_that_determines_a_latency_is_part_of_its_key(tmp_path, other):
    record = LatencyRecord(tmp_path)
    record.keep(NETWORK, CPU, 1.5)
    assert record.find(*other) is None
    assert record.keep(*other, 2.5) == 2.5
    assert record.find(NETWORK, CPU) == 1.5


def test_interval_and_p_change_no_latency():
    first, *others = BASE.experts
    other = BASE.with_(experts=[first.model_copy(update={"p": 0.3}), *others])
    assert timed_network(other, 1, "cpu") == NETWORK


def damaged(content: str, key: str, value: object) -> str:
    return json.dumps(json.loads(content) | {key: value})


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: "",
        lambda content: content[: len(content) // 2],
        lambda content: "[" * 100_000,
        lambda content: "[1.5]",
        lambda content: '{"pass_ms": 1.5}',
        lambda content: damaged(content, "pass_ms", float("nan")),
        lambda content: damaged(content, "pass_ms", -1.5),
        lambda content: damaged(content, "pass_ms", "1.5"),
        lambda content: damaged(content, "images", 1),
        lambda content: damaged(content, "device", None),
        lambda content: b"\xff\xfe",
    ],
    ids=["empty", "half", "deep", "list", "no facts", "nan", "negative", "text", "other facts", "no device", "binary"],
)
def test_a_damaged_file_is_measured_again_and_replaced(tmp_path, damage):
    meter = LatencyMeter(tmp_path, "cpu", 1, lambda timed, device: 1.5)
    assert meter([NETWORK]) == [1.5]
    (path,) = (tmp_path / "latency").glob("*.json")
    content = damage(path.read_text())
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    again = LatencyMeter(tmp_path, "cpu", 1, lambda timed, device: 2.5)
    assert again([NETWORK]) == [2.5]
    assert meter([NETWORK]) == [2.5]


def test_two_that_measure_at_the_same_time_have_one_value(tmp_path):
    together, found = threading.Barrier(2), {}

    def measure_for(value):
        def measure(timed, device):
            together.wait(timeout=60)  # neither has recorded when both have measured
            return value

        found[value] = LatencyMeter(tmp_path, "cpu", 1, measure)([NETWORK])[0]

    both = [threading.Thread(target=measure_for, args=(value,)) for value in (1.5, 2.5)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert set(found) == {1.5, 2.5} and len({*found.values()}) == 1
    assert LatencyRecord(tmp_path).find(NETWORK, device_kind("cpu", 1)) == found[1.5]


def test_a_folder_that_cannot_be_written_ends_the_search(tmp_path):
    (tmp_path / "latency").write_text("a file of the user")
    with pytest.raises(SearchFault, match=r"latency: .* can't be written"):
        attempt(lambda task: LatencyRecord(tmp_path).keep(NETWORK, CPU, 1.5), Task(0, BASE, "candidate"))


def test_what_a_kill_left_half_written_is_removed_and_the_rest_stays(tmp_path):
    LatencyRecord(tmp_path).keep(NETWORK, CPU, 1.5)
    (whole,) = (tmp_path / "latency").glob("*.json")
    (tmp_path / "latency" / f".{whole.name}.abcd1234.part").write_text("{")
    (tmp_path / "latency" / ".notes.abcd1234.part").write_text("of the user")
    mend(place_of(tmp_path))
    assert [path.name for path in (tmp_path / "latency").glob(".*.part")] == [".notes.abcd1234.part"]
    assert LatencyRecord(tmp_path).find(NETWORK, CPU) == 1.5


def test_the_kind_of_a_cpu_has_its_threads(monkeypatch):
    one, two = device_kind("cpu", 1), device_kind("cpu", 2)
    assert one.type == two.type == "cpu"
    assert one.name.removesuffix(", 1 thread") == two.name.removesuffix(", 2 threads") != ""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert device_kind("cuda:1", 2) == DeviceKind("cuda", "GPU 1")


def test_a_gpu_is_timed_with_whole_batches_and_in_its_own_precision():
    config = BASE.with_(sampling={"batch_size": 250})
    cpu, gpu = timed_network(config, 1, "cpu"), timed_network(config, 1, "cuda")
    assert (cpu.images, cpu.precision) == (64, "fp32")
    assert (gpu.images, gpu.precision) == (250, "bf16")


# The process that measures


def test_it_is_not_the_driver_has_a_trials_surroundings_and_starts_again_where_it_died(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    meter, before = LatencyMeter(tmp_path, "cpu", 2, Measured(tmp_path / "seen", deaths=1)), psutil.Process().children()
    measuring = MeasuringProcess(meter, gpus=2, niceness=3)
    try:
        assert measuring.kind == device_kind("cpu", 2) and psutil.Process().children() == before
        assert measuring([NETWORK]) == [1.5]
        assert measuring([NETWORK, timed_network(BASE, 2, "cpu")]) == [1.5, 2.5]
    finally:
        measuring.close()
    died, *seen = Measured.seen(tmp_path / "seen")
    assert len(seen) == 2 and seen[0]["pid"] == seen[1]["pid"]
    assert len({died["pid"], seen[0]["pid"], os.getpid()}) == 3
    niceness = min(19, os.nice(0) + 3)
    assert all((each["threads"], each["nice"], each["gpus"]) == (2, niceness, "5") for each in (died, *seen))


@pytest.mark.slow
def test_what_kills_its_process_again_and_again_is_said_in_a_sentence(tmp_path):
    measuring = MeasuringProcess(LatencyMeter(tmp_path, "cpu", 1, Measured(tmp_path / "seen", deaths=9)))
    with pytest.raises(UserError, match="latency_ms: the process that measures it died 2 times"):
        measuring([NETWORK])


@pytest.mark.slow
def test_it_ends_with_the_driver(tmp_path):
    script = tmp_path / "driver.py"
    script.write_text(
        "import sys, time\nfrom pathlib import Path\nfrom test_latency import *\n"
        "if __name__ == '__main__':\n"
        "    folder = Path(sys.argv[1])\n"
        "    MeasuringProcess(LatencyMeter(folder, 'cpu', 1, Measured(folder / 'seen')))([NETWORK])\n"
        "    time.sleep(600)\n"
    )
    driver = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)], env=os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}"}
    )
    deadline = time.monotonic() + 120
    while not Measured.seen(tmp_path / "seen") and time.monotonic() < deadline:
        time.sleep(0.1)
    pid = Measured.seen(tmp_path / "seen")[0]["pid"]
    assert psutil.pid_exists(pid)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie"


def test_what_cannot_be_measured_is_said_in_a_sentence(tmp_path):
    def out_of_memory(timed, device):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 1 GiB")

    with pytest.raises(UserError, match="latency_ms: can't be measured .*OutOfMemoryError: CUDA out of memory. Tried"):
        latency_in(tmp_path, out_of_memory)([(BASE, 1)])


def test_nothing_is_asked_where_latency_is_neither_limited_nor_minimised(tmp_path):
    before = psutil.Process().children()
    with _latency_of_trials(SearchSettings(study=tmp_path, max_macs=4e6)) as latency:
        assert latency is None
    with _latency_of_trials(SearchSettings(study=tmp_path, max_latency_ms=4, engine="local", device="cpu")) as latency:
        assert latency is not None and latency.kind == device_kind("cpu", 1)
    assert psutil.Process().children() == before


# Limits and costs


def test_costs_of_latency_need_a_function_that_measures_it():
    for options in ({"max_latency_ms": 4.0}, {"objectives": ("fid", "latency_ms")}):
        with pytest.raises(UserError, match="latency_ms: is minimised or limited here, and no function was given"):
            Costs(SearchSettings(**options), build_space(BASE))
        with pytest.raises(UserError, match="no function was given"):
            Joint(SearchSettings(strategy="joint", **options), Study.in_memory(("fid", "latency_ms")))


def one_by_one(costs: Costs, number: int, kind: str) -> float:
    """The least that descent finds for one expert, asked for one network at a time."""
    domains, space = costs.space.experts_domains(number), costs.space

    def cost(point: Choices) -> float:
        return float(costs._of_kind(kind, [(space.with_expert(space.base, number, point), number)])[0])

    def descended(choices: Choices) -> float:
        for name, domain in domains.items():
            choices = min((choices | {name: value} for value in domain.values), key=cost)
        return cost(choices)

    ends = [{name: domain.values[end] for name, domain in domains.items()} for end in (0, -1)]
    return min(descended(start) for start in (space.expert_choices(space.base, number), *ends))


@given(st.integers(0, 10_000), st.sampled_from([("split", "p"), ("split", "pool_stride", "time"), ("low_pool", "p")]))
@settings(max_examples=15)
def test_descents_in_step_come_to_what_one_by_one_they_do(seed, dimensions):
    known, asked = {}, []

    def latency(experts):
        asked.append(len(experts))
        networks = [timed_network(config, number, "cpu") for config, number in experts]
        for network in networks:
            known.setdefault(network, np.random.default_rng((seed, len(known))).random())
        return [passes_of(*expert) * known[network] for expert, network in zip(experts, networks, strict=True)]

    space = build_space(BASE, dimensions)
    costs = Costs(SearchSettings(max_latency_ms=1.0, dimensions=dimensions, p_share=0.0), space, latency)
    least = costs._least("latency_ms")
    own = space.experts_domains(1)
    assert len(asked) == len(own) + 1  # one question a dimension, and one for where the descents end
    assert len(known) <= 3 * len(BASE.experts) * sum(len(domain.values) for domain in own.values())
    assert least == pytest.approx([one_by_one(costs, number, "latency_ms") for number in range(1, 5)], rel=1e-12)


def test_a_limit_that_the_hand_made_pattern_keeps_takes_its_networks_alone(tmp_path):
    measure = Unsteady()
    Costs(SearchSettings(max_latency_ms=1e3), build_space(BASE), latency_in(tmp_path, measure)).check()
    assert len(measure.networks) == len({timed_network(BASE, number, "cpu") for number in range(1, 5)})


def test_a_limit_nothing_meets_is_refused_at_the_door(tmp_path):
    with pytest.raises(UserError, match="max_latency_ms: no candidate has so few; the smallest of this space has 2"):
        Costs(SearchSettings(max_latency_ms=1.0), build_space(BASE), latency_in(tmp_path, Unsteady())).check()


def test_what_another_limit_refuses_is_not_measured(tmp_path):
    measure = Unsteady()
    options = {"max_macs": 3.5e6, "max_latency_ms": 100.0}
    costs = Costs(SearchSettings(**options), build_space(BASE), latency_in(tmp_path, measure))
    assert "over max_macs" in costs.refusal(BASE)
    assert measure.networks == []


LIMIT = {"joint": 2.55, "factorised": 2.6}


def searched(folder: Path, strategy: str, measure, stop: int = 0):
    """As ``searches.searched``, with a limit on latency that is measured by ``measure``."""
    options = {"budget": 16, "max_latency_ms": LIMIT[strategy], "objectives": ("fid", "latency_ms"), "p_share": 0.0}
    chosen = SearchSettings(study=folder, strategy=strategy, **options)
    study = Study(folder, chosen.in_force(), chosen.objectives)
    latency, ended = latency_in(folder, measure), 0
    search = (factorised if strategy == "factorised" else Joint)(chosen, study, latency=latency)
    while not search.done and not 0 < stop <= ended:
        task = search.next_task()
        outcome = attempt(score, task)
        if not task.expert:
            outcome = replace(outcome, latency_ms=LatencyMeter(folder, "cpu", 1, measure).ensemble_ms(task.config))
        search.record(outcome)
        ended += 1
    study.close()
    return study, search


@pytest.mark.parametrize("strategy", ["joint", "factorised"])
@pytest.mark.parametrize("stops", [(1,), (5, 9), (13,)])
def test_a_search_that_goes_on_refuses_and_proposes_what_the_unbroken_one_does(tmp_path, strategy, stops):
    broken = []
    for place, stop in enumerate((*stops, 0)):
        measure = Unsteady(first=3 * place)
        study, search = searched(tmp_path / "broken", strategy, measure, stop - sum(stops[:place]) if stop else 0)
        broken += measure.networks
    assert len(broken) == len({*broken}) > 4  # each was measured once
    shutil.copytree(tmp_path / "broken" / "latency", tmp_path / "unbroken" / "latency")
    measure = Unsteady(first=5)
    unbroken, _ = searched(tmp_path / "unbroken", strategy, measure)
    assert measure.networks == []  # it wants none that the broken one had not
    assert record_of_choices(study) == record_of_choices(unbroken)
    scored = [trial for trial in study.trials if trial.kind == "candidate"]
    refused = [trial for trial in scored if trial.state == "refused"]
    assert scored and (refused or strategy == "factorised")
    assert all("over max_latency_ms" in trial.reason for trial in refused)
    for trial in scored:  # what a limit saw is what the score has
        if trial.outcome:
            assert trial.outcome.latency_ms == pytest.approx(search.costs.total(trial.config)[0], rel=1e-12)
            assert trial.outcome.latency_ms <= LIMIT[strategy] * (1 + 1e-9)


# Scores


def test_a_trials_latency_is_the_records_and_names_its_device(tmp_path):
    config = BASE.with_(training={"steps": 1, "batch_size": 8}, evaluation={"samples": 4, "features": "random"})
    latency = latency_in(tmp_path, Unsteady())
    limited = Costs(SearchSettings(max_latency_ms=100.0), build_space(config), latency).total(config)[-1]
    outcome = Objective(tmp_path, tmp_path / "bank", "cpu")(Task(0, config, "candidate"))
    assert outcome.latency_ms == limited
    assert outcome.latency_device == latency.kind.name
    assert Outcome.from_dict(json.loads(json.dumps(outcome.to_dict()))) == outcome


def test_a_trial_records_what_it_measures_though_nobody_limits_it(tmp_path):
    config = BASE.with_(training={"steps": 1, "batch_size": 8}, evaluation={"samples": 4, "features": "random"})
    objective = Objective(tmp_path, tmp_path / "bank", "cpu")
    first, second = (objective(Task(number, config, "candidate")) for number in range(2))
    assert first.latency_ms == second.latency_ms
    measure = Unsteady()
    assert sum(latency_in(tmp_path, measure)([(config, number) for number in range(1, 5)])) == pytest.approx(first.latency_ms)
    assert measure.networks == []


def test_an_outcome_from_before_devices_were_noted_has_none():
    assert Outcome.from_dict({"number": 0, "fid": 1.0, "latency_ms": 2.0}).latency_device is None


def test_the_table_of_trials_names_the_device(tmp_path):
    study = Study.in_memory(("fid", "latency_ms"))
    study.start(BASE, "hand-made", {}, {})
    study.finish(Outcome(0, fid=1.0, latency_ms=2.0, latency_device="A CPU, 1 thread"))
    Kept(tmp_path, ("fid", "latency_ms")).update(study.trials)
    table = pd.read_csv(tmp_path / "trials.csv")
    assert list(table["latency_device"]) == ["A CPU, 1 thread"] and list(table["latency_ms"]) == [2.0]
