"""Budget, repeats, refusals, yardsticks and the record on disk, without any training."""

import random
import re
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from itertools import product
from types import SimpleNamespace

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import score

from meme.config.presets import preset, yardsticks
from meme.data.images import open_images
from meme.errors import UserError
from meme.scoring.cost import ensemble_cost
from meme_nas import finish as conclusion
from meme_nas.record.ranking import Standings, front, winner
from meme_nas.record.study import JOURNAL, Study, read_trials, recorded_settings
from meme_nas.record.tasks import Outcome
from meme_nas.record.trial_log import TrialRecord
from meme_nas.results import Kept, export_configs
from meme_nas.settings import SearchSettings
from meme_nas.strategies.joint import Joint
from meme_nas.strategies.optuna_proposer import Proposer
from meme_nas.surrogate.costs import Costs
from search_spaces.dimensions import Coarse
from search_spaces.domain import Choice, Integer, Real, draw, neighbours, size
from search_spaces.space import SplitSpace, build_space

BASE = preset("digits-meme")
OBJECTIVES = ("fid", "macs")


def settings_in(folder, **changes):
    return SearchSettings(**{"budget": 12, "study": folder, "strategy": "joint", "p_share": 0.0} | changes)


def opened(settings):
    return Study(settings.folder, settings.in_force(), settings.objectives)


def run_through(settings, objective=score):
    """A whole search in this process."""
    study = opened(settings)
    search = Joint(settings, study)
    while (task := search.next_task()) is not None:
        search.record(objective(task))
    study.close()
    return search


# The space


@given(st.integers(0, 10_000))
def test_choices_and_configs_are_two_forms_of_one_point(seed):
    space = SplitSpace(BASE)
    choices = draw(space.domains, random.Random(seed))
    assert space.choices(space.config(choices, "x")) == choices


def test_space_has_every_split_from_all_convolution_to_all_attention():
    domains = SplitSpace(BASE).domains
    assert domains["expert1.level1.low"].values == (0, 8, 16)
    assert domains["expert4.level2.low"].values == (0, 8, 16, 24, 32)
    assert size(domains) == (3 * 5 * 10) ** 4
    paper = SplitSpace(preset("ffhq-meme")).domains
    assert paper["expert1.level4.low"].values == tuple(range(0, 513, 32))


def test_alone_an_expert_has_no_probability_to_search():
    alone = BASE.with_(experts=[BASE.experts[0].model_dump() | {"interval": (0, 1000)}])
    assert set(SplitSpace(alone).domains) == {"expert1.level1.low", "expert1.level2.low"}


def test_grids_hold_equal_numbers_and_neighbours_one_step_away():
    assert Real(0.1, 1.0, 0.1).values[2] == 0.3
    assert Real(0.1, 1.0, 0.1).neighbours(0.3) == (0.2, 0.4)
    assert Integer(0, 32, 8).neighbours(0) == (8,)
    assert Choice(("a", "b", "c")).neighbours("b") == ("a", "c")
    around = list(neighbours({"x": Integer(0, 4), "y": Real(0.0, 1.0, 0.5)}, {"x": 4, "y": 0.5}))
    assert around == [{"x": 3, "y": 0.5}, {"x": 4, "y": 0.0}, {"x": 4, "y": 1.0}]


def test_a_preset_without_splits_is_refused():
    with pytest.raises(UserError, match="preset: digits-ldm-s has no splits"):
        SplitSpace(preset("digits-ldm-s"))


# Budget and proposals


def test_first_trials_are_the_yardsticks_at_proxy_length(tmp_path):
    trials = run_through(settings_in(tmp_path, budget=3, proxy_steps=50)).study.trials
    assert [trial.kind for trial in trials] == ["hand-made", "multi-expert", "single-model"]
    assert [trial.config.training.steps for trial in trials] == [50, 50, 2_000 + 200]  # one model: as trunk and four experts
    assert [trial.config.training.trunk_steps for trial in trials] == [2_000, 2_000, 0]
    assert trials[0].choices == SplitSpace(BASE).choices(BASE)


def test_a_larger_budget_goes_on_and_a_spent_one_does_nothing(tmp_path):
    first = run_through(settings_in(tmp_path, budget=5)).study.trials
    assert len(run_through(settings_in(tmp_path, budget=5)).study.trials) == 5
    more = run_through(settings_in(tmp_path, budget=9)).study.trials
    assert [trial.outcome for trial in more[:5]] == [trial.outcome for trial in first]
    assert len(more) == 9


