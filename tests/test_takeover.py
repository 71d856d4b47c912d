"""Experts that start from a published U-Net compute what it computes; an iU-Net takes what fits; nothing is unpickled."""

import pickle
import re
import shutil

import pytest
import torch
from compvis_unet import UNetModel
from safetensors.torch import save_file

from meme.cli.verbs import main
from meme.config.presets import preset
from meme.config.schema import Config
from meme.errors import UserError
from meme.network.pretrained import read_weights, start_from, take_over
from meme.network.unet import build_expert
from meme.pipeline import open_reference, train
from meme.training.trainer import load_expert, starting_expert, training_id

WIDTH, GROUPS, HEAD = 16, 2, 8
UNCONDITIONAL = {"multipliers": (1, 2), "depth": 2, "attention_downsamples": (1, 2)}
FAMILIES = {
    "ldm": ({**UNCONDITIONAL}, {}),
    "adm": ({**UNCONDITIONAL, "family": "adm", "learned_variance": True}, {"adm": True}),
    "ldm with classes": ({**UNCONDITIONAL, "classes": 10, "context_channels": 12}, {"context": 12}),
}


def config_of(**network):
    return preset("digits-multi-expert").with_(network=network)


def published(config, **options):
    """The reference network of ``config``, with weights that leave no layer idle."""
    network = config.network
    torch.manual_seed(3)
    out = config.image.channels * (2 if network.learned_variance else 1)
    sizes = (WIDTH, network.multipliers, network.depth, network.attention_downsamples, HEAD, GROUPS)
    return UNetModel(config.image.channels, out, *sizes, **options).eval()


def checkpoint(model, path, prefix="", **others):
    save_file({prefix + name: tensor.contiguous() for name, tensor in model.state_dict().items()} | others, path)
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_unet_is_taken_over_exactly(family, tmp_path):
    network, options = FAMILIES[family]
    config = config_of(**network)
    reference, expert = published(config, **options), build_expert(config, 1).eval()
    classes = torch.randn(11, 12, generator=torch.Generator().manual_seed(1))
    others = {"cond_stage_model.embedding.weight": classes} if config.network.classes else {}
    path = checkpoint(reference, tmp_path / "unet.safetensors", "model.diffusion_model.", **others)
    taken = take_over(config.network, expert, path)
    assert len(taken.tensors) == taken.total_tensors
    assert str(taken).endswith("parameters")  # and no word of fresh ones
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([3, 700])
    labels = torch.tensor([4, 10]) if config.network.classes else None
    with torch.no_grad():
        before = expert(x, t, labels)
        start_from(config.network, expert, path)
        expected = reference(x, t, None if labels is None else classes[labels][:, None])
        torch.testing.assert_close(expert(x, t, labels), expected, rtol=1e-4, atol=1e-5)
    assert (expected - before).abs().max() > 0.1


def test_averaged_weights_are_preferred(tmp_path):
    config = config_of(**UNCONDITIONAL)
    reference = published(config)
    averaged = {f"model_ema.diffusion_model{name.replace('.', '')}": tensor + 1 for name, tensor in reference.named_parameters()}
    path = checkpoint(reference, tmp_path / "whole.safetensors", "model.diffusion_model.", **averaged)
    expert = build_expert(config, 1)
    start_from(config.network, expert, path)
    assert torch.equal(expert.conv_in.bias, reference.input_blocks[0][0].bias + 1)


