"""Latent diffusion as a user runs it: first stage, latents, training, sampling, scores; and data that does not fit."""

import zipfile

import numpy as np
import pytest
import torch
from conftest import CIFAR
from PIL import Image

from meme import pipeline
from meme.analysis.figures import read_table
from meme.cli.verbs import main
from meme.config.presets import preset
from meme.config.schema import Config
from meme.pipeline import draw, load_ensemble, open_reference, train, training_data
from meme.support.torchvision_compat import make_torchvision_importable

SMALL = preset("digits-meme").with_(
    name="small-latents",
    image={"channels": 3, "size": 8},
    first_stage={"downsample": 4, "kind": "vq"},
    experts=[{"interval": (0, 500), "p": 0.5, "low_channels": (8, 16)}, {"interval": (500, 1000), "low_channels": (0, 32)}],
    training={"steps": 30, "batch_size": 16},
    sampling={"steps": 10, "batch_size": 16, "clip": False},
    evaluation={"samples": 32, "features": "random"},
)


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """A folder of every 200th image of CIFAR-10, in its class folders."""
    if not CIFAR.is_file():
        pytest.skip(f"needs CIFAR-10 at {CIFAR}")
    folder = tmp_path_factory.mktemp("cifar")
    with zipfile.ZipFile(CIFAR) as archive:
        for name in [name for name in archive.namelist() if name.endswith(".jpg")][::200]:
            archive.extract(name, folder)
    return folder


@pytest.fixture(scope="module")
def first_stage(cifar, tmp_path_factory):
    """A small VQ autoencoder (f = 4) trained on these images for a moment, and saved as diffusers saves it."""
    make_torchvision_importable()
    from diffusers import VQModel

    torch.manual_seed(0)
    model = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 16, 16),
        norm_num_groups=4,
        latent_channels=3,
        num_vq_embeddings=64,
    )
    images = open_reference(SMALL.with_(data=str(cifar)))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for step in range(60):
        x = images.tensor(np.arange(16) + 16 * (step % 15))
        output = model(x)
        loss = (output.sample - x).square().mean() + output.commit_loss.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    folder = tmp_path_factory.mktemp("first stage") / "vq"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(cifar, first_stage, tmp_path_factory):
    """The folder that ``python -m meme train`` leaves."""
    folder = tmp_path_factory.mktemp("trained")
    SMALL.save(folder / "small.yaml")
    main(["train", str(folder / "small.yaml"), "--data", str(cifar), "--first-stage", str(first_stage), "--device", "cpu"])
    return folder / "small"


def test_training_leaves_a_config_that_knows_its_first_stage_and_scale(trained, first_stage, cifar):
    config = Config.load(trained / "config.yaml")
    assert config.first_stage.source == str(first_stage)
    images = open_reference(config)
    latents = training_data(config.with_(first_stage={"scale_factor": None}), images)
    assert config.first_stage.scale_factor == latents.scale_factor
    assert latents.tensor(range(len(latents))).std().item() == pytest.approx(1, abs=0.01)
    assert images.pixels.shape[1:] == (3, 32, 32) and latents.tensor([0]).shape == (1, 3, 8, 8)


def test_the_same_command_goes_on_where_it_was(trained, cifar, first_stage):
    before = [(path, path.stat().st_mtime_ns) for path in sorted(trained.glob("*.safetensors"))]
    yaml = trained.with_suffix(".yaml")
    main(["train", str(yaml), "--data", str(cifar), "--first-stage", str(first_stage), "--device", "cpu"])
    assert [(path, path.stat().st_mtime_ns) for path in sorted(trained.glob("*.safetensors"))] == before


def test_samples_are_decoded_to_pixels(trained, tmp_path):
    main(["sample", str(trained), "--count", "4", "--out", str(tmp_path / "samples.png"), "--device", "cpu"])
    assert Image.open(tmp_path / "samples.png").mode == "RGB"
    images = torch.cat(list(draw(load_ensemble(trained), 4, seed=0)))
    assert images.shape == (4, 3, 32, 32) and images.dtype == torch.uint8
    assert images.float().std() > 10