def test_another_seed_proposes_otherwise(tmp_path):
    one = run_through(settings_in(tmp_path / "a", seed=1)).study.trials
    two = run_through(settings_in(tmp_path / "b", seed=2)).study.trials
    assert [trial.choices for trial in one[3:]] != [trial.choices for trial in two[3:]]


def test_proposals_do_not_depend_on_the_order_in_which_trials_end(tmp_path):
    straight = run_through(settings_in(tmp_path / "a", budget=20)).study.trials
    settings = settings_in(tmp_path / "b", budget=20)
    search, running, source = Joint(settings, opened(settings)), [], random.Random(0)
    while not search.done:
        while len(running) < 2 and (task := search.next_task()):
            running.append(task)
        search.record(score(running.pop(source.randrange(len(running)))))
    assert [trial.choices for trial in search.study.trials] == [trial.choices for trial in straight]


def test_tpe_learns(tmp_path):
    fids = [trial.outcome.fid for trial in run_through(settings_in(tmp_path, budget=60)).study.trials if trial.choices]
    assert sum(fids[-15:]) / 15 < sum(fids[1:11]) / 10


def test_repeats_cost_nothing(tmp_path, monkeypatch):
    same = draw(SplitSpace(BASE).domains, random.Random(3))
    monkeypatch.setattr(Proposer, "propose", lambda self, known, seed: same)
    search = run_through(settings_in(tmp_path, budget=10))
    ids = [trial.config.architecture_id for trial in search.study.trials]
    assert len(ids) == len(set(ids)) == 10
    assert search.repeats > 0


def test_an_exhausted_space_ends_the_search(tmp_path):
    settings = settings_in(tmp_path, budget=10_000, sampler="random")
    search = Joint(settings, opened(settings))
    search.space = SplitSpace(BASE.with_(experts=[BASE.experts[0].model_dump() | {"interval": (0, 1000)}]))
    search.yardsticks, search._proposer = [], Proposer(search.space.domains, "random")
    search.distributions = search._proposer._distributions
    while (task := search.next_task()) is not None:
        search.record(score(task))
    assert search.done
    assert len(search.study.trials) == 15


def test_too_costly_candidates_are_refused_before_training_and_free(tmp_path):
    limit = ensemble_cost(BASE).macs * 0.997
    trained = []

    def objective(task):
        trained.append(task)
        return score(task)

    trials = run_through(settings_in(tmp_path, budget=12, max_macs=limit), objective).study.trials
    refused = [trial for trial in trials if trial.state == "refused"]
    candidates = [task for task in trained if task.kind == "candidate"]
    assert len(trained) == 12
    assert refused
    assert all("over max_macs" in trial.reason for trial in refused)
    assert candidates
    assert all(ensemble_cost(task.config).macs <= limit for task in candidates)


def test_a_limit_nothing_meets_is_refused_at_the_door():
    with pytest.raises(UserError, match="max_macs: no candidate has so few; the smallest of this space has 3"):
        Costs(SearchSettings(max_macs=1e6), SplitSpace(BASE)).check()


def test_the_least_macs_are_found_where_two_choices_must_change_together():
    """All attention at a large stride costs less than all convolution, but at the base's stride it costs more."""
    space = build_space(BASE, ("split", "pool_stride", "experts"), Coarse(head_step=2))
    own = space.experts_domains(1)
    points = [dict(zip(own, values, strict=True)) for values in product(*(domain.values for domain in own.values()))]
    alike = [{f"expert{number}{name[7:]}": value for number in range(1, 9) for name, value in point.items()} for point in points]
    least = min(ensemble_cost(space.config(space.choices(BASE) | choices, "x")).macs for choices in alike)
    Costs(SearchSettings(max_macs=least), space).check()
    with pytest.raises(UserError, match=re.escape(f"the smallest of this space has {least:.4g}")):
        Costs(SearchSettings(max_macs=0.99 * least), space).check()


@pytest.mark.parametrize("dimensions", [("boundaries",), ("split", "time", "experts"), ("high_pool", "low_pool", "p")])
def test_a_search_over_other_dimensions_needs_no_other_search(tmp_path, dimensions):
    trials = run_through(settings_in(tmp_path, budget=9, dimensions=dimensions)).study.trials
    names = set(build_space(BASE, dimensions).domains)
    assert [set(trial.choices) for trial in trials if trial.config.network.splits_channels] == [names] * 7
    assert len({trial.config.architecture_id for trial in trials}) == 9


# The record


