"""The trunk: its share of the steps, what experts take from it, and that every path of training trains it once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meme.config.presets import preset, preset_names
from meme.config.schema import Config
from meme.data.images import open_images
from meme.errors import UserError
from meme.network.unet import Denoiser, build_expert
from meme.pipeline import train
from meme.support.tensor_files import read_header
from meme.training.interval_loss import hold_out
from meme.training.trainer import expert_file, starting_expert, train_expert, train_trunk, training_id
from meme.training.trunk import start_from_trunk, trunk_config, with_trunk_share
from meme_nas.worker.bank import ExpertBank

CONFIG = preset("digits-meme").with_(
    network={"channels": 8, "head_channels": 4},
    experts=[{"interval": (0, 500), "p": 0.5, "low_channels": (4, 8)}, {"interval": (500, 1000), "low_channels": (8, 0)}],
    training={"steps": 3, "batch_size": 4, "trunk_steps": 4},
)


@pytest.fixture(scope="module")
def images():
    return open_images("digits", size=8, channels=1)


def with_split(*low_channels: int) -> Config:
    return CONFIG.with_(experts=[{"interval": (0, 1000), "low_channels": low_channels}])


def filled(config: Config, value: float) -> Denoiser:
    expert = build_expert(config, 1)
    for weight in expert.parameters():
        weight.data.fill_(value)
    return expert


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


@given(st.sampled_from([name for name in preset_names() if not name.startswith("imagenet")]), st.floats(0, 0.99))
@settings(max_examples=50)
def test_a_share_keeps_the_sum_of_all_steps(name, share):
    config = preset(name)
    shared = with_trunk_share(config, share)
    count, training = len(config.experts), shared.training
    assert 0 <= count * config.training.steps - count * training.steps - training.trunk_steps < count
    assert abs(training.trunk_steps - share * count * config.training.steps) <= 0.5
    again = with_trunk_share(shared, share).training
    assert abs(again.trunk_steps - training.trunk_steps) <= count


def test_no_share_is_the_config_itself():
    assert with_trunk_share(preset("tiny-meme"), 0.0) == preset("tiny-meme")
    assert preset("tiny-meme").architecture_id != with_trunk_share(preset("tiny-meme"), 0.5).architecture_id
    assert "trunk" not in preset("tiny-meme").to_yaml()


@pytest.mark.parametrize("share", [-0.1, 1.0, 2.0, float("nan")])
def test_a_share_that_leaves_nothing_or_less_is_refused(share):
    with pytest.raises(UserError, match="trunk_share: must be at least 0 and below 1"):
        with_trunk_share(preset("tiny-meme"), share)
    with pytest.raises(UserError, match="no step of their own"):
        with_trunk_share(preset("tiny-meme"), 0.9999)


def test_configs_that_differ_in_their_experts_share_one_trunk(images):
    hard = preset("digits-meme-hard").with_(training={"trunk_steps": 10})
    soft = preset("digits-meme").with_(training={"trunk_steps": 10})
    assert training_id(trunk_config(hard), 1, images) == training_id(trunk_config(soft), 1, images)
    assert trunk_config(soft).experts[0].low_channels == preset("digits-meme").experts[1].low_channels
    assert training_id(soft, 1, images) != training_id(preset("digits-meme"), 1, images)
    longer = soft.with_(training={"trunk_steps": 11})
    assert training_id(soft, 1, images) != training_id(longer, 1, images)


def test_an_expert_with_the_trunks_split_begins_as_the_trunk():
    trunk = filled(with_split(4, 8), 0.5)
    expert = build_expert(with_split(4, 8), 1)
    start_from_trunk(expert, trunk)
    assert same(expert, trunk)


@given(st.tuples(st.sampled_from([0, 4, 8]), st.sampled_from([0, 4, 8, 12, 16])))
@settings(max_examples=20)
def test_an_expert_takes_what_lies_in_both_slices_and_keeps_the_rest(split):
    """Counted by hand: of the fused branches, columns are taken where both have the channel in the same branch."""
    own, theirs = with_split(*split), with_split(4, 8)
    expert, fresh = build_expert(own, 1), build_expert(own, 1)
    start_from_trunk(expert, filled(theirs, 0.5))
    for level, width in ((0, 8), (1, 16)):
        low, trunks_low = split[level], (4, 8)[level]
        fusion = expert.encoder[2 * level][0].mixer.fusion.out.weight
        high, common_high = width - low, min(width - low, width - trunks_low)
        is_common = torch.zeros(fusion.shape[1], dtype=torch.bool)
        is_common[:common_high] = is_common[high : high + common_high] = True
        is_common[2 * high + max(0, low - trunks_low) :] = low > 0
        assert (fusion[:, is_common] == 0.5).all()
        assert torch.equal(fusion[:, ~is_common], fresh.encoder[2 * level][0].mixer.fusion.out.weight[:, ~is_common])
    assert (expert.decoder[0][0].conv_in.weight == 0.5).all()


@pytest.mark.parametrize("low", [0, 4])
def test_the_pooling_branch_takes_the_weights_of_its_own_channels(low):
    """At level 2 of 16 channels, the trunk's high mixer has 8: channels 0-3 go through convolution, 4-7 through pooling."""
    trunk = build_expert(with_split(4, 8), 1)
    theirs = trunk.encoder[2][0].mixer.high.pool_out.weight.data
    theirs.copy_(torch.arange(4, 8).float().expand(8, 4))  # each weight is the number of the channel that it meets
    expert, fresh = build_expert(with_split(4, low), 1), build_expert(with_split(4, low), 1)
    start_from_trunk(expert, trunk)
    own, before = (each.encoder[2][0].mixer.high.pool_out.weight for each in (expert, fresh))
    high = 16 - low
    for column, channel in enumerate(range(high // 2, high)):
        expected = torch.full((8,), float(channel)) if channel < 8 else before[:8, column]
        assert torch.equal(own[:8, column], expected)
    assert torch.equal(own[8:], before[8:])


def test_every_path_trains_the_same_experts_from_one_trunk(images, tmp_path):
    data, held_out = hold_out(images)
    ensemble = train(CONFIG, data, folder=tmp_path / "out")
    assert read_header(expert_file(tmp_path / "out", 0))["step"] == 4
    alone = train_expert(CONFIG, 2, data)
    assert same(ensemble.experts[1], alone)
    bank = ExpertBank(tmp_path / "bank", data, held_out)
    assert same(bank.load(CONFIG, 2, bank.obtain(CONFIG, 2)), alone)
    assert bank.find(trunk_config(CONFIG), 1).steps == 4


def test_the_trunk_reports_as_number_0_and_is_not_trained_twice(images, tmp_path):
    told = []
    train_trunk(CONFIG, images, folder=tmp_path, on_progress=told.append)
    assert [(progress.expert, progress.step, progress.steps) for progress in told] == [(0, 4, 4)]
    told.clear()
    train_expert(CONFIG, 1, images, folder=tmp_path, on_progress=told.append)
    assert [progress.expert for progress in told] == [1]
    assert train_trunk(preset("digits-meme"), images, folder=tmp_path) is None


def test_an_expert_without_its_trunk_is_an_error():
    with pytest.raises(ValueError, match="no trunk is given"):
        starting_expert(CONFIG, 1)
