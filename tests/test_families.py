"""The networks beside latent diffusion's: ADM, the class-conditional U-Net, and the iU-Net on either; against diffusers' own."""

import pytest
import torch
from torch import nn

from meme.config.presets import preset
from meme.config.schema import ExpertConfig, ImageConfig, NetworkConfig
from meme.network.blocks import AttentionBlock, Downsample, ResidualBlock
from meme.network.iformer import IFormerBlock
from meme.network.transformer import SpatialTransformer
from meme.network.unet import Denoiser, build_expert
from meme.support.torchvision_compat import make_torchvision_importable

ADM = {"family": "adm", "channels": 16, "multipliers": (1, 2, 2), "depth": 1, "head_channels": 8, "norm_groups": 8}
CLASSES = {"family": "ldm", "channels": 16, "multipliers": (1, 2), "depth": 1, "head_channels": 8, "norm_groups": 8}


def meta_expert(name: str, number: int = 1) -> Denoiser:
    with torch.device("meta"):
        return build_expert(preset(name), number)


def parameters(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


@torch.no_grad()
def randomize(module: nn.Module) -> nn.Module:
    source = torch.Generator().manual_seed(1)
    for weight in module.parameters():
        weight.copy_(torch.randn(weight.shape, generator=source) * 0.2)
    return module.eval()


def denoiser(size: int = 16, expert: ExpertConfig = ExpertConfig(interval=(0, 1000)), **network) -> Denoiser:  # noqa: B008
    return randomize(Denoiser(ImageConfig(size=size), NetworkConfig(**network), expert))


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def kinds(stages: nn.Module) -> list[list[type]]:
    return [[type(layer) for layer in stage] for stage in stages]


# ADM


def test_adm_s_has_exactly_the_parameters_of_the_published_network():
    assert parameters(meta_expert("celeba64-adm-s")) == 90_408_966


def test_the_iu_adm_has_the_encoder_of_the_iu_net_and_the_decoder_of_adm():
    network = meta_expert("celeba64-meme", 2)
    assert kinds(network.encoder) == [[IFormerBlock], [Downsample]] * 5 + [[IFormerBlock]]
    assert kinds(network.decoder) == ([[ResidualBlock], [ResidualBlock, ResidualBlock]] * 5 + [[ResidualBlock]] * 2)
    stock = [block for block in meta_expert("celeba64-adm-s").decoder.modules() if isinstance(block, ResidualBlock)]
    ours = [block for block in network.decoder.modules() if isinstance(block, ResidualBlock)]
    assert [block.conv_in.out_channels for block in ours] == [block.conv_in.out_channels for block in stock]


def test_adm_attends_only_in_the_middle():
    for name in ("celeba64-adm-s", "celeba64-meme"):
        attention = [where for where, layer in meta_expert(name).named_modules() if isinstance(layer, AttentionBlock)]
        assert attention == ["middle.1"]


def tensors_of_resnet(block: nn.Module):
    for name in ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut"):
        yield from (part.parameters() if (part := getattr(block, name, None)) is not None else ())


def tensors_of_adm(unet: nn.Module):
    """The weights of diffusers' network in the order in which ours are registered."""
    for block in [unet.time_embedding.linear_1, unet.time_embedding.linear_2, unet.conv_in]:
        yield from block.parameters()
    for level in unet.down_blocks:
        for block in [*level.resnets, *(level.downsamplers or [])]:
            yield from tensors_of_resnet(block)
    first, last = unet.mid_block.resnets
    attention = unet.mid_block.attentions[0]
    yield from tensors_of_resnet(first)
    yield from attention.group_norm.parameters()
    for kind in ("weight", "bias"):
        yield torch.cat([getattr(layer, kind) for layer in (attention.to_q, attention.to_k, attention.to_v)])
    yield from attention.to_out[0].parameters()
    yield from tensors_of_resnet(last)
    for level in unet.up_blocks:
        for block in [*level.resnets, *(level.upsamplers or [])]:
            yield from tensors_of_resnet(block)
    for block in [unet.conv_norm_out, unet.conv_out]:
        yield from block.parameters()


@torch.no_grad()
def test_the_adm_network_is_the_u_net_of_diffusers():
    make_torchvision_importable()
    from diffusers import UNet2DModel

    reference = UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=6,
        block_out_channels=(16, 32, 32),
        down_block_types=("ResnetDownsampleBlock2D",) * 3,
        up_block_types=("ResnetUpsampleBlock2D",) * 3,
        layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=8,
        attn_norm_num_groups=8,
        resnet_time_scale_shift="scale_shift",
    )
    network = denoiser(**ADM, learned_variance=True)
    randomize(reference)
    for ours, theirs in zip(network.parameters(), tensors_of_adm(reference), strict=True):
        assert ours.shape == theirs.shape
        ours.copy_(theirs)
    x, t = noise(2, 3, 16, 16), torch.tensor([7, 901])
    expected = reference(x, t).sample
    torch.testing.assert_close(network(x, t) / expected.std(), expected / expected.std(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("low", [(0, 0, 0), (8, 16, 24), (16, 32, 32)])
def test_the_iu_adm_runs_and_trains_all_its_weights(low):
    expert = ExpertConfig(interval=(0, 1000), low_channels=low)
    network = denoiser(expert=expert, **ADM | {"family": "iu-adm"}, learned_variance=True)
    output = network(noise(2, 3, 16, 16), torch.tensor([0, 999]))
    output.square().mean().backward()
    assert output.shape == (2, 6, 16, 16)
    assert [name for name, weight in network.named_parameters() if weight.grad is None or not weight.grad.any()] == []


# Classes


def test_the_imagenet_u_net_has_exactly_the_parameters_of_the_published_network():
    network = meta_expert("imagenet-ldm-l")
    assert parameters(network) - network.classes.weight.numel() == 394_984_196
    assert network.classes.weight.shape == (1001, 512)  # a thousand classes and "no class"


def test_an_imagenet_expert_has_nearly_the_papers_103_million():
    for number in range(1, 5):
        network = meta_expert("imagenet-meme", number)
        assert parameters(network) - network.classes.weight.numel() == pytest.approx(103e6, rel=0.01)


def test_every_level_of_an_imagenet_expert_is_told_the_class():
    network = meta_expert("imagenet-meme")
    block = [[IFormerBlock, SpatialTransformer], [ResidualBlock, SpatialTransformer]]
    assert kinds(network.encoder) == [*block, [Downsample]] * 2 + block


@torch.no_grad()
def test_the_spatial_transformer_is_that_of_diffusers():
    make_torchvision_importable()
    from diffusers import Transformer2DModel

    reference = Transformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=32, num_layers=1, cross_attention_dim=24, norm_num_groups=8
    )
    randomize(reference)
    block, theirs = randomize(SpatialTransformer(32, 24, 8, 8)), reference.transformer_blocks[0]
    pairs = [
        (block.norm, reference.norm),
        (block.norm_self, theirs.norm1),
        (block.norm_cross, theirs.norm2),
        (block.norm_mlp, theirs.norm3),
        (block.mlp.wide, theirs.ff.net[0].proj),
        (block.mlp.out, theirs.ff.net[2]),
    ]
    for attention, other in ((block.attend_self, theirs.attn1), (block.attend_cross, theirs.attn2)):
        pairs += zip((attention.query, attention.key, attention.value), (other.to_q, other.to_k, other.to_v), strict=True)
        pairs += [(attention.out, other.to_out[0])]
    for ours, other in pairs:
        ours.load_state_dict(other.state_dict())
    for ours, convolution in ((block.project_in, reference.proj_in), (block.project_out, reference.proj_out)):
        ours.weight.copy_(convolution.weight.flatten(1))
        ours.bias.copy_(convolution.bias)
    assert parameters(block) == parameters(reference)
    x, context = noise(2, 32, 4, 6), noise(2, 3, 24)
    expected = reference(x, encoder_hidden_states=context).sample
    torch.testing.assert_close(block(x, context), expected, atol=1e-4, rtol=1e-4)


def test_a_class_conditional_network_sees_the_class_and_has_one_for_none():
    network = denoiser(classes=3, **CLASSES)
    x, t = noise(4, 3, 16, 16), torch.full((4,), 10)
    outputs = network(x[:1].expand(4, -1, -1, -1), t, torch.tensor([0, 1, 2, 3]))
    assert len({tuple(output.flatten()[:4].tolist()) for output in outputs}) == 4
    with pytest.raises(IndexError):
        network(x[:1], t[:1], torch.tensor([4]))


def test_a_class_conditional_expert_trains_all_its_weights():
    network = denoiser(
        classes=2,
        expert=ExpertConfig(interval=(0, 1000), low_channels=(8, 16)),
        **CLASSES | {"family": "iu-net", "attention_downsamples": (1, 2)},
    )
    network(noise(3, 3, 16, 16), torch.tensor([0, 5, 999]), torch.tensor([0, 1, 2])).square().mean().backward()
    unused = [name for name, weight in network.named_parameters() if weight.grad is None or not weight.grad.any()]
    # A class is one token: attention to one token is that token, whatever is asked and however it is weighed.
    assert all(".attend_cross.query" in name or ".attend_cross.key" in name or ".norm_cross" in name for name in unused)


def test_embeddings_of_classes_are_a_function_of_the_seed():
    config = preset("digits-ldm-s").with_(network={"classes": 10})
    one, same, other = (build_expert(config, 1, seed=seed).classes.weight for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert one.std().item() == pytest.approx(1, abs=0.05)
