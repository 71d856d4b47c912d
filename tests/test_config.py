"""Settings: what is wrong is refused in a sentence, files round-trip, and ids say what would be trained."""

import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from meme.config.presets import hand_made_split, preset, preset_names
from meme.config.schema import Config, NetworkConfig, even_intervals, split_choices, stable_id
from meme.errors import UserError

TRAINING = {"steps": 1_500, "batch_size": 64, "learning_rate": 2e-3, "warmup_steps": 20, "gradient_clip": 1.0, "ema_decay": 0.995}
BASE = preset("digits-meme").with_(training=TRAINING)  # widths 16 and 32, heads of 8, four experts, T = 1000
ALL_OF_T = {"interval": (0, 1000), "low_channels": (8, 16)}


@pytest.fixture
def load(tmp_path):
    """Read a config file of the given text."""

    def load(text):
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return Config.load(path)

    return load


@pytest.fixture
def complaint(load):
    """What a user is told of a file that differs from the base in the given sections."""

    def complaint(**sections):
        content = BASE.model_dump(mode="json")
        for key, value in sections.items():
            content[key] = {**(content[key] or {}), **value} if isinstance(value, dict) and key in content else value
        with pytest.raises(UserError) as error:
            load(yaml.safe_dump(_plain(content)))
        return str(error.value)

    return complaint


