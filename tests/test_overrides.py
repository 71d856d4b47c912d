"""What an expert may have instead of the paper's iFormer block: against other operators, and beside the network it overrides."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ids import DATA, ids
from torch import Tensor, nn

from meme.config.presets import preset
from meme.config.schema import split_choices
from meme.network.iformer import HighMixer, IFormerBlock, LowMixer, TimeModulation
from meme.network.unet import Denoiser, build_expert
from meme.training.trainer import expert_file, load_expert, save_expert

BASE = preset("digits-meme")  # widths 16 and 32 at 8 and 4 pixels, heads of 8, pool strides 2 and 1
SPLITS = st.tuples(*(st.sampled_from(split_choices(width, 8)) for width in BASE.network.widths))
OVERRIDES = st.fixed_dictionaries(
    {},
    optional={
        "pool_strides": st.tuples(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4])),
        "low_pools": st.tuples(*[st.sampled_from(["average", "max"])] * 2),
        "high_pools": st.tuples(*[st.sampled_from(["max", "average", "none"])] * 2),
        "time_conditioning": st.sampled_from(["none", "additive", "adaptive-norm"]),
    },
)
CONDITIONED = ["additive", "adaptive-norm"]


def expert_with(split: tuple[int, ...] = (8, 16), network: dict | None = None, **overrides) -> Denoiser:
    experts = [{"interval": (0, 1000), "low_channels": split, **overrides}]
    return build_expert(BASE.with_(network=network or {}, experts=experts), 1)


@torch.no_grad()
def randomize(module: nn.Module) -> nn.Module:
    source = torch.Generator().manual_seed(1)
    for weight in module.parameters():
        weight.copy_(torch.randn(weight.shape, generator=source) * 0.3)
    return module


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


# The pools


def neighbours(x: Tensor) -> Tensor:
    """Every pixel's 3x3 neighbours, NaN outside the image: (B, C, H, W) to (9, B, C, H, W)."""
    height, width = x.shape[2:]
    padded = F.pad(x, (1, 1, 1, 1), value=math.nan)
    return torch.stack([padded[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3)])


