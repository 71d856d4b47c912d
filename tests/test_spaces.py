"""Spaces of other dimensions than the paper's: two forms of one point, canonical ids, one expert at a time, and refusals."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meme.config.presets import experts_of, preset
from meme.config.schema import even_intervals
from meme.errors import UserError
from meme.network.unet import build_expert
from search_spaces.dimensions import Coarse, known_dimensions, places_of
from search_spaces.domain import Choice, Integer, draw, size
from search_spaces.space import PAPER, SplitSpace, build_space

BASE = preset("digits-meme")  # widths 16 and 32 at 8 and 4 pixels, heads of 8, four experts, T = 1000
ALONE = preset("digits-iu-ldm-s")
KNOWN = tuple(known_dimensions(Coarse()))
EVERYTHING = build_space(BASE, KNOWN)
SOME = st.lists(st.sampled_from(KNOWN), min_size=1, unique=True).map(tuple)
SEEDS = st.integers(0, 10_000)


def drawn(space, seed):
    return draw(space.domains, random.Random(seed))


# Two forms of one point


@settings(max_examples=60)
@given(SOME, SEEDS, st.sampled_from([BASE, preset("digits-meme-hard"), preset("cifar10-meme")]))
def test_configs_and_choices_are_two_forms_of_one_point(dimensions, seed, base):
    space = build_space(base, dimensions)
    config = space.config(drawn(space, seed), "x")
    choices = space.choices(config)
    assert choices.keys() == space.domains.keys()
    assert all(choices[name] in domain.values for name, domain in space.domains.items())
    assert space.config(choices, "x") == config
    assert space.choices(space.config(choices, "x")) == choices


@given(SOME)
def test_the_base_is_a_point_of_every_space_around_it(dimensions):
    space = build_space(BASE, dimensions)
    assert space.config(space.choices(BASE), BASE.name) == BASE


@given(SEEDS)
def test_choices_that_change_the_network_come_back_as_they_were(seed):
    """Those of the last experts and of idle pools need not."""
    choices = drawn(EVERYTHING, seed)
    back = EVERYTHING.choices(EVERYTHING.config(choices, "x"))
    for number, level in itertools.product(range(1, choices["experts"] + 1), (1, 2)):
        at = f"expert{number}.level{level}."
        idle = {f"{at}high_pool"} if choices[f"{at}low"] == (16, 32)[level - 1] else set()
        idle |= {f"{at}low_pool", f"{at}pool_stride"} if choices[f"{at}low"] == 0 else set()
        idle |= {f"{at}low_pool"} if choices[f"{at}pool_stride"] == 1 else set()
        assert {name for name in back if name.startswith(at) and back[name] != choices[name]} <= idle
    assert back["experts"] == choices["experts"]


@settings(max_examples=30)
@given(SEEDS, st.data())
def test_choices_without_effect_make_no_new_architecture(seed, data):
    choices = drawn(EVERYTHING, seed) | {"expert1.level1.low": 0, "expert1.level2.low": 32, "expert1.level2.pool_stride": 1}
    idle = ["expert1.level1.pool_stride", "expert1.level1.low_pool", "expert1.level2.low_pool", "expert1.level2.high_pool"]
    idle += [name for number in range(choices["experts"] + 1, 9) for name in EVERYTHING.experts_domains(number)]
    idle += [f"interval{number}.length" for number in range(choices["experts"] + 1, 9)]
    idle += ["expert1.p"] * (choices["experts"] == 1)
    name = data.draw(st.sampled_from(idle))
    other = data.draw(st.sampled_from(EVERYTHING.domains[name].values))
    ids = [EVERYTHING.config(each, "x").architecture_id for each in (choices, choices | {name: other})]
    assert ids[0] == ids[1]


@settings(max_examples=25)
@given(SEEDS, SEEDS)
def test_equal_ids_mean_equal_networks(seed, other):
    space = build_space(BASE, ("pool_stride", "low_pool", "high_pool", "time"))
    first, second = (space.config(drawn(space, each), "x") for each in (seed, other))
    same = first.experts == second.experts
    assert (first.architecture_id == second.architecture_id) == same


@settings(max_examples=15)
@given(SEEDS)
def test_every_point_builds(seed):
    config = EVERYTHING.config(drawn(EVERYTHING, seed), "x")
    for number, expert in enumerate(config.experts, start=1):
        network = build_expert(config, number)
        assert any("time_mixer" in name for name, _ in network.named_parameters()) == (expert.time_conditioning != "none")


# The paper's space


def test_the_default_is_the_papers_space_with_its_names_in_their_order():
    space, old = build_space(BASE), SplitSpace(BASE)
    names = [f"expert{number}.{own}" for number in (1, 2, 3, 4) for own in ("level1.low", "level2.low", "p")]
    assert list(space.domains) == list(old.domains) == names
    assert space.domains == old.domains
    assert space.shared == ()
    assert list(build_space(BASE, PAPER[::-1]).domains) == names


def test_a_coarse_grid_is_small_and_holds_its_ends():
    coarse = Coarse(head_step=2, p_values=(0.2, 0.8))
    space = build_space(BASE, PAPER, coarse)
    assert space.domains["expert1.level1.low"].values == (0, 16)
    assert space.domains["expert1.level2.low"].values == (0, 16, 32)
    assert space.domains["expert3.p"] == Choice((0.2, 0.8))
    assert size(space.experts_domains(1)) == 12
    assert space.config(drawn(space, 0), "x").name == "x"
    with pytest.raises(UserError, match="coarse.head_step: must divide the 2 heads of level 1, not 4"):
        build_space(BASE, PAPER, Coarse(head_step=4))


# One expert at a time


@settings(max_examples=30)
@given(SEEDS, SEEDS, st.integers(1, 4))
def test_an_experts_choices_change_that_expert_alone(seed, other, number):
    space = build_space(BASE, ("split", "p", "low_pool", "time"))
    config, own = space.config(drawn(space, seed), "x"), draw(space.experts_domains(number), random.Random(other))
    changed = space.with_expert(config, number, own)
    assert changed == space.config(space.choices(config) | own, "x")
    assert [a for a in range(1, 5) if changed.expert(a) != config.expert(a)] in ([], [number])
    assert changed.expert(number).interval == config.expert(number).interval
    assert space.with_expert(config, number, space.expert_choices(config, number)) == config
    assert space.expert_choices(changed, number).keys() == own.keys() == space.experts_domains(number).keys()


def test_domains_are_the_shared_ones_and_those_of_every_expert():
    own = [name for number in range(1, 9) for name in EVERYTHING.experts_domains(number)]
    assert [*EVERYTHING.shared, *own] == list(EVERYTHING.domains)
    assert EVERYTHING.shared == ("experts", *(f"interval{number}.length" for number in range(1, 9)))
    assert all(name.startswith("expert") and "." in name for name in own)


# Number of experts and their intervals


def test_other_numbers_of_experts_are_the_hand_made_pattern_trained_as_long_together():
    space = build_space(BASE, ("experts",))
    assert space.domains == {"experts": Integer(1, 8)}
    for count, probabilities in ((1, (0.8,)), (2, (0.8, 0.1)), (3, (0.8, 0.2, 0.1)), (8, None)):
        config = space.config({"experts": count}, "x")
        assert [expert.interval for expert in config.experts] == list(even_intervals(count, 1000))
        assert config.training.steps == round(4 * BASE.training.steps / count)
        pattern = experts_of(BASE.network, probabilities or tuple(expert.p for expert in config.experts), 1000)
        assert config.experts == pattern


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8))
def test_lengths_are_laid_out_in_order_and_none_is_empty(lengths):
    places = places_of(lengths, 20)
    assert (places[0], places[-1], len(places)) == (0, 20, len(lengths) + 1)
    assert all(end > first for first, end in itertools.pairwise(places))
    widths = [end - first for first, end in itertools.pairwise(places)]
    assert places_of(widths, 20) == places


def test_equal_lengths_are_even_intervals_and_boundaries_lie_on_a_grid():
    space = build_space(BASE, ("boundaries",))
    base = space.choices(BASE)
    assert base == {f"interval{number}.length": 5 for number in (1, 2, 3, 4)}
    assert space.config(dict.fromkeys(base, 2), BASE.name) == BASE
    config = space.config(base | {"interval1.length": 2, "interval2.length": 8}, "x")
    assert [expert.interval for expert in config.experts] == [(0, 100), (100, 500), (500, 750), (750, 1000)]
    crowded = space.config(
        base | {"interval1.length": 20, "interval2.length": 1, "interval3.length": 1, "interval4.length": 1}, "x"
    )
    assert crowded.experts[-1].interval == (950, 1000)


def test_boundaries_need_a_base_on_their_grid_and_timesteps_enough():
    first, *others = [expert.model_dump() for expert in BASE.experts]
    moved = BASE.with_(experts=[first | {"interval": (0, 233)}, others[0] | {"interval": (233, 500)}, *others[1:]])
    with pytest.raises(UserError, match="dimensions: boundaries lie on a grid of 1/20 of 1000 timesteps"):
        build_space(moved, ("boundaries",))
    brief = BASE.with_(
        diffusion={"timesteps": 16},
        sampling={"steps": 8},
        experts=[e.model_dump() | {"interval": i} for e, i in zip(BASE.experts, even_intervals(4, 16), strict=True)],
    )
    with pytest.raises(UserError, match="dimensions: boundaries needs at least 20 timesteps, not 16"):
        build_space(brief, ("boundaries",))


def test_alone_an_expert_has_neither_probability_nor_boundaries():
    space = build_space(ALONE, ("p", "boundaries", "time"))
    assert list(space.domains) == ["expert1.time"]
    assert "expert1.p" in build_space(ALONE, ("p", "experts")).domains
    with pytest.raises(UserError, match="dimensions: p boundaries leave nothing to search in digits-iu-ldm-s"):
        build_space(ALONE, ("p", "boundaries"))


# Domains


def test_strides_divide_the_map_and_the_networks_own_is_among_them():
    domains = build_space(BASE, ("pool_stride",)).domains
    assert domains["expert1.level1.pool_stride"] == domains["expert1.level2.pool_stride"] == Choice((1, 2, 4))
    odd = BASE.with_(image={"size": 12}, network={"pool_strides": (3, 2)})
    domains = build_space(odd, ("pool_stride",)).domains
    assert domains["expert1.level1.pool_stride"] == Choice((1, 2, 3, 4))
    assert domains["expert1.level2.pool_stride"] == Choice((1, 2))


WRONG = {
    "misspelt": (("split", "tme"), "dimensions: there is no 'tme'; did you mean time?"),
    "like no other": (("zzz",), "dimensions: there is no 'zzz'; allowed are split, p, pool_stride"),
    "none": ((), "dimensions: name at least one of split, p, pool_stride"),
}


@pytest.mark.parametrize("case", WRONG)
def test_unknown_dimensions_are_refused_with_what_there_is(case):
    dimensions, sentence = WRONG[case]
    with pytest.raises(UserError) as error:
        build_space(BASE, dimensions)
    assert str(error.value).startswith(sentence)