def _plain(value):
    """Tuples as lists, as YAML has them."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def experts_at(*intervals):
    return [{"interval": interval, "low_channels": (8, 16)} for interval in intervals]


WRONG = {
    "split between heads": ({"experts": [ALL_OF_T | {"low_channels": (8, 12)}]}, "experts[1].low_channels[2]", "8 from 0 to 32"),
    "split above the width": (
        {"experts": [ALL_OF_T | {"low_channels": (24, 8)}]},
        "experts[1].low_channels[1]",
        "0 to 16, not 24",
    ),
    "split below zero": ({"experts": [ALL_OF_T | {"low_channels": (8, -8)}]}, "experts[1].low_channels[2]", "equal to 0, not -8"),
    "too few levels": ({"experts": [ALL_OF_T | {"low_channels": (8,)}]}, "experts[1].low_channels", "each of 2 levels, not 1"),
    "split outside the iU-Net": ({"network": {"family": "ldm"}}, "experts[1].low_channels", "only the iU-Net splits"),
    "override outside the iU-Net": (
        {"network": {"family": "ldm"}, "experts": [{"interval": (0, 1000), "time_conditioning": "additive"}]},
        "experts[1].time_conditioning",
        "only the iU-Net has iFormer blocks; leave it out with network.family ldm",
    ),
    "pools of too few levels": ({"experts": [ALL_OF_T | {"low_pools": ("max",)}]}, "experts[1].low_pools", "each of 2 levels"),
    "unknown pool": (
        {"experts": [ALL_OF_T | {"low_pools": ("max", "min")}]},
        "experts[1].low_pools[2]",
        "'average' or 'max', not 'min'",
    ),
    "unknown conditioning": (
        {"experts": [ALL_OF_T | {"time_conditioning": "gated"}]},
        "experts[1].time_conditioning",
        "'none', 'additive' or 'adaptive-norm', not 'gated'",
    ),
    "expert's pools that do not fit": (
        {"experts": [ALL_OF_T | {"pool_strides": (2, 3)}]},
        "experts[1].pool_strides[2]",
        "must divide the 4 pixels a side of level 2, not 3",
    ),
    "p above 1": ({"experts": [ALL_OF_T | {"p": 1.1}]}, "experts[1].p", "less than or equal to 1, not 1.1"),
    "p below 0": ({"experts": [ALL_OF_T | {"p": -0.1}]}, "experts[1].p", "greater than or equal to 0, not -0.1"),
    "p not a number": ({"experts": [ALL_OF_T | {"p": float("nan")}]}, "experts[1].p", "not nan"),
    "gap": ({"experts": experts_at((0, 400), (500, 1000))}, "experts[2].interval", "begin at 400"),
    "overlap": ({"experts": experts_at((0, 600), (500, 1000))}, "experts[2].interval", "begin at 600"),
    "first not at 0": ({"experts": experts_at((1, 1000))}, "experts[1].interval", "begin at 0"),
    "empty interval": ({"experts": experts_at((0, 500), (500, 500), (500, 1000))}, "experts[2].interval", "end after it"),
    "end before T": ({"experts": experts_at((0, 999))}, "experts[1].interval", "end at 1000 timesteps, not 999"),
    "end after T": ({"experts": experts_at((0, 1001))}, "experts[1].interval", "end at 1000 timesteps, not 1001"),
    "no experts": ({"experts": []}, "experts", "at least 1 item"),
    "image not divisible": ({"image": {"size": 9}}, "image.size", "multiple of 2"),
    "image not divisible by pools": ({"network": {"pool_strides": (2, 8)}}, "image.size", "multiple of 16 (level 2"),
    "attention at no level": (
        {"network": {"attention_downsamples": (4,)}},
        "network.attention_downsamples",
        "allowed are [1, 2]",
    ),
    "pools of another depth": ({"network": {"pool_strides": (1,)}}, "network.pool_strides", "one stride for each of 2 levels"),
    "LayerScale below": ({"network": {"layer_scale_levels": (3,)}}, "network.layer_scale_levels", "levels go from 1 to 2"),
    "heads do not fit": ({"network": {"head_channels": 12}}, "network.head_channels", "divide every level's width (16, 32)"),
    "groups do not fit": ({"network": {"norm_groups": 5}}, "network.norm_groups", "divide every level's width (16, 32)"),
    "odd heads": ({"network": {"channels": 10, "head_channels": 5}}, "network.head_channels", "must be even"),
    "odd width": ({"network": {"channels": 15, "head_channels": 5}}, "network.channels", "must be even"),
    "classes of ADM": ({"network": {"family": "iu-adm", "classes": 3}}, "network.classes", "only families ldm and iu-net"),
    "iFormer blocks of too few levels": ({"network": {"iformer_blocks": (1,)}}, "network.iformer_blocks", "each of 2 levels"),
    "more iFormer blocks than blocks": ({"network": {"iformer_blocks": (1, 2)}}, "network.iformer_blocks", "at most the depth 1"),
    "guidance without classes": ({"sampling": {"guidance_scale": 2.0}}, "sampling.guidance_scale", "only a class-conditional"),
    "dropped labels without classes": (
        {"training": {"label_dropout": 0.1}},
        "training.label_dropout",
        "only a class-conditional",
    ),
    "guidance without dropped labels": (
        {"network": {"classes": 3}, "sampling": {"guidance_scale": 2.0}},
        "sampling.guidance_scale",
        "must be 1 unless training.label_dropout",
    ),
    "unknown first stage": ({"first_stage": {"kind": "gan"}}, "first_stage.kind", "'vq' or 'kl', not 'gan'"),
    "scale of nothing": ({"first_stage": {"scale_factor": 0.0}}, "first_stage.scale_factor", "greater than 0"),
    "unknown family": ({"network": {"family": "vit"}}, "network.family", "'ldm', 'adm', 'iu-net' or 'iu-adm', not 'vit'"),
    "too many DDIM steps": ({"sampling": {"steps": 501}}, "sampling.steps", "at most 500 with ddim"),
    "too many DDPM steps": ({"sampling": {"sampler": "ddpm", "steps": 1001}}, "sampling.steps", "at most 1000 with ddpm"),
    "no training": ({"training": {"steps": 0}}, "training.steps", "greater than or equal to 1, not 0"),
    "no sample": ({"evaluation": {"samples": 1}}, "evaluation.samples", "greater than or equal to 2, not 1"),
    "misspelt key": ({"training": {"learning_rte": 1}}, "training.learning_rte", "did you mean learning_rate?"),
    "misspelt expert key": ({"experts": [ALL_OF_T | {"lowchannels": 1}]}, "experts[1].lowchannels", "did you mean low_channels?"),
    "misspelt section": ({"trainig": {}}, "trainig", "did you mean training?"),
    "key like no other": ({"zzz": 1}, "zzz", "allowed are name, data, image"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_value_is_refused_with_its_field_and_what_is_allowed(case, complaint):
    sections, field, allowed = WRONG[case]
    told = complaint(**sections)
    assert f"config.yaml: {field}: " in told
    assert allowed in told
    assert "\n" not in told


def test_a_missing_section_is_named(load):
    without = BASE.model_dump(mode="json", exclude={"training"})
    with pytest.raises(UserError, match=r"training: field required"):
        load(yaml.safe_dump(without))


@pytest.mark.parametrize("name", preset_names())
def test_a_saved_config_loads_as_the_same(name, tmp_path):
    config = preset(name)
    config.save(tmp_path / "config.yaml")
    loaded = Config.load(tmp_path / "config.yaml")
    assert loaded == config
    assert loaded.to_yaml() == config.to_yaml()
    assert loaded.architecture_id == config.architecture_id


@settings(deadline=None, max_examples=25)
@given(p=st.floats(0, 1), rate=st.floats(min_value=0, exclude_min=True, allow_infinity=False), name=st.text())
def test_no_number_or_name_is_changed_by_yaml(p, rate, name):
    config = BASE.with_(name=name, experts=[ALL_OF_T | {"p": p}], training={"learning_rate": rate})
    assert Config.model_validate(yaml.safe_load(config.to_yaml())) == config


def test_a_hostile_file_is_refused_and_not_executed(load, tmp_path):
    proof = tmp_path / "executed"
    with pytest.raises(UserError, match="not a readable YAML file"):
        load(f"name: !!python/object/apply:os.system ['touch {proof}']")
    assert not proof.exists()


@pytest.mark.parametrize("text", ["name: 2024-13-45", "a: [", "x: \x00", "[" * 1000, "- a list", "", "&a [*a]", "1: 2"])
def test_a_file_that_is_no_config_is_a_user_error(load, text):
    with pytest.raises(UserError, match=r"config\.yaml: ") as error:
        load(text)
    assert "\n" not in str(error.value)


LAUGHS = "a: &a [x, x]\nb: &b [*a, *a]\n"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (LAUGHS, r"the reference \*a is not followed"),
        ("a: &a {x: 1}\nb: {<<: *a}", r"the reference \*a is not followed"),
        ("[" * 5_000, "recursion"),
        ("name: !!int ''", "not a readable YAML file"),
        ("name: !!bool perhaps", "not a readable YAML file"),
        ("[" + "1," * 2**18 + "]", "larger than 256 KiB"),
    ],
)
def test_yaml_that_grows_or_trips_its_reader_is_refused(load, text, complaint):
    with pytest.raises(UserError, match=complaint):
        load(text)


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("field", ["weight_decay", "gradient_clip", "p2_gamma", "p2_k", "learning_rate"])
def test_numbers_are_finite(field, number):
    with pytest.raises(ValueError, match=rf"training\.{field}"):
        BASE.with_(training={field: number})


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("name: digits-meme", "name: {a: 0x" + "f" * 9_000 + "}", "name: input should be a valid string, not "),
        ("size: 8", "size: 0x" + "f" * 9_000, "image.size: input should be less than or equal to 9007199254740992, not "),
        ("name: digits-meme", "name: " + "[" * 90 + "]" * 90, "name: input should be a valid string, not "),
        ("data: digits", "? " + "z" * 9_000 + "\n: 1", r"z{100,}\.\.\.: unknown key; allowed are"),
        ("data: digits", '"x\\nerror: \\e[31mforged": 1', r"x\\nerror: \\x1b\[31mforged: unknown key; allowed are"),
    ],
)
def test_a_vast_or_forged_value_is_named_in_one_short_line(load, old, new, sentence):
    assert old in BASE.to_yaml()
    with pytest.raises(UserError, match=sentence) as caught:
        load(BASE.to_yaml().replace(old, new))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 700


def test_no_more_levels_and_channels_than_anyone_needs():
    with pytest.raises(ValueError, match=r"network\.multipliers"):
        BASE.with_(network={"multipliers": [1] * 17})
    with pytest.raises(ValueError, match="less than or equal to 9007199254740992"):
        BASE.with_(network={"channels": 10**30})


def test_a_file_that_is_not_there_or_no_text_is_a_user_error(tmp_path):
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00\xd8")
    for name in ("absent.yaml", "bytes.yaml", ""):
        with pytest.raises(UserError, match="not a readable YAML file"):
            Config.load(tmp_path / name)


@pytest.mark.parametrize(
    "sections",
    [{"name": "other"}, {"data": "elsewhere"}, {"evaluation": {"samples": 7, "seed": 3}}, {"sampling": {"steps": 10}}],
)
def test_the_architecture_id_ignores_what_no_training_sees(sections):
    assert BASE.with_(**sections).architecture_id == BASE.architecture_id


def changed_first_expert(**fields):
    first, *others = [expert.model_dump() for expert in BASE.experts]
    return {"experts": [first | fields, *others]}


MATTERS = [
    {"image": {"channels": 3}},
    {"image": {"size": 16}},
    {"first_stage": {"downsample": 4}},
    {"network": {"channels": 32}, **changed_first_expert(low_channels=(8, 16))},
    {"network": {"depth": 2}},
    {"network": {"attention_downsamples": (2,)}},
    {"network": {"norm_groups": 4}},
    {"network": {"dropout": 0.1}},
    {"network": {"pool_strides": (1, 1)}},
    {"network": {"layer_scale_levels": (2,)}},
    {"network": {"learned_variance": True}},
    {"network": {"classes": 10}},
    {"network": {"classes": 10, "context_channels": 8}},
    {"network": {"family": "iu-adm"}},
    {"network": {"depth": 2, "iformer_blocks": (2, 1)}},
    {"network": {"classes": 10}, "training": {"label_dropout": 0.1}},
    {"training": {"p2_gamma": 1.0}},
    {"training": {"p2_gamma": 1.0, "p2_k": 2.0}},
    changed_first_expert(p=0.5),
    changed_first_expert(low_channels=(0, 0)),
    changed_first_expert(pool_strides=(4, 1)),
    changed_first_expert(low_pools=("max", "average")),
    changed_first_expert(high_pools=("max", "average")),
    changed_first_expert(high_pools=("max", "none")),
    changed_first_expert(time_conditioning="additive"),
    changed_first_expert(time_conditioning="adaptive-norm"),
    {"experts": [ALL_OF_T]},
    {"diffusion": {"schedule": "linear"}},
    {"diffusion": {"beta_start": 0.001}},
    {"diffusion": {"beta_end": 0.02}},
    {"training": {"steps": 10}},
    {"training": {"batch_size": 8}},
    {"training": {"learning_rate": 1e-3}},
    {"training": {"weight_decay": 0.0}},
    {"training": {"warmup_steps": 0}},
    {"training": {"gradient_clip": 0.5}},
    {"training": {"ema_decay": 0.9}},
    {"training": {"seed": 1}},
]


def test_the_architecture_id_changes_with_everything_that_is_trained():
    ids = [BASE.architecture_id] + [BASE.with_(**sections).architecture_id for sections in MATTERS]
    assert len(set(ids)) == len(MATTERS) + 1


def test_a_stable_id_is_the_same_on_every_machine_and_in_any_order():
    assert stable_id({"p": 0.1, "low": [8, None]}) == stable_id({"low": [8, None], "p": 0.1}) == "3e9ecb1bb949"


def test_the_architecture_id_ignores_p_only_where_the_interval_is_all_of_t():
    alone = [BASE.with_(experts=[ALL_OF_T | {"p": p}]).architecture_id for p in (0.1, 1.0)]
    halves = [BASE.with_(experts=[each | {"p": p} for each in experts_at((0, 500), (500, 1000))]) for p in (0.1, 1.0)]
    assert alone[0] == alone[1]
    assert halves[0].architecture_id != halves[1].architecture_id


WITHOUT_EFFECT = {
    "what holds anyway": {
        "pool_strides": (2, 1),
        "low_pools": ("average", "average"),
        "high_pools": ("max", "max"),
        "time_conditioning": "none",
    },
    "a low pool that pools nothing": {"low_pools": ("average", "max")},
    "a low pool at stride 1": {"low_channels": (8, 0), "pool_strides": (1, 1), "low_pools": ("max", "average")},
    "a stride no channel meets": {"low_channels": (8, 0), "pool_strides": (2, 4)},
    "a low pool no channel meets": {"low_channels": (8, 0), "pool_strides": (2, 2), "low_pools": ("average", "max")},
    "a high pool no channel meets": {"low_channels": (8, 32), "high_pools": ("max", "none")},
}


@pytest.mark.parametrize("case", WITHOUT_EFFECT)
def test_an_override_without_effect_is_no_other_architecture(case):
    overridden = BASE.with_(**changed_first_expert(**WITHOUT_EFFECT[case]))
    kept = {name: value for name, value in WITHOUT_EFFECT[case].items() if name == "low_channels"}
    kept |= {"pool_strides": (1, 1)} if case == "a low pool at stride 1" else {}
    plain = BASE.with_(**changed_first_expert(**kept))
    assert overridden.architecture_id == plain.architecture_id
    assert overridden.canonical_expert(1) == plain.canonical_expert(1)


def test_an_override_at_its_default_is_not_written(tmp_path):
    overrides = {"pool_strides", "low_pools", "high_pools", "time_conditioning"}
    assert not overrides & set(BASE.experts[0].model_dump())
    changed = BASE.with_(**changed_first_expert(low_pools=("max", "average"), time_conditioning="additive"))
    assert overrides & set(changed.experts[0].model_dump()) == {"low_pools", "time_conditioning"}
    changed.save(tmp_path / "config.yaml")
    assert Config.load(tmp_path / "config.yaml") == changed


def test_with_merges_a_section_and_leaves_the_original_alone():
    changed = BASE.with_(name="x", training={"steps": 5})
    assert changed.training == BASE.training.model_copy(update={"steps": 5})
    assert changed.name == "x"
    assert (BASE.name, BASE.training.steps) == ("digits-meme", 1_500)


@pytest.mark.parametrize("sections", [{"training": {"steps": 0}}, {"trainig": {"steps": 5}}, {"name": {"steps": 5}}])
def test_with_refuses_what_a_file_could_not_say(sections):
    with pytest.raises(ValidationError):
        BASE.with_(**sections)


def test_settings_cannot_be_changed_in_place():
    with pytest.raises(ValidationError, match="frozen"):
        BASE.training.steps = 3


@pytest.mark.parametrize("number", [0, 5, -1])
def test_expert_numbers_outside_1_to_n_are_refused(number):
    with pytest.raises(UserError, match=f"must be 1 to 4, not {number}"):
        BASE.expert(number)


@settings(deadline=None)
@given(st.data())
def test_even_intervals_tile_all_timesteps_with_lengths_equal_to_one_step(data):
    timesteps = data.draw(st.integers(1, 2_000))
    count = data.draw(st.integers(1, min(timesteps, 60)))
    intervals = even_intervals(count, timesteps)
    lengths = [end - first for first, end in intervals]
    assert len(intervals) == count
    assert [t for first, end in intervals for t in range(first, end)] == list(range(timesteps))
    assert max(lengths) - min(lengths) <= 1


def test_split_choices_go_from_all_convolution_to_all_attention():
    assert split_choices(128, 32) == (0, 32, 64, 96, 128)


def test_the_hand_made_split_at_the_papers_size_is_the_papers_table():
    network = preset("ffhq-meme").network
    table = [(32, 64, 192, 256), (32, 128, 256, 384), (32, 128, 288, 448), (64, 192, 320, 480)]
    assert [hand_made_split(network, number, 4) for number in (1, 2, 3, 4)] == table


@settings(deadline=None)
@given(st.data())
def test_the_hand_made_split_is_valid_at_any_other_size(data):
    head = data.draw(st.sampled_from([2, 8, 16]))
    multipliers = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=6))
    channels = head * data.draw(st.integers(1, 8))
    network = NetworkConfig(family="iu-net", channels=channels, multipliers=multipliers, head_channels=head, norm_groups=1)
    count = data.draw(st.integers(1, 9))
    splits = [hand_made_split(network, number, count) for number in range(1, count + 1)]
    for width, lows in zip(network.widths, zip(*splits, strict=True), strict=True):
        assert set(lows) <= set(split_choices(width, head))
        assert list(lows) == sorted(lows)  # never less attention where there is more noise


HINTS = {"digit-meme": "did you mean digits-meme?", "ffhq-mem": "did you mean ffhq-meme?", "!": "allowed are ffhq-ldm-l, "}


@pytest.mark.parametrize(("name", "hint"), HINTS.items())
def test_an_unknown_preset_names_the_nearest(name, hint):
    with pytest.raises(UserError) as error:
        preset(name)
    assert hint in str(error.value)