@torch.no_grad()
@pytest.mark.parametrize("pool", ["max", "average", "none"])
def test_the_high_mixers_second_branch_takes_what_it_says(pool):
    mixer, x = randomize(HighMixer(16, 12, pool)), noise(2, 12, 5, 6)
    near = neighbours(x[:, 6:])
    taken = {"max": near.nan_to_num(nan=-math.inf).amax(0), "average": near.nanmean(0), "none": x[:, 6:]}[pool]
    expected = F.gelu(channels_last(taken) @ mixer.pool_out.weight.T + mixer.pool_out.bias)
    torch.testing.assert_close(mixer(channels_last(x))[1], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("stride", [2, 4])
def test_the_low_mixer_attends_over_maxima(stride):
    """Maxima pooled beforehand and attended over at stride 1 come to the same, each repeated over its pixels."""
    pooling, at_once, x = LowMixer(16, 8, 4, stride, "max"), LowMixer(16, 8, 4, 1), noise(2, 8, 4, 8)
    randomize(pooling), randomize(at_once)
    small = x.unflatten(2, (4 // stride, stride)).unflatten(4, (8 // stride, stride)).amax((3, 5))
    expected = at_once(channels_last(small)).repeat_interleave(stride, 1).repeat_interleave(stride, 2)
    torch.testing.assert_close(pooling(channels_last(x)), expected, atol=1e-5, rtol=1e-5)


# The time


@torch.no_grad()
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_time_shifts_or_scales_and_shifts_each_channel(adaptive):
    modulation, x, embedding = randomize(TimeModulation(6, 10, adaptive)), noise(3, 2, 4, 6), noise(3, 10)
    signal = embedding @ modulation.out.weight.T + modulation.out.bias
    for image in range(3):
        scale = 1 + signal[image, :6] if adaptive else 1
        torch.testing.assert_close(modulation(x, embedding)[image], x[image] * scale + signal[image, -6:])


@torch.no_grad()
@pytest.mark.parametrize("kind", CONDITIONED)
def test_a_conditioned_network_begins_as_the_paper_has_it(kind):
    """Also where the rest of the weights is not at its start, so that a difference would show."""
    conditioned, plain = expert_with(time_conditioning=kind), expert_with()
    ours, theirs = conditioned.state_dict(), plain.state_dict()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    added = set(ours) - set(theirs)
    assert added and all(".time_mixer." in name or ".time_mlp." in name for name in added)
    assert not any(ours[name].any() for name in added)
    conditioned.load_state_dict(randomize(plain).state_dict(), strict=False)
    x, t = noise(2, 1, 8, 8), torch.tensor([5, 900])
    assert torch.equal(conditioned(x, t), plain(x, t))


@torch.no_grad()
@pytest.mark.parametrize("kind", CONDITIONED)
def test_a_conditioned_block_sees_the_time_before_mixer_and_mlp(kind):
    x = noise(1, 16, 4, 4)
    for part in ("time_mixer", "time_mlp"):
        block = IFormerBlock(16, 8, 4, 2, True, time_conditioning=kind, embedding=10)
        for scale in (block.scale_mixer, block.scale_mlp):
            scale.fill_(1.0)
        assert torch.equal(randomized_but(block, part)(x, noise(1, 10)), block(x, noise(1, 10)))
        assert not torch.equal(block(x, noise(1, 10)), block(x, -noise(1, 10)))


def randomized_but(block: IFormerBlock, part: str) -> IFormerBlock:
    """Only ``part`` of the two that see the time does anything."""
    for name in ("time_mixer", "time_mlp"):
        modulation = getattr(block, name)
        randomize(modulation) if name == part else [weight.zero_() for weight in modulation.parameters()]
    return block


# Whole networks


@settings(deadline=None, max_examples=30)
@given(SPLITS, OVERRIDES, st.sampled_from([1, 2]))
def test_every_override_builds_runs_and_trains_all_its_weights(split, overrides, depth):
    network = randomize(expert_with(split, {"depth": depth}, **overrides))
    x = noise(2, 1, 8, 8)
    output = network(x, torch.tensor([0, 999]))
    output.square().mean().backward()
    assert output.shape == x.shape
    assert [name for name, weight in network.named_parameters() if weight.grad is None or not weight.grad.any()] == []


@settings(deadline=None, max_examples=15)
@given(SPLITS, OVERRIDES)
def test_overrides_change_no_weight_that_the_papers_network_has(split, overrides):
    overridden, plain = expert_with(split, **overrides).state_dict(), expert_with(split).state_dict()
    assert [name for name in plain if not torch.equal(overridden[name], plain[name])] == []


@torch.no_grad()
@settings(deadline=None, max_examples=30)
@given(SPLITS, OVERRIDES)
def test_the_canonical_expert_is_the_same_network(split, overrides):
    expert = BASE.experts[0].model_copy(update={"low_channels": split, **overrides})
    short = expert.canonical(BASE.network)
    networks = [
        randomize(build_expert(BASE.with_(experts=[each.model_dump() | {"interval": (0, 1000)}]), 1)) for each in (expert, short)
    ]
    x, t = noise(1, 1, 8, 8), torch.tensor([300])
    assert torch.equal(networks[0](x, t), networks[1](x, t))
    assert short.canonical(BASE.network) == short


@torch.no_grad()
@pytest.mark.parametrize(
    "overrides",
    [
        {"pool_strides": (4, 1)},
        {"low_pools": ("max", "average")},
        {"high_pools": ("none", "max")},
        {"high_pools": ("average", "max")},
    ],
)
def test_every_pool_changes_what_the_network_does(overrides):
    x, t = noise(1, 1, 8, 8), torch.tensor([300])
    assert not torch.allclose(randomize(expert_with(**overrides))(x, t), randomize(expert_with())(x, t))


@pytest.mark.parametrize("family", ["iu-net", "iu-adm"])
def test_classes_and_adm_take_conditioned_blocks(family):
    classes = {"classes": 3, "attention_downsamples": (2,)} if family == "iu-net" else {}
    network = expert_with(network={"family": family, **classes}, time_conditioning="adaptive-norm")
    inputs = (noise(2, 1, 8, 8), torch.tensor([1, 2]), *([torch.tensor([0, 3])] if classes else []))
    assert network(*inputs).shape == (2, 1, 8, 8)


# Files


def test_an_overridden_expert_has_ids_of_its_own_and_comes_back_from_its_file(tmp_path):
    first, *others = [expert.model_dump() for expert in BASE.experts]
    changed = BASE.with_(experts=[first | {"time_conditioning": "additive", "low_pools": ("max", "average")}, *others])
    whole, (first_ids, last_ids) = ids(changed)
    base_whole, (base_first, base_last) = ids(BASE)
    assert whole != base_whole
    assert not set(first_ids) & set(base_first)
    assert last_ids == base_last
    network = randomize(build_expert(changed, 1))
    save_expert(network, changed, 1, DATA, expert_file(tmp_path, 1))
    x, t = noise(1, 1, 8, 8), torch.tensor([7])
    assert torch.equal(load_expert(changed, 1, tmp_path)(x, t), network.eval()(x, t))