def test_an_iu_net_takes_what_is_the_same_in_both(tmp_path):
    config = preset("digits-meme").with_(network={"attention_downsamples": (2,)})
    plain = config_of(multipliers=(1, 2), depth=1, attention_downsamples=(2,))
    reference, expert = published(plain), build_expert(config, 2)
    path = checkpoint(reference, tmp_path / "unet.safetensors")
    taken = take_over(config.network, expert, path)
    rooms = {name.split(".")[0] for name in taken.tensors}
    assert rooms == {"time", "conv_in", "middle", "decoder", "norm_out", "conv_out"}
    assert "encoder.0.0.mlp.0.weight" in dict(expert.named_parameters())
    own = {name: weight for name, weight in expert.named_parameters() if name.split(".")[0] in rooms}
    # All but what meets a skip of another width: the strided convolution widens earlier here than there.
    missed = sorted(own.keys() - taken.tensors.keys())
    assert missed == [f"decoder.1.0.{part}" for part in ("conv_in.weight", "norm_in.bias", "norm_in.weight", "skip.weight")]
    assert f"{len(expert.state_dict()) - len(taken.tensors)} start fresh" in str(taken)
    assert torch.equal(taken.tensors["middle.0.conv_in.weight"], reference.middle_block[0].in_layers[2].weight)


def test_training_starts_there_and_is_another_training(tmp_path, capsys):
    plain = config_of(multipliers=(1, 2), depth=1).with_(training={"steps": 1, "batch_size": 4, "warmup_steps": 0})
    path = checkpoint(published(plain), tmp_path / "unet.safetensors")
    plain.save(tmp_path / "plain.yaml")
    main(["train", str(tmp_path / "plain.yaml"), "--init-from", str(path)])
    said = " ".join(capsys.readouterr().out.split())
    assert "from unet.safetensors, every expert takes 110 of 110 tensors, 163,985 of 163,985 parameters" in said
    started = Config.load(tmp_path / "plain" / "config.yaml")
    assert started.training.initial_weights == str(path)
    assert started.architecture_id != plain.architecture_id
    expert = starting_expert(started, 3)
    assert torch.equal(expert.conv_in.weight, read_weights(path)["input_blocks.0.0.weight"])
    with pytest.raises(UserError, match="holds a training with other settings"):
        train(plain, open_reference(plain), folder=tmp_path / "plain")


# Experts of this program