def test_one_expert_in_memory_gives_the_same_images(trained, tmp_path):
    for name, flags in (("all", []), ("one", ["--one-at-a-time"])):
        main(["sample", str(trained), "--count", "4", "--out", str(tmp_path / f"{name}.png"), "--device", "cpu", *flags])
    assert (tmp_path / "all.png").read_bytes() == (tmp_path / "one.png").read_bytes()


def test_scores_are_those_of_pixels(trained, capsys):
    main(["evaluate", str(trained), "--seeds", "1", "--device", "cpu"])
    said = " ".join(capsys.readouterr().out.split())
    assert "FID" in said and "32 samples" in said


def test_a_first_stage_that_was_moved_can_be_named(trained, first_stage, tmp_path, capsys):
    moved, copy = first_stage.rename(first_stage.with_name("moved")), tmp_path / "samples.png"
    pipeline._first_stage.cache_clear()  # another day, another process
    try:
        with pytest.raises(SystemExit) as stopped:
            main(["sample", str(trained), "--count", "1", "--out", str(copy), "--device", "cpu"])
        assert stopped.value.code == 2 and "first_stage.source" in capsys.readouterr().err
        main(["sample", str(trained), "--count", "1", "--out", str(copy), "--first-stage", str(moved), "--device", "cpu"])
        assert copy.exists()
    finally:
        moved.rename(first_stage)


def test_where_the_first_stage_lies_does_not_make_another_architecture():
    moved, scaled = (
        SMALL.with_(first_stage={"source": "elsewhere", "subfolder": "vqvae"}),
        SMALL.with_(first_stage={"scale_factor": 2.0}),
    )
    assert moved.architecture_id == SMALL.architecture_id != scaled.architecture_id


def test_latents_and_pixels_of_one_config_are_different_trainings(cifar, first_stage):
    config = SMALL.with_(data=str(cifar), first_stage={"source": str(first_stage)}, training={"steps": 2})
    images = open_reference(config)
    latent = training_data(config, images)
    assert latent.content_id != images.content_id
    assert train(config, latent).config.first_stage.scale_factor == latent.scale_factor


# What does not fit


def refused(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--device", "cpu"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and "\n" not in said
    return said


def folder_of_images(folder, mode: str, size: int, names=("a.png", "b.png", "c.png")):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (size, size, 3), np.uint8)).convert(mode).save(folder / name)
    return str(folder)


def test_images_much_smaller_than_the_preset_are_refused(tmp_path, capsys):
    data = folder_of_images(tmp_path / "images", "RGB", 40)
    assert "most images of images have 40 pixels a side, and celeba64-meme takes 64" not in data
    said = refused(["train", "ffhq-meme", "--data", data, "--first-stage", "anything"], capsys)
    assert "data: most images of images have 40 pixels a side, and ffhq-meme takes 256" in said
    assert "digits have 8 pixels a side" in refused(["train", "cifar10-meme", "--data", "digits"], capsys)
    config = preset("celeba64-meme").with_(data=data)
    assert open_reference(config).pixels.shape == (3, 3, 64, 64)  # less than twice: enlarged


def test_colour_images_are_refused_by_a_grey_preset(tmp_path, capsys):
    data = folder_of_images(tmp_path / "images", "RGB", 16)
    said = refused(["train", "digits-meme", "--data", data], capsys)
    assert "data: most images of images are in colour, and digits-meme takes grey (image.channels 1)" in said
    grey = folder_of_images(tmp_path / "grey", "L", 16)
    assert open_reference(preset("digits-meme").with_(data=grey)).pixels.shape == (3, 1, 8, 8)
    assert open_reference(preset("cifar10-meme").with_(data=grey)).pixels.shape == (3, 3, 32, 32)


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (("a.png", "b.png"), "has no classes (a folder for each class names them), and conditional takes 3"),
        (("cat/a.png", "dog/b.png"), "has 2 classes, and conditional takes 3 (network.classes)"),
    ],
)
def test_classes_must_be_those_of_the_network(names, complaint, tmp_path, capsys):
    data = folder_of_images(tmp_path / "images", "L", 8, names)
    preset("digits-meme").with_(name="conditional", network={"classes": 3}).save(tmp_path / "conditional.yaml")
    assert f"data: images {complaint}" in refused(["train", str(tmp_path / "conditional.yaml"), "--data", data], capsys)