def test_a_study_made_with_other_settings_is_refused_and_unharmed(tmp_path):
    run_through(settings_in(tmp_path, budget=4))
    before = (tmp_path / JOURNAL).read_bytes()
    with pytest.raises(UserError, match="seed: the study in .* was made with 0, not 7"):
        opened(settings_in(tmp_path, seed=7))
    assert (tmp_path / JOURNAL).read_bytes() == before


def test_a_study_over_other_dimensions_is_refused_in_whatever_order_they_are_named(tmp_path):
    run_through(settings_in(tmp_path, budget=4, dimensions=("split", "time")))
    with pytest.raises(UserError, match="dimensions: the study in .* was made with split time, not p split"):
        opened(settings_in(tmp_path))
    opened(settings_in(tmp_path, dimensions=("time", "split"))).close()


def test_a_study_from_before_a_setting_existed_was_made_without_it(tmp_path):
    current = settings_in(tmp_path, strategy="factorised")
    older = {name: value for name, value in current.in_force().items() if name != "rungs"}
    Study(tmp_path, older, current.objectives).close()
    with pytest.raises(UserError, match="rungs: the study in .* was made with 1, not 2"):
        opened(settings_in(tmp_path, strategy="factorised", rungs=2))
    assert recorded_settings(tmp_path)["rungs"] == 1


def test_two_searches_cannot_write_one_study(tmp_path):
    study = opened(settings_in(tmp_path))
    with pytest.raises(UserError, match="another search is running"):
        opened(settings_in(tmp_path))
    study.close()
    opened(settings_in(tmp_path)).close()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="can't be written"):
        opened(settings_in(tmp_path / "file" / "study"))


@pytest.mark.parametrize("cut", [1, 17, 60])
def test_a_journal_cut_while_written_loses_at_most_its_last_record(tmp_path, cut):
    run_through(settings_in(tmp_path, budget=6))
    journal = tmp_path / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-cut])
    (tmp_path / f"{JOURNAL}.lock").symlink_to(journal)  # as a killed process leaves it
    trials = run_through(settings_in(tmp_path, budget=6)).study.trials
    assert [trial.state for trial in trials] == ["complete"] * 6


def test_the_first_outcome_of_a_trial_stands(tmp_path):
    settings = settings_in(tmp_path)
    search = Joint(settings, opened(settings))
    task = search.next_task()
    search.record(Outcome(task.number, fid=5.0, macs=1.0))
    assert search.record(Outcome(task.number, failure="late news")).outcome.fid == 5.0


# What it leaves


def record(number, fid, macs, kind="candidate", choices=None):
    outcome = Outcome(number, fid=fid, macs=macs)
    return TrialRecord(number, "complete", kind, BASE, {"expert1.p": 0.5} if choices is None else choices, "", outcome)


TRIALS = [
    record(0, 10.0, 100.0, "hand-made"),
    record(1, 4.0, 130.0, "multi-expert", {}),
    record(2, 9.0, 100.0),
    record(3, 8.0, 101.0),
    record(4, 9.5, 90.0),
    record(5, 9.5, 95.0),
]


def test_winner_has_no_more_macs_than_the_hand_made_pattern():
    assert winner(TRIALS, OBJECTIVES).number == 2
    assert winner(TRIALS[:2], OBJECTIVES).number == 0
    assert winner([], OBJECTIVES) is None


def test_a_lost_hand_made_pattern_still_limits_the_costs():
    """Its costs are those of its config, which take no training."""
    cost = ensemble_cost(BASE)
    lost = replace(TRIALS[0], state="failed", reason="its worker process died", outcome=Outcome(0, failure="died"))
    trials = [lost, record(1, 4.0, 1.13 * cost.macs), record(2, 9.0, cost.macs)]
    assert winner(trials, OBJECTIVES).number == 2
    assert winner([replace(lost, state="running", outcome=None), *trials[1:]], OBJECTIVES).number == 2
    dear, cheap = (
        replace(each, outcome=replace(each.outcome, params=params))
        for each, params in zip(trials[1:], (cost.params + 1, cost.params), strict=True)
    )
    assert winner([lost, dear, cheap], ("fid", "params")).number == 2
    standings = Standings(OBJECTIVES)
    standings.update(trials)
    assert standings.winner.number == 2


def test_a_yardstick_outside_the_space_is_on_no_front():
    assert [trial.number for trial in front([*TRIALS, record(6, 1.0, 1.0, "single-model", {})], OBJECTIVES)] == [4, 2, 3]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=30))
