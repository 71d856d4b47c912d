"""The table of presets: every row of the paper is there, and holds what the paper says of it."""

import pytest

from meme.config.presets import SOFT_PROBABILITIES, preset, preset_names, yardsticks
from meme.config.schema import Config
from meme.errors import UserError
from meme.paper.printed import PRINTED

LATENT = ["ldm-l", "ldm-s", "iu-ldm-s", "multi-expert-hard", "multi-expert", "meme-hard", "meme", "lite-ldm"]
ROWS = [
    *(f"{family}-{row}" for family in ("ffhq", "celebahq", "cifar10", "thumbnails", "tiny", "digits") for row in LATENT),
    *(f"celeba64-{row}" for row in ("adm-s", "iu-adm-s", "multi-expert", "meme")),
    "imagenet-ldm-l",
    "imagenet-meme",
]


def test_every_row_of_the_paper_is_there():
    assert sorted(preset_names()) == sorted(ROWS)
    assert set(PRINTED) <= set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_a_preset_survives_yaml(name, tmp_path):
    preset(name).save(tmp_path / "config.yaml")
    assert Config.load(tmp_path / "config.yaml") == preset(name)


@pytest.mark.parametrize("name", ROWS)
def test_hard_soft_and_single_are_what_their_names_say(name):
    probabilities = tuple(expert.p for expert in preset(name).experts)
    expected = (1.0,) * 4 if name.endswith("hard") else SOFT_PROBABILITIES if name.split("-")[1] in ("meme", "multi") else (1.0,)
    assert probabilities == expected


def test_table_3():
    large, small = preset("ffhq-ldm-l").training, preset("ffhq-meme").training
    assert (large.steps, large.batch_size, large.learning_rate) == (540_000, 42, 9.6e-5)
    assert (small.steps, small.batch_size, small.learning_rate) == (135_000, 84, 1.92e-4)
    large, small = preset("celebahq-ldm-l").training, preset("celebahq-meme").training
    assert (large.steps, large.batch_size, large.learning_rate) == (410_000, 48, 8.4e-5)
    assert (small.steps, small.batch_size, small.learning_rate) == (85_000, 96, 1.68e-4)
    diffusion = preset("ffhq-meme").diffusion
    assert (diffusion.timesteps, diffusion.schedule) == (1000, "scaled_linear")
    assert (diffusion.beta_start, diffusion.beta_end) == (0.0015, 0.0195)
    assert [preset(f"{family}-meme").sampling.steps for family in ("ffhq", "celebahq", "celeba64")] == [200, 50, 50]
    assert [preset(f"{family}-meme").evaluation.samples for family in ("ffhq", "celebahq", "celeba64", "imagenet")] == [
        50_000,
        50_000,
        10_000,
        10_000,
    ]


def test_a_small_network_alone_is_trained_as_long_as_four_experts():
    for family in ("ffhq", "celebahq", "cifar10", "thumbnails", "tiny", "digits"):
        steps = 4 * preset(f"{family}-meme").training.steps
        assert preset(f"{family}-ldm-s").training.steps == preset(f"{family}-iu-ldm-s").training.steps == steps


def test_table_5_and_the_weights_it_was_trained_with():
    config = preset("celeba64-meme")
    training, network, diffusion = config.training, config.network, config.diffusion
    assert training.steps * training.batch_size == 1_600_000
    assert (training.batch_size, training.learning_rate, training.p2_gamma, training.p2_k) == (8, 2e-5, 1.0, 1.0)
    assert (network.learned_variance, network.dropout, network.head_channels, network.depth) == (True, 0.1, 64, 1)
    assert preset("celeba64-iu-adm-s").network.head_channels == 32
    assert (diffusion.schedule, diffusion.beta_start, diffusion.beta_end) == ("linear", 1e-4, 0.02)


def test_latents_and_pixels():
    assert preset("ffhq-meme").pixels.model_dump() == {"channels": 3, "size": 256}
    assert preset("ffhq-meme").image.model_dump() == {"channels": 3, "size": 64}
    assert preset("imagenet-meme").pixels.model_dump() == {"channels": 3, "size": 256}
    assert preset("imagenet-meme").image.model_dump() == {"channels": 4, "size": 32}
    assert preset("celeba64-meme").pixels == preset("celeba64-meme").image
    for name in ROWS:
        is_latent = name.startswith(("ffhq", "celebahq", "imagenet"))
        assert (preset(name).first_stage is not None) == is_latent


def test_only_imagenet_is_class_conditional_and_guided():
    for name in ROWS:
        config = preset(name)
        conditional = name.startswith("imagenet")
        assert (config.network.classes == 1000) == conditional
        assert (config.sampling.guidance_scale != 1) == (config.training.label_dropout > 0) == conditional


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ffhq-meme", {"hand-made", "multi-expert", "single-model"}),
        ("celeba64-meme", {"hand-made", "multi-expert", "single-model"}),
        ("imagenet-meme", {"hand-made"}),
    ],
)
def test_yardsticks_are_the_rows_of_the_same_data(name, expected):
    assert set(yardsticks(name)) == expected


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="did you mean celeba64-meme"):
        preset("celeba64-mem")