BRIEF = preset("digits-meme").with_(training={"steps": 1, "batch_size": 4, "warmup_steps": 0})


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder trained by this program."""
    folder = tmp_path_factory.mktemp("own")
    train(BRIEF, open_reference(BRIEF), folder=folder)
    return folder


def started_from(path, config=BRIEF):
    return config.with_(training={"initial_weights": str(path), "seed": 7})


def test_a_folder_of_our_experts_starts_each_from_its_namesake(own):
    config = started_from(own)
    for number in (1, 4):
        ours, started = load_expert(BRIEF, number, own), starting_expert(config, number)
        assert all(map(torch.equal, ours.state_dict().values(), started.state_dict().values()))


def test_one_of_our_experts_gives_others_what_has_its_shapes(own):
    config = started_from(own / "expert-2.safetensors")
    ours, started, fresh = load_expert(BRIEF, 2, own), starting_expert(config, 4), starting_expert(BRIEF, 4)
    taken = take_over(BRIEF.network, fresh, own / "expert-2.safetensors")
    assert 0 < len(taken.tensors) < taken.total_tensors
    assert torch.equal(started.conv_in.weight, ours.conv_in.weight)
    assert not torch.equal(started.conv_in.weight, fresh.conv_in.weight)


def test_the_command_says_what_each_expert_takes_of_ours(own, tmp_path, capsys):
    BRIEF.save(tmp_path / "new.yaml")
    main(["train", str(tmp_path / "new.yaml"), "--init-from", str(own / "expert-1.safetensors")])
    said = " ".join(capsys.readouterr().out.split())
    assert "from expert-1.safetensors, expert 1 takes 122 of 122 tensors" in said
    assert re.search(r"expert 4 takes \d+ of 118 tensors, [\d,]+ of [\d,]+ parameters; \d+ start fresh", said)
    main(["train", str(tmp_path / "new.yaml"), "--init-from", str(own), "--out", str(tmp_path / "other")])
    assert "start fresh" not in capsys.readouterr().out


def test_a_folder_without_the_expert_is_refused(own, tmp_path):
    with pytest.raises(UserError, match=r"initial_weights: .* holds no expert-1\.safetensors"):
        starting_expert(started_from(tmp_path), 1)


# Which weights they are is known by their content


def test_the_same_weights_elsewhere_are_the_same_training(own, tmp_path):
    data = open_reference(BRIEF)
    copy = tmp_path / "copy.safetensors"
    shutil.copyfile(own / "expert-1.safetensors", copy)
    one, other = (started_from(path) for path in (own / "expert-1.safetensors", copy))
    assert training_id(one, 1, data) == training_id(other, 1, data) != training_id(BRIEF, 1, data)
    train(one, data, folder=tmp_path / "trained")
    train(other, data, folder=tmp_path / "trained", on_progress=lambda progress: pytest.fail("trained again"))


def test_other_weights_under_the_same_path_are_another_training(own, tmp_path):
    data, path = open_reference(BRIEF), tmp_path / "weights.safetensors"
    shutil.copyfile(own / "expert-1.safetensors", path)
    before = training_id(started_from(path), 1, data)
    train(started_from(path), data, folder=tmp_path / "trained")
    kept = Config.load(tmp_path / "trained" / "config.yaml")
    shutil.copyfile(own / "expert-2.safetensors", path)
    assert training_id(started_from(path), 1, data) != before
    with pytest.raises(UserError, match="initial_weights: .* holds other weights than training.initial_digest says"):
        starting_expert(kept, 1)
    with pytest.raises(UserError, match="holds other weights|holds a training with other settings"):
        train(started_from(path), data, folder=tmp_path / "trained")


def test_a_finished_training_is_known_when_its_initial_weights_are_gone(own, tmp_path):
    data, path = open_reference(BRIEF), tmp_path / "weights.safetensors"
    shutil.copyfile(own / "expert-1.safetensors", path)
    train(started_from(path), data, folder=tmp_path / "trained")
    path.unlink()
    again = Config.load(tmp_path / "trained" / "config.yaml")
    train(again, data, folder=tmp_path / "trained", on_progress=lambda progress: pytest.fail("trained again"))


def test_ids_and_files_of_other_trainings_are_as_they_were():
    config = preset("digits-meme")
    assert "initial_weights" not in config.to_yaml() and "initial_digest" not in config.to_yaml()
    assert config.architecture_id == "a1f46bdf5a1a"  # of the release before there were initial weights


class Malicious:
    def __reduce__(self):
        return (pytest.fail, ("it was unpickled",))


def test_pickles_are_read_for_tensors_only(tmp_path):
    config = config_of(**UNCONDITIONAL)
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in published(config).state_dict().items()}
    torch.save({"state_dict": state, "global_step": 3}, tmp_path / "model.ckpt")
    taken = take_over(config.network, build_expert(config, 1), tmp_path / "model.ckpt")
    assert len(taken.tensors) == taken.total_tensors
    torch.save({"state_dict": state, "callbacks": Malicious()}, tmp_path / "bad.ckpt")
    with pytest.raises(UserError, match="holds more than tensors"):
        read_weights(tmp_path / "bad.ckpt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(UserError, match="holds more than tensors"):
        read_weights(tmp_path / "old.pt")


@pytest.mark.parametrize("name", ["no.safetensors", "torn.safetensors", "torn.pt", "empty.ckpt"])
def test_files_that_cannot_be_read_are_refused_in_a_sentence(name, tmp_path):
    path = tmp_path / name
    if not name.startswith("no"):
        path.write_bytes(b"" if name.startswith("empty") else b"\x80\x02 torn")
    with pytest.raises(UserError, match="initial_weights: "):
        read_weights(path)


def test_a_file_with_nothing_that_fits_is_refused(tmp_path):
    save_file({"input_blocks.0.0.weight": torch.zeros(3, 3)}, tmp_path / "other.safetensors")
    config = config_of(**UNCONDITIONAL)
    with pytest.raises(UserError, match="initial_weights: nothing in .* fits"):
        take_over(config.network, build_expert(config, 1), tmp_path / "other.safetensors")