def test_a_class_conditional_ensemble_trains_samples_and_is_guided(tmp_path, capsys):
    config = preset("digits-meme").with_(
        name="conditional",
        network={"classes": 10, "attention_downsamples": (2,)},
        training={"steps": 10, "batch_size": 8, "label_dropout": 0.1},
        sampling={"steps": 5, "guidance_scale": 2.0},
        evaluation={"samples": 20, "features": "random"},
    )
    config.save(tmp_path / "conditional.yaml")
    main(["train", str(tmp_path / "conditional.yaml"), "--device", "cpu"])
    ensemble = load_ensemble(tmp_path / "conditional")
    guided = torch.cat(list(draw(ensemble, 12, seed=0)))
    ensemble.config = config.with_(sampling={"guidance_scale": 1.0})
    assert not torch.equal(guided, torch.cat(list(draw(ensemble, 12, seed=0))))
    main(["evaluate", str(tmp_path / "conditional"), "--seeds", "1", "--device", "cpu"])
    assert "FID" in capsys.readouterr().out


def test_adm_trains_and_samples_on_pixels(tmp_path):
    network = {"family": "iu-adm", "depth": 1, "learned_variance": True, "dropout": 0.1}
    config = preset("digits-meme").with_(
        name="adm", network=network, training={"steps": 10, "p2_gamma": 1.0}, sampling={"sampler": "ddpm", "steps": 10}
    )
    images = open_reference(config)
    ensemble = train(config, images, folder=tmp_path)
    for sampler in ({"sampler": "ddpm"}, {"sampler": "ddim"}):
        ensemble.config = config.with_(sampling=sampler)
        assert torch.cat(list(draw(ensemble, 3, seed=0))).shape == (3, 1, 8, 8)


def test_a_first_stage_of_another_latent_shape_is_refused(cifar, first_stage, tmp_path, capsys):
    SMALL.with_(image={"channels": 4}).save(tmp_path / "four.yaml")
    said = refused(["train", str(tmp_path / "four.yaml"), "--data", str(cifar), "--first-stage", str(first_stage)], capsys)
    assert "image.channels: must be 3" in said
    SMALL.with_(first_stage={"downsample": 2}).save(tmp_path / "two.yaml")
    said = refused(["train", str(tmp_path / "two.yaml"), "--data", str(cifar), "--first-stage", str(first_stage)], capsys)
    assert "first_stage.downsample: must be 4" in said
    said = refused(["train", "digits-meme", "--first-stage", str(first_stage)], capsys)
    assert "first_stage: digits-meme denoises pixels and takes none" in said


# The frequency analysis


@pytest.mark.parametrize("kind", ["latents", "features", "experts"])
def test_a_latent_ensemble_can_be_analysed(kind, trained, tmp_path, capsys):
    main(["analyze", kind, str(trained), "--images", "24", "--out", str(tmp_path), "--device", "cpu"])
    assert (tmp_path / f"{kind}.png").stat().st_size > 10_000
    table = read_table(tmp_path / f"{kind}.csv")
    assert set(table["images"]) == {24} and np.isfinite(table["log_amplitude"]).all()
    assert f"{kind} of 24 images" in " ".join(capsys.readouterr().out.split())


def test_a_class_conditional_ensemble_can_be_analysed(tmp_path):
    config = preset("digits-meme").with_(name="conditional", network={"classes": 10}, training={"steps": 1})
    config.save(tmp_path / "conditional.yaml")
    main(["train", str(tmp_path / "conditional.yaml"), "--device", "cpu"])
    main(["analyze", "features", str(tmp_path / "conditional"), "--images", "8", "--device", "cpu"])
    assert "middle residual+transformer" in " ".join(read_table(tmp_path / "conditional/analysis/features.csv")["layer"])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["features", "one", "two"], "sources: features takes one, not 2"),
        (["experts", "nowhere"], "nowhere: not a trained ensemble"),
        (["latents", "ffhq-mem"], "did you mean ffhq-meme"),
    ],
)
def test_an_analysis_of_nothing_is_refused(arguments, complaint, capsys):
    assert complaint in refused(["analyze", *arguments], capsys)
