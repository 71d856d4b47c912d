"""Networks against the paper's counts and against the same formulas written with other operators; and how they begin."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from meme.config.presets import preset
from meme.config.schema import ExpertConfig, ImageConfig, NetworkConfig, split_choices
from meme.network.blocks import AttentionBlock, Downsample, ResidualBlock
from meme.network.iformer import Fusion, HighMixer, IFormerBlock, LowMixer
from meme.network.unet import Denoiser, build_expert
from meme.support.torchvision_compat import make_torchvision_importable

BASE = preset("digits-meme")  # widths 16 and 32, heads of 8
SPLITS = st.tuples(*(st.sampled_from(split_choices(width, 8)) for width in BASE.network.widths))


def meta_expert(name: str, number: int) -> Denoiser:
    with torch.device("meta"):
        return build_expert(preset(name), number)


def expert_with(split: tuple[int, ...], seed: int = 0, **network) -> Denoiser:
    """A small iU-Net of one expert."""
    return build_expert(BASE.with_(network=network, experts=[{"interval": (0, 1000), "low_channels": split}]), 1, seed=seed)


@torch.no_grad()
def randomize(module: nn.Module) -> nn.Module:
    """No weight stays at zero or one, where it would hide a mistake."""
    source = torch.Generator().manual_seed(1)
    for weight in module.parameters():
        weight.copy_(torch.randn(weight.shape, generator=source) * 0.3)
    return module


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def layers(module: nn.Module, kind: type) -> list:
    return [layer for layer in module.modules() if isinstance(layer, kind)]


def parameters(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


# The paper's sizes


@pytest.mark.parametrize(
    ("name", "number", "count"),
    [
        ("ffhq-ldm-l", 1, 274_056_163),
        ("ffhq-ldm-s", 1, 89_535_619),
        ("ffhq-multi-expert", 4, 89_535_619),
        ("ffhq-meme", 1, 82_555_779),
        ("ffhq-meme", 2, 82_852_739),
        ("ffhq-meme", 3, 83_112_323),
        ("ffhq-meme", 4, 83_322_243),
    ],
)
def test_the_papers_networks_have_exactly_its_parameter_counts(name, number, count):
    assert parameters(meta_expert(name, number)) == count


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_a_block_has_as_many_parameters_as_the_formula_says(data):
    head = 2 * data.draw(st.integers(1, 16))
    width = head * data.draw(st.integers(1, 8))
    low = data.draw(st.sampled_from(split_choices(width, head)))
    layer_scale = data.draw(st.booleans())
    with torch.device("meta"):
        block = IFormerBlock(width, low, head, pool_stride=2, layer_scale=layer_scale)
    high = width - low
    formula = high**2 + 10 * high + 3 * low**2 + 3 * low + (low + 2 * high) * (width + 9) + 8 * width**2 + 10 * width
    assert parameters(block) == formula + 2 * width * layer_scale


def test_the_papers_encoder_opens_levels_with_iformer_blocks_and_ends_in_them():
    encoder = meta_expert("ffhq-meme", 1).encoder
    kinds = [type(layer) for stage in encoder for layer in stage]
    assert kinds == [IFormerBlock, ResidualBlock, Downsample] * 3 + [IFormerBlock] * 2


def test_the_papers_decoder_meets_skips_of_the_right_widths():
    network = meta_expert("ffhq-meme", 1)
    inputs = [block.conv_in.in_channels for block in layers(network.decoder, ResidualBlock)]
    assert inputs == [1024, 1024, 1024, 896, 768, 768, 640, 512, 512, 384, 256, 256]


def test_the_papers_attention_is_in_the_middle_and_in_the_decoder_at_32_16_and_8_pixels():
    network = meta_expert("ffhq-meme", 1)
    widths = [[block.qkv.in_features for block in layers(part, AttentionBlock)] for part in (network.middle, network.decoder)]
    assert widths == [[512], [512] * 3 + [384] * 3 + [256] * 3]
    assert not layers(network.encoder, AttentionBlock)


def test_layer_scale_is_at_levels_3_and_4_only_and_starts_at_1e_minus_6():
    blocks = layers(meta_expert("ffhq-meme", 2), IFormerBlock)
    assert [block.scale_mixer is not None for block in blocks] == [False, False, True, True, True]
    assert [block.scale_mlp is not None for block in blocks] == [False, False, True, True, True]
    scaled = IFormerBlock(8, 4, 4, 1, layer_scale=True)
    assert scaled.scale_mixer.tolist() == scaled.scale_mlp.tolist() == torch.full((8,), 1e-6).tolist()


def test_pooling_is_by_2_at_levels_1_and_2_only():
    assert [mixer.pool_stride for mixer in layers(meta_expert("ffhq-meme", 3), LowMixer)] == [2, 2, 1, 1, 1]


def test_every_encoder_stage_has_the_width_and_pixels_of_its_level():
    network = meta_expert("ffhq-meme", 1)
    seen = []
    for stage in network.encoder:
        stage.register_forward_hook(lambda stage, inputs, output: seen.append((output.shape[1], output.shape[2])))
    network(torch.empty(1, 3, 64, 64, device="meta"), torch.empty(1, device="meta"))
    level = [[(width, size)] * 2 for width, size in ((128, 64), (256, 32), (384, 16), (512, 8))]
    assert seen == [*level[0], (256, 32), *level[1], (384, 16), *level[2], (512, 8), *level[3]]


# The mixers, written with other operators on (B, C, H, W)


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def shifts(x: Tensor, fill: float) -> list[Tensor]:
    """The nine neighbours of every pixel, row by row: 9 x (B, C, H, W)."""
    height, width = x.shape[2:]
    padded = F.pad(x, (1, 1, 1, 1), value=fill)
    return [padded[:, :, down : down + height, right : right + width] for down in range(3) for right in range(3)]


def depthwise_by_shifts(x: Tensor, weight: Tensor) -> Tensor:
    kernel = weight.flatten(1).T  # (9, C)
    return sum(shift * tap[None, :, None, None] for shift, tap in zip(shifts(x, 0.0), kernel, strict=True))


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(x, weight[:, :, None, None], bias)


def high_reference(mixer: HighMixer, x: Tensor) -> Tensor:
    """Eq. 4 and Eq. 5."""
    first, second = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
    convolved = depthwise_by_shifts(pointwise(first, mixer.conv_in.weight), mixer.depthwise.weight)
    largest = torch.stack(shifts(second, -math.inf)).amax(0)
    return torch.cat([gelu(convolved), gelu(pointwise(largest, mixer.pool_out.weight, mixer.pool_out.bias))], dim=1)


def low_reference(mixer: LowMixer, x: Tensor) -> Tensor:
    """Eq. 6, a head at a time."""
    (_, low, height, width), stride, head = x.shape, mixer.pool_stride, mixer.head_channels
    small = x.unflatten(2, (height // stride, stride)).unflatten(4, (width // stride, stride)).mean((3, 5))
    packed = pointwise(small, mixer.qkv.weight, mixer.qkv.bias).flatten(2)
    heads = []
    for first in range(0, low, head):
        q, k, v = (packed[:, part * low + first : part * low + first + head] for part in range(3))
        scores = torch.einsum("bcq,bck->bqk", q, k) / math.sqrt(head)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        heads.append(torch.einsum("bqk,bck->bcq", weights, v))
    return torch.cat(heads, dim=1).reshape(small.shape).repeat_interleave(stride, 2).repeat_interleave(stride, 3)


def fusion_reference(fusion: Fusion, x: Tensor) -> Tensor:
    """Eq. 8."""
    return pointwise(x + depthwise_by_shifts(x, fusion.depthwise.weight), fusion.out.weight, fusion.out.bias)


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
    return (x - mean) / (variance + norm.eps).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]


def block_reference(block: IFormerBlock, x: Tensor) -> Tensor:
    mixer, (wide, _, narrow) = block.mixer, block.mlp
    normed = layer_norm(block.norm_mixer, x)
    high = mixer.split[0]
    parts = [high_reference(mixer.high, normed[:, :high])] if mixer.high else []
    parts += [low_reference(mixer.low, normed[:, high:])] if mixer.low else []
    scales = [1.0 if scale is None else scale[:, None, None] for scale in (block.scale_mixer, block.scale_mlp)]
    x = x + scales[0] * fusion_reference(mixer.fusion, torch.cat(parts, dim=1))
    hidden = gelu(pointwise(layer_norm(block.norm_mlp, x), wide.weight, wide.bias))
    return x + scales[1] * pointwise(hidden, narrow.weight, narrow.bias)


def assert_same_on_images(module: nn.Module, reference: Tensor, x: Tensor) -> None:
    """``module`` works on (B, H, W, C), ``x`` and ``reference`` are (B, C, H, W)."""
    found = module(x.permute(0, 2, 3, 1))
    found = torch.cat(found, dim=-1) if isinstance(found, tuple) else found
    torch.testing.assert_close(found.permute(0, 3, 1, 2), reference, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("high", [4, 12, 16])
def test_the_high_mixer_is_eq_4_and_eq_5(high):
    mixer, x = randomize(HighMixer(16, high)), noise(2, high, 6, 8)
    assert_same_on_images(mixer, high_reference(mixer, x), x)


@torch.no_grad()
@pytest.mark.parametrize("low", [4, 12, 16])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_the_low_mixer_is_eq_6(low, stride):
    mixer, x = randomize(LowMixer(16, low, 4, stride)), noise(2, low, 4, 8)
    assert_same_on_images(mixer, low_reference(mixer, x), x)


@torch.no_grad()
@pytest.mark.parametrize("low", [0, 4, 16])
def test_the_fusion_is_eq_8(low):
    fusion, x = randomize(Fusion(16, low)), noise(2, 32 - low, 6, 8)
    assert_same_on_images(fusion, fusion_reference(fusion, x), x)


@torch.no_grad()
@settings(deadline=None, max_examples=20)
@given(low=st.sampled_from(split_choices(16, 4)), stride=st.sampled_from([1, 2]), layer_scale=st.booleans())
def test_a_whole_block_is_its_formula_for_every_split(low, stride, layer_scale):
    block, x = randomize(IFormerBlock(16, low, 4, stride, layer_scale)), noise(2, 16, 4, 6)
    torch.testing.assert_close(block(x), block_reference(block, x), atol=1e-5, rtol=1e-5)


# Whole networks


@settings(deadline=None, max_examples=15)
@given(split=SPLITS, depth=st.integers(1, 2), attend=st.sampled_from([(), (2,), (1, 2)]), scaled=st.sampled_from([(), (1, 2)]))
def test_every_split_builds_runs_and_trains_all_its_weights(split, depth, attend, scaled):
    network = randomize(expert_with(split, depth=depth, attention_downsamples=attend, layer_scale_levels=scaled))
    x = noise(2, 1, 8, 8)
    output = network(x, torch.tensor([0, 999]))
    output.square().mean().backward()
    assert output.shape == x.shape
    assert [name for name, weight in network.named_parameters() if weight.grad is None or not weight.grad.any()] == []


def tensors_of_diffusers(unet: nn.Module):
    """Its weights in the order in which ours are registered."""
    for block in [unet.time_embedding.linear_1, unet.time_embedding.linear_2, unet.conv_in]:
        yield from block.parameters()
    for block in [*unet.down_blocks, unet.mid_block, *unet.up_blocks]:
        yield from tensors_of_level(block)
    for block in [unet.conv_norm_out, unet.conv_out]:
        yield from block.parameters()


def tensors_of_level(block: nn.Module):
    attentions = list(getattr(block, "attentions", []))
    for resnet in block.resnets:
        for name in ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut"):
            yield from (part.parameters() if (part := getattr(resnet, name, None)) is not None else ())
        if attentions:
            yield from tensors_of_attention(attentions.pop(0))
    for sampler in [*(getattr(block, "downsamplers", None) or []), *(getattr(block, "upsamplers", None) or [])]:
        yield from sampler.conv.parameters()


def tensors_of_attention(block: nn.Module):
    yield from block.group_norm.parameters()
    for kind in ("weight", "bias"):
        yield torch.cat([getattr(layer, kind) for layer in (block.to_q, block.to_k, block.to_v)])
    yield from block.to_out[0].parameters()


@torch.no_grad()
def test_the_ldm_network_is_the_u_net_of_diffusers():
    make_torchvision_importable()
    from diffusers import UNet2DModel

    reference = UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32, 48),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        attention_head_dim=8,
        norm_num_groups=8,
        downsample_padding=1,
    ).eval()
    shape = NetworkConfig(
        family="ldm", channels=16, multipliers=(1, 2, 3), attention_downsamples=(2,), head_channels=8, norm_groups=8
    )
    network = Denoiser(ImageConfig(size=16), shape, ExpertConfig(interval=(0, 1000))).eval()
    randomize(reference)
    for ours, theirs in zip(network.parameters(), tensors_of_diffusers(reference), strict=True):
        assert ours.shape == theirs.shape
        ours.copy_(theirs)
    x, t = noise(2, 3, 16, 16), torch.tensor([7, 901])
    expected = reference(x, t).sample
    torch.testing.assert_close(network(x, t) / expected.std(), expected / expected.std(), atol=1e-4, rtol=1e-4)


def test_an_expert_sees_the_timestep():
    network, x = randomize(expert_with((8, 16))), noise(1, 1, 8, 8)
    assert not torch.equal(network(x, torch.tensor([10])), network(x, torch.tensor([11])))


# Initial weights


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, one.parameters(), other.parameters()))


def test_the_same_seed_gives_the_same_weights_whatever_was_drawn_before():
    one = expert_with((8, 16), seed=3)
    torch.rand(1)
    assert same_weights(one, expert_with((8, 16), seed=3))
    assert not same_weights(one, expert_with((8, 16), seed=4))


def test_all_drawn_weights_differ_between_seeds():
    one, other = (expert_with((8, 16), seed=seed).state_dict() for seed in (0, 1))
    equal = {name for name in one if torch.equal(one[name], other[name])}
    assert all("norm" in name or "conv_out" in name or ".1.out." in name for name in equal), equal


def test_no_two_layers_begin_with_the_same_weights():
    network = expert_with((8, 16))
    drawn = [layer.weight.flatten() for layer in layers(network, nn.Conv2d) + layers(network, nn.Linear) if layer.weight.any()]
    beginnings = {tuple((weight[1:6] / weight[0]).round(decimals=3).tolist()) for weight in drawn}
    assert len(beginnings) == len(drawn) > 20


@settings(deadline=None, max_examples=15)
@given(SPLITS, SPLITS)
def test_two_candidates_begin_equal_wherever_their_shapes_agree(split, other_split):
    one, other = (expert_with(each).state_dict() for each in (split, other_split))
    shared = [name for name in one if name in other and one[name].shape == other[name].shape]
    assert [name for name in shared if not torch.equal(one[name], other[name])] == []
    always = {
        name for name in one if not any(part in name for part in (".high.", ".low.", ".fusion.depthwise", ".fusion.out.weight"))
    }
    assert always <= set(shared)


@pytest.mark.parametrize("low", [4, 8, 12])
def test_a_splits_weights_are_slices_of_the_largest_ones(low):
    splits = [(each, 16) for each in (low, 0, 16)]
    mixer, convolution, attention = (expert_with(split, head_channels=4).encoder[0][0].mixer for split in splits)
    channels, high, half = 16, 16 - low, (16 - low) // 2
    for kind in ("conv_in", "pool_out"):
        largest = getattr(convolution.high, kind).weight
        assert torch.equal(getattr(mixer.high, kind).weight, largest[:high, :half])
    assert torch.equal(mixer.high.pool_out.bias, convolution.high.pool_out.bias[:high])
    assert torch.equal(mixer.high.depthwise.weight, convolution.high.depthwise.weight[:high])
    largest = attention.low.qkv
    assert torch.equal(mixer.low.qkv.weight.view(3, low, low), largest.weight.view(3, channels, channels)[:, high:, high:])
    assert torch.equal(mixer.low.qkv.bias.view(3, low), largest.bias.view(3, channels)[:, high:])
    for ours, by_convolution, by_attention in (
        (mixer.fusion.out.weight.T, convolution.fusion.out.weight.T, attention.fusion.out.weight.T),
        (mixer.fusion.depthwise.weight, convolution.fusion.depthwise.weight, attention.fusion.depthwise.weight),
    ):
        pieces = [by_convolution[:high], by_convolution[channels : channels + high], by_attention[high:]]
        assert torch.equal(ours, torch.cat(pieces))


def test_the_last_layer_of_every_residual_branch_starts_at_zero():
    network = expert_with((8, 16), attention_downsamples=(1, 2))
    last = [block.conv_out for block in layers(network, ResidualBlock)] + [block.out for block in layers(network, AttentionBlock)]
    last.append(network.conv_out)
    drawn = [layer for layer in layers(network, nn.Conv2d) + layers(network, nn.Linear) if layer not in last]
    assert not any(weight.any() for layer in last for weight in layer.parameters())
    assert all(weight.all() for layer in drawn for weight in layer.parameters())
    assert not network(noise(1, 1, 8, 8), torch.tensor([5])).any()


def test_weights_are_uniform_within_one_over_the_root_of_fan_in():
    for layer in layers(expert_with((8, 16)), ResidualBlock):
        weight = layer.conv_in.weight
        bound = 1 / math.sqrt(weight[0].numel())
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
