"""One contract for every strategy and sampler: the same record and seed give the same proposal, in any process and at any time;
and what fails is learned."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from searches import record_of_choices, searched
from toys import Crashing

from meme_nas.settings import SearchSettings
from meme_nas.strategies.optuna_proposer import Proposer
from search_spaces.domain import Choice, Integer, Real, draw

TESTS = Path(__file__).parent
SEARCHES = {
    "joint-tpe": {"strategy": "joint", "sampler": "tpe", "budget": 26},
    "joint-nsga2": {"strategy": "joint", "sampler": "nsga2", "budget": 36},
    "joint-random": {"strategy": "joint", "sampler": "random", "budget": 12},
    "factorised-model": {"strategy": "factorised", "sampler": "model", "budget": 18},
    "factorised-tpe": {"strategy": "factorised", "sampler": "tpe", "budget": 18},
    "factorised-nsga2": {"strategy": "factorised", "sampler": "nsga2", "budget": 26},
    "factorised-random": {"strategy": "factorised", "sampler": "random", "budget": 10},
    "rungs": {"strategy": "factorised", "sampler": "model", "budget": 12, "rungs": 2},
}
STOPS = (9, 40)  # finished trials after which a search is stopped, with others running
PROCESS = """
import sys
from pathlib import Path
from test_proposals import settings_of
from searches import searched
from toys import Crashing
for name in sys.argv[3:]:
    searched(settings_of(name, Path(sys.argv[1])), Crashing(), workers=3, stop=int(sys.argv[2]))
"""


def settings_of(name: str, folder: Path) -> SearchSettings:
    return SearchSettings(study=folder / name, p_share=0.0, seed=3, **SEARCHES[name])


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> Path:
    """Folder of searches that went through three processes, each with its own order of hashes and of ends."""
    folder = tmp_path_factory.mktemp("broken")
    for order, stop in enumerate((*STOPS, 0), start=1):
        surroundings = os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}", "PYTHONHASHSEED": str(order)}
        subprocess.run([sys.executable, "-c", PROCESS, str(folder), str(stop), *SEARCHES], check=True, env=surroundings)
    return folder


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_in_three_processes_comes_to_the_record_of_an_unbroken_one(name, broken, tmp_path):
    unbroken = searched(settings_of(name, tmp_path), Crashing())
    assert record_of_choices(searched(settings_of(name, broken), Crashing())) == record_of_choices(unbroken)


# --- Samplers ------------------------------------------------------------------------------------

DOMAINS = {"a": Integer(0, 32, 8), "b": Real(0.1, 1.0, 0.1), "c": Choice(("x", "y")), "d": Integer(0, 10)}


def points(count: int, fails=lambda choices: False) -> list:
    source = random.Random(0)
    drawn = [(draw(DOMAINS, source), (source.random(), source.random())) for _ in range(count)]
    return [(choices, None if fails(choices) else values) for choices, values in drawn]


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
def test_a_proposal_depends_on_points_and_seed_alone(sampler):
    known, asked_before = points(37, lambda choices: choices["a"] == 8), Proposer(DOMAINS, sampler)
    for seed in range(20):
        alone = Proposer(DOMAINS, sampler).propose_after(known, seed)
        assert asked_before.propose_after(known, seed) == asked_before.propose_after(known, seed) == alone


@pytest.mark.parametrize("sampler, most", [("tpe", 5), ("nsga2", 25)])
def test_samplers_learn_from_points_without_values(sampler, most):
    """Three fifths of the space fail, and chance proposes 60 of 100 there; NSGA-II mutates one choice in four at random."""
    known = points(47, lambda choices: choices["a"] >= 16)
    proposed = [Proposer(DOMAINS, sampler).propose_after(known, seed) for seed in range(100)]
    assert sum(choices["a"] >= 16 for choices in proposed) <= most


# --- What fails ----------------------------------------------------------------------------------

SEEDS = 2  # of searches: each takes seconds
LEARNED = 12  # candidates, after which a search should have learned where they fail


@pytest.mark.parametrize(
    "strategy, sampler, most", [("factorised", "model", 0.1), ("factorised", "tpe", 0.3), ("joint", "tpe", 0.3)]
)
def test_a_region_that_fails_is_left(strategy, sampler, most):
    """Two fifths of one expert's space always fail, and the score gets better toward them: four fifths of later trainings
    went there."""
    later = []
    for seed in range(SEEDS):
        settings = SearchSettings(strategy=strategy, sampler=sampler, budget=50, seed=seed, p_share=0.0, device="cpu")
        study = searched(settings, Crashing(), on_disk=False)
        log = study.experts(1).records if strategy == "factorised" else [trial for trial in study.trials if trial.choices]
        later += [Crashing().crashes(trial.config) for trial in log[LEARNED:]]
    assert len(later) == SEEDS * (48 - LEARNED)
    assert sum(later) <= most * len(later)
