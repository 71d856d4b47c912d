"""CPU time of proposals, surrogate and bank in a search with thousands of candidates.

    python benchmarks/bank_scale.py [--candidates 10000] [--rounds 3] [--training-seconds S --cascade-seconds S]

Fills a study of digits-meme with ``--candidates`` random candidates of all experts together, in the space of all dimensions. It
gets the number of scored cascades that a search would have, with artificial scores, and a bank with a record for each candidate.
Then the factorised strategy resumes for some rounds, and the driver's CPU seconds are measured: for opening the study, for the
first round, which has nothing in memory, and per candidate of the later rounds with its cascades. They include proposals,
surrogate, choice of cascades and record. ``share`` is the latter plus the lookups in the bank, over a worker's time: one training
of an expert at proxy length and the scoring of its cascades, measured here with one thread, or given. The study is in memory.
benchmarks/search_overhead.py measures the journal. The last line is one JSON object.
"""

import argparse
import json
import random
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from meme.data.images import open_images
from meme.support.files import write_text
from meme.training.interval_loss import hold_out
from meme_nas.record.study import Study
from meme_nas.record.tasks import Outcome, Task
from meme_nas.settings import SearchSettings
from meme_nas.strategies.factorised import ROUND_GROWTH, Factorised
from meme_nas.worker.bank import Banked, ExpertBank
from meme_nas.worker.objective import Objective
from search_spaces.domain import draw


class MadeUp:
    """Artificial scores: a sum over experts of a smooth function of their choices, plus noise."""

    def __init__(self):
        self._source = np.random.default_rng(0)

    def outcome(self, task: Task) -> Outcome:
        parts = [expert.p * place + sum(expert.low_channels) / 96 for place, expert in enumerate(task.config.experts)]
        noise = 0.05 * self._source.standard_normal()
        if task.expert:
            return Outcome(task.number, task.expert, loss=0.1 + 0.01 * parts[task.expert - 1] + 0.01 * noise, macs=4e6)
        return Outcome(task.number, fid=float(np.exp(sum(parts) / 4 + noise)), macs=4e6)


def fill(search: Factorised, each: int, made_up: MadeUp) -> None:
    """Fill the study with ``each`` finished candidates of every expert and their cascades."""
    chance = random.Random(0)
    while (task := search.next_task()) and not task.expert:
        search.record(made_up.outcome(task))
    for number in search.numbers:
        for index in range(each):
            log = search.study.experts(number)
            if index >= len(log.records):
                choices = draw(search.space.experts_domains(number), chance)
                log.start(search._with({number: choices}, ""), "expert", choices, search.distributions)
            trial = log.records[index]
            if not trial.finished:
                search.record(made_up.outcome(search._task(trial)))
    ends = [end for end in search.rounds if end <= each]
    for before, end in zip([0, *ends], ends, strict=False):
        for _ in range(search.settings.cascades_per_candidate * (end - before)):
            chosen = {n: search.study.experts(n).records[chance.randrange(end)].choices for n in search.numbers}
            config = search._with(chosen, "")
            choices = search.space.choices(config)
            trial = search.study.start(config, "candidate", choices, search.distributions, candidates=end)
            search.record(made_up.outcome(search._task(trial)))


def further(settings: SearchSettings, study: Study, made_up: MadeUp) -> dict[str, float]:
    """Return the driver's CPU seconds for opening the study, for the first remaining round, and per candidate of the others."""
    begun = time.process_time()
    search = Factorised(settings, study)
    start, spent = len(search._log(1)), [time.process_time() - begun]
    ends = [end for end in search.rounds if end > start]
    for end in ends:
        begun = time.process_time()
        while not search.done and len(search._log(1)) < min(end + 1, ends[-1]):
            search.record(made_up.outcome(search.next_task()))
        spent.append(time.process_time() - begun)
    each = sum(spent[2:-1]) / ((ends[-2] - ends[0]) * len(search.numbers))
    return {"open": spent[0], "first_round": spent[1], "candidate_and_its_cascades": each}


def lookups(folder: Path, settings: SearchSettings, count: int) -> float:
    """Return the CPU seconds of finding an expert in a bank of ``count``, with nothing of it in memory."""
    bank = ExpertBank(folder / "bank", *hold_out(open_images("digits", size=8, channels=1)))
    config = settings.as_proxy(settings.full_config())
    configs = [config.with_(training={"seed": seed}) for seed in range(100)]
    for place in range(count):
        key = bank.key(configs[place], 1) if place < len(configs) else f"{place:012x}"
        banked = Banked(key, config.training.steps, 0.1, 0.001, 164_000, 3_861_856, ((25, 0.5), (config.training.steps, 0.3)))
        entry = bank.folder / key[:2] / key
        entry.mkdir(parents=True)
        write_text(entry / "entry.json", json.dumps({str(banked.steps): asdict(banked)}))
        bank.weights(banked).touch()
    begun = time.process_time()
    assert all(bank.find(each, 1) for each in configs)
    return (time.process_time() - begun) / len(configs)


def work(folder: Path, settings: SearchSettings) -> tuple[float, float]:
    """Return the CPU seconds of training an expert, and of scoring a cascade that shares half its sampler steps with another."""
    torch.set_num_threads(1)
    objective, config = Objective(folder, folder / "real", "cpu"), settings.as_proxy(settings.full_config())
    objective._open(config)
    begun = time.process_time()
    for number in range(1, 5):
        objective(Task(0, config, "expert", number))
    training = (time.process_time() - begun) / 4
    objective(Task(0, config, "candidate"))
    other = config.expert(2).model_dump() | {"p": 0.5}
    changed = config.with_(experts=[config.expert(1), other, config.expert(3), config.expert(4)])
    objective(Task(0, changed, "expert", 2))
    begun = time.process_time()
    objective(Task(1, changed, "candidate"))
    return training, time.process_time() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--training-seconds", type=float)
    parser.add_argument("--cascade-seconds", type=float)
    options = parser.parse_args()
    each = options.candidates // 4
    dimensions = ("split", "p", "pool_stride", "low_pool", "high_pool", "time")  # 145,800 candidates of each expert
    budget = each + (options.rounds + 1) * max(2, each // ROUND_GROWTH) + 2
    settings = SearchSettings(strategy="factorised", dimensions=dimensions, budget=budget, device="cpu")
    with tempfile.TemporaryDirectory() as scratch:
        folder, study, made_up = Path(scratch), Study.in_memory(settings.objectives), MadeUp()
        training, cascade = options.training_seconds, options.cascade_seconds
        if training is None or cascade is None:
            training, cascade = work(folder, settings)
        found = lookups(folder, settings, options.candidates)
        fill(Factorised(settings, study), each, made_up)
        print(f"filled: {each} candidates an expert, {len(study.trials)} cascades", flush=True)
        driver = further(settings, study, made_up)
    scored = settings.cascades_per_candidate / 4  # cascades for each candidate of one expert
    ours, theirs = driver["candidate_and_its_cascades"] + (1 + 4 * scored) * found, training + scored * cascade
    figures = {**driver, "lookup": found, "training": training, "cascade": cascade, "share": ours / theirs}
    figures["cascades_per_minute_on_2_cores"] = 2 * 60 / cascade
    print(json.dumps({"candidates": options.candidates} | {name: float(f"{value:.3g}") for name, value in figures.items()}))


if __name__ == "__main__":
    main()