def test_front_is_what_nothing_dominates(points):
    trials = [record(number, fid, macs) for number, (fid, macs) in enumerate(points)]
    undominated = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    kept = front(trials, OBJECTIVES)
    assert {(trial.outcome.fid, trial.outcome.macs) for trial in kept} == undominated
    assert len(kept) == len(undominated)


def test_exported_configs_have_the_full_training_length(tmp_path):
    settings = settings_in(tmp_path, budget=8)
    trials = run_through(settings).study.trials
    export_configs(tmp_path, trials, settings)
    training = type(BASE).load(tmp_path / "winner.yaml").training
    assert (training.steps, training.trunk_steps) == (1_500, 2_000)  # of 8,000 in all
    single = type(BASE).load(tmp_path / "yardsticks" / "single-model.yaml")
    assert single.training.steps == yardsticks("digits-meme")["single-model"].training.steps
    names = {f"trial-{trial.number:03d}" for trial in front(trials, OBJECTIVES)}
    assert {path.stem for path in (tmp_path / "front").iterdir()} == names


def test_table_has_a_row_a_trial_and_every_choice(tmp_path):
    trials, kept = run_through(settings_in(tmp_path / "study", budget=6)).study.trials, Kept(tmp_path, OBJECTIVES)
    for count in range(1, len(trials) + 1):
        kept.update(trials[:count])
        table = pd.read_csv(tmp_path / "trials.csv", dtype=str)
        assert table["number"].tolist() == [str(trial.number) for trial in trials[:count]]
    assert set(SplitSpace(BASE).domains) <= set(table.columns) and table.columns[-1] == "reason"
    for trial, row in zip(trials, table.to_dict("records"), strict=True):
        assert float(row["fid"]) == trial.outcome.fid and row["architecture"] == trial.architecture_id
        assert all(row[name] == str(value) for name, value in trial.choices.items())  # whole numbers beside empty cells too


def test_only_weights_worth_a_second_look_are_kept(tmp_path):
    for trial in TRIALS:
        folder = tmp_path / "trials" / f"{trial.number:03d}"
        folder.mkdir(parents=True)
        (folder / "expert-1.safetensors").touch()
        (folder / "samples.png").touch()
    Kept(tmp_path, OBJECTIVES).update(TRIALS)
    kept = {path.parent.name for path in tmp_path.glob("trials/*/*.safetensors")}
    assert kept == {"000", "001", "002", "003", "004"}
    assert len(list(tmp_path.glob("trials/*/samples.png"))) == 6


def test_no_weights_are_dropped_before_the_hand_made_pattern_sets_the_limit():
    standings = Standings(OBJECTIVES)
    standings.update([replace(TRIALS[0], state="running", outcome=None), *TRIALS[1:]])
    assert standings.worth_keeping is None
    standings.update(TRIALS)
    assert standings.worth_keeping == {0, 1, 2, 3, 4}


@given(st.permutations(range(9)), st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=9, max_size=9), st.data())
def test_standings_are_those_of_all_trials_in_whatever_order_they_end(order, points, data):
    kinds = ["hand-made", "multi-expert", *["candidate"] * 7]
    ends = [record(number, fid, macs, kinds[number]) for number, (fid, macs) in enumerate(points)]
    standings, trials, told = Standings(OBJECTIVES), [], []
    for number in order:
        while len(trials) <= number:
            trials.append(replace(ends[len(trials)], state="running", outcome=None))
        trials[number] = ends[number]
        if data.draw(st.booleans()):
            told += standings.update(trials)
            assert (standings.winner, standings.front) == (winner(trials, OBJECTIVES), front(trials, OBJECTIVES))
    told += standings.update(trials)
    assert sorted(trial.number for trial in told) == list(range(9)) and standings.running == []


def test_records_are_read_beside_a_running_search(tmp_path):
    study = opened(settings_in(tmp_path))
    study.start(BASE, "candidate", {}, {})
    assert [trial.state for trial in read_trials(tmp_path)] == ["running"]
    with pytest.raises(UserError, match="holds no study"):
        read_trials(tmp_path / "elsewhere")


def test_a_report_leaves_out_the_versions_of_what_is_not_installed(monkeypatch):
    def version(name: str) -> str:
        if name in ("ray", "meme-nas"):
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(conclusion, "version", version)
    images = open_images("digits", size=8, channels=1)
    facts = conclusion.facts_of(SearchSettings(engine="local"), images, SimpleNamespace(name="pixels"))
    assert "optuna 1.0" in facts["versions"] and "ray" not in facts["versions"]
