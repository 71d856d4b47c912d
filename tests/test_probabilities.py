"""p of the winner's experts, chosen at a length that tells: what is tried, what is taken, and what is left as it was."""

import math
from dataclasses import replace

import pytest
from toys import score

from meme_nas.record.study import Study
from meme_nas.rescoring.base import ATTEMPTS
from meme_nas.rescoring.chosen import Chosen
from meme_nas.rescoring.probabilities import SAMPLING_SEEDS, Probabilities
from meme_nas.settings import SearchSettings
from meme_nas.strategies.factorised import Factorised

GAINS = {(1, 1.0): -0.02, (1, 0.4): 0.07, (2, 0.2): 0.003, (2, 0.8): 0.04, (3, 0.4): -0.001, (3, 0.1): -0.013}
"""What an expert's p changes of log FID."""


def searched(folder, **changes):
    small = {"budget": 12, "study": folder, "audit_factor": 0, "trunk_share": 0.125, "p_share": 0.5}
    settings = SearchSettings(**small | changes)
    search = Factorised(settings, Study(folder, settings.in_force(), settings.objectives))
    while not search.done:
        search.record(score(search.next_task()))
    return settings, search


def scored(task):
    """Noise of the sampling seed is common to all, and p adds up over experts."""
    gains = sum(GAINS.get((number, expert.p), 0.0) for number, expert in enumerate(task.config.experts, start=1))
    return replace(score(task), fid=math.exp(gains + task.config.evaluation.seed % 7))


def work_through(probabilities: Probabilities) -> list:
    tasks = []
    while not probabilities.done:
        tasks.append(probabilities.next_task())
        probabilities.record(scored(tasks[-1]))
    return tasks


def test_p_is_no_dimension_of_the_search_unless_that_is_asked_for(tmp_path):
    assert SearchSettings().searched == ("split",) and SearchSettings().chooses_p_last
    assert SearchSettings(p_share=0.0).searched == ("split", "p") and not SearchSettings(p_share=0.0).chooses_p_last
    assert SearchSettings(dimensions=("p",)).searched == ("p",) and not SearchSettings(dimensions=("p",)).chooses_p_last
    assert not SearchSettings(dimensions=("split",)).chooses_p_last
    assert Chosen(SearchSettings(dimensions=("split",), study=tmp_path), None, None).probabilities is None


def test_half_and_twice_the_p_of_each_expert_is_tried_at_the_length_that_tells(tmp_path):
    settings, search = searched(tmp_path)
    probabilities = Chosen(settings, search, None).probabilities
    tasks = work_through(probabilities)
    assert probabilities.alternatives == [(1, 0.4), (1, 1.0), (2, 0.2), (2, 0.8), (3, 0.1), (3, 0.4), (4, 0.05), (4, 0.2)]
    assert len(tasks) == 9 * len(SAMPLING_SEEDS) and all(task.kind == "probabilities" for task in tasks)
    assert {(task.config.training.steps, task.config.training.trunk_steps) for task in tasks} == {(750, 1_000)}
    assert {task.config.evaluation.seed for task in tasks} == set(SAMPLING_SEEDS) and {task.seeds for task in tasks} == {(0,)}


def test_the_best_of_each_expert_is_taken_where_it_gains_enough(tmp_path):
    settings, search = searched(tmp_path)
    chosen = Chosen(settings, search, None)
    work_through(chosen.probabilities)
    gains = chosen.probabilities.gains()
    assert gains[1, 1.0] == pytest.approx(-0.02) and gains[3, 0.1] == pytest.approx(-0.013)
    assert [expert.p for expert in chosen.best.config.experts] == [1.0, 0.4, 0.1, 0.1]
    assert [expert.low_channels for expert in chosen.best.config.experts] == [
        expert.low_channels for expert in chosen.found.config.experts
    ]
    said = chosen.probabilities.said()
    assert said == "expert 1 0.8 to 1 (-2.0%), expert 3 0.2 to 0.1 (-1.3%); chosen at 750 steps an expert"
    assert chosen.best.number == chosen.found.number and chosen.best.kind == "candidate"
    assert chosen.best.config.training.steps == chosen.found.config.training.steps


def test_where_nothing_gains_the_winner_stays_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr("test_probabilities.GAINS", {})
    settings, search = searched(tmp_path)
    chosen = Chosen(settings, search, None)
    work_through(chosen.probabilities)
    assert chosen.best is chosen.found and chosen.probabilities.said() == "as hand-made: no alternative was better"


def test_where_one_alternative_failed_nothing_is_changed_and_the_next_command_tries_again(tmp_path):
    settings, search = searched(tmp_path)
    chosen = Chosen(settings, search, None)
    for _ in range(ATTEMPTS):
        chosen.probabilities.record(chosen.probabilities.next_task().failed("its worker process died"))
    work_through(chosen.probabilities)
    assert chosen.probabilities.gains() == {} and chosen.best is chosen.found
    assert chosen.probabilities.said() == "as hand-made: the alternatives could not all be scored"
    again = Chosen(settings, search, None)
    assert len(work_through(again.probabilities)) == 1 and again.best is not again.found


def test_a_hand_made_pattern_with_other_p_is_no_longer_the_pattern(tmp_path):
    settings, search = searched(tmp_path, budget=3)
    chosen = Chosen(settings, search, None)
    work_through(chosen.probabilities)
    assert chosen.found.kind == "hand-made" and chosen.best.kind == "candidate"
    assert not chosen.best.is_same(chosen.found)
