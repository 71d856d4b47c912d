"""What is exported opens in diffusers, without meme_nas, and draws the same images."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT

import meme.diffusers_model  # before diffusers
from meme.cli.verbs import main
from meme.config.presets import preset
from meme.config.schema import Config
from meme.data.images import Images
from meme.errors import UserError
from meme.export.diffusers_folder import export_diffusers, find_trained
from meme.pipeline import draw, load_ensemble, open_reference, train
from meme.support.tensor_files import load_tensors, read_header, save_tensors

import diffusers  # isort: skip
from diffusers.utils import dynamic_modules_utils  # isort: skip

FEW_STEPS = {"training": {"steps": 3, "batch_size": 8}}


@pytest.fixture(autouse=True)
def _modules_of_our_own(tmp_path, monkeypatch):
    """diffusers copies a pipeline's code into its cache before it imports it."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def trained(folder, config, data=None):
    train(config, data or open_reference(config), folder=folder)
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A trained ensemble whose last layers, which start at zero, have had some steps."""
    return trained(tmp_path_factory.mktemp("digits") / "digits", preset("digits-meme").with_(**FEW_STEPS))


@pytest.fixture(scope="module")
def latent(tmp_path_factory):
    """A latent ensemble with a tiny VQModel of its own."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vq = diffusers.VQModel(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=3, num_vq_embeddings=32, **blocks)
    folder = tmp_path_factory.mktemp("latent")
    vq.save_pretrained(folder / "vq")
    pixels = np.random.default_rng(0).integers(0, 256, (16, 3, 16, 16), dtype=np.uint8)
    images = Images("noise", pixels, None, (), "16 images of noise", ())
    stage = {"kind": "vq", "source": str(folder / "vq"), "downsample": 2, "scale_factor": None}
    config = preset("digits-multi-expert").with_(image={"channels": 3}, first_stage=stage, sampling={"clip": False}, **FEW_STEPS)
    from meme.pipeline import training_data

    return trained(folder / "trained", config, training_data(config, images))


def exported(folder, out):
    return export_diffusers(find_trained(folder), out, licence="mit")


def opened(folder):
    return diffusers.DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)


def images_of(pipeline, **options):
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=3, seed=5, **options).images
    return torch.stack([torch.from_numpy(np.array(image)) for image in images])


def ours(folder, count=3, seed=5):
    images = torch.cat(list(draw(load_ensemble(folder), count, seed)))
    return images[:, 0] if images.shape[1] == 1 else images.permute(0, 2, 3, 1)


@pytest.mark.parametrize("kind", ["digits", "latent"])
def test_the_same_seed_gives_the_same_images_bit_for_bit(kind, request, tmp_path):
    folder = request.getfixturevalue(kind)
    images = images_of(opened(exported(folder, tmp_path / "out")))
    assert torch.equal(images, ours(folder))
    assert images.float().std() > 10  # neither black nor one grey


OTHERS = [{"eta": 0.7}, {"sampler": "ddpm"}, {"sampler": "dpm-solver++"}, {"sampler": "unipc"}]


@pytest.mark.parametrize("sampling", OTHERS, ids=["ddim with noise", "ddpm", "dpm-solver++", "unipc"])
def test_other_samplers_draw_the_same_images_too(sampling, digits, tmp_path):
    ensemble = load_ensemble(digits)
    ensemble.config = ensemble.config.with_(sampling=sampling)
    copy = tmp_path / "copy"
    copy.mkdir()
    for weights in digits.glob("*.safetensors"):
        (copy / weights.name).write_bytes(weights.read_bytes())
    ensemble.config.save(copy / "config.yaml")
    assert torch.equal(images_of(opened(exported(copy, tmp_path / "out"))), ours(copy))


def test_an_ensemble_that_learns_the_variance_and_one_that_knows_classes(tmp_path):
    adm = preset("digits-multi-expert").with_(
        network={"family": "adm", "learned_variance": True}, sampling={"sampler": "ddpm"}, **FEW_STEPS
    )
    folder = trained(tmp_path / "adm", adm)
    assert torch.equal(images_of(opened(exported(folder, tmp_path / "adm-out"))), ours(folder))
    classes = {"classes": 10, "attention_downsamples": (2,), "context_channels": 8}
    conditional = preset("digits-multi-expert").with_(
        network=classes, training={"label_dropout": 0.1} | FEW_STEPS["training"], sampling={"guidance_scale": 2.0}
    )
    folder = trained(tmp_path / "classes", conditional)
    pipeline = opened(exported(folder, tmp_path / "classes-out"))
    assert torch.equal(images_of(pipeline), ours(folder))
    assert torch.equal(images_of(pipeline, labels=[0, 1, 2]), ours(folder))
    with pytest.raises(UserError, match="one for each of 3 images, from 0 to 9"):
        images_of(pipeline, labels=[0, 1, 10])


@pytest.mark.parametrize(
    "name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"]
)
def test_other_schedulers_take_the_same_noise_to_a_like_image(name, digits, tmp_path):
    pipeline = opened(exported(digits, tmp_path / "out"))
    reference = images_of(pipeline, num_inference_steps=250).float()
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    images = images_of(pipeline, num_inference_steps=100).float()
    correlation = np.corrcoef(images.flatten(), reference.flatten())[0, 1]
    assert correlation > 0.9, correlation


def test_a_saved_pipeline_opens_again(digits, tmp_path):
    pipeline = opened(exported(digits, tmp_path / "out"))
    images = images_of(pipeline)
    pipeline.save_pretrained(tmp_path / "again")
    again = diffusers.DiffusionPipeline.from_pretrained(
        tmp_path / "again", custom_pipeline=str(tmp_path / "out"), trust_remote_code=True
    )
    assert torch.equal(images_of(again), images)


def test_a_fresh_process_opens_it_as_the_card_says_without_the_search(digits, tmp_path):
    folder = exported(digits, tmp_path / "out")
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    blocked = "import sys\nfor name in ('optuna', 'ray', 'meme_nas', 'search_spaces'): sys.modules[name] = None\n"
    surroundings = os.environ | {"HF_HOME": str(tmp_path / "hub"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", blocked + code]
    done = subprocess.run(command, cwd=folder, env=surroundings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    from PIL import Image

    assert np.array_equal(np.array(Image.open(folder / "sample.png")), ours(digits, 4, 0)[0].numpy())


def test_all_weights_are_safetensors_and_no_path_of_this_machine_is_told(latent, tmp_path):
    folder = exported(latent, tmp_path / "out")
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "README.md",
        "model_index.json",
        "pipeline.py",
        "scheduler/scheduler_config.json",
        *(f"{part}/{name}" for part in ("experts", "vae") for name in ("config.json", "diffusion_pytorch_model.safetensors")),
    }
    told = [(name, (folder / name).read_text()) for name in files if not name.endswith(".safetensors")]
    assert [name for name, text in told if str(latent.parent) in text] == []


# Model card


def test_the_card_quotes_an_evaluation(digits, tmp_path, capsys):
    main(["evaluate", str(digits), "--seeds", "2", "--samples", "32", "--metrics", "fid", "kid", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["metrics"].keys() == {"fid", "kid"}
    main(["export", str(digits), "--out", str(tmp_path / "out"), "--license", "cc-by-4.0"])
    card = (tmp_path / "out" / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "cc-by-4.0"
    assert header["library_name"] == "diffusers"
    assert f"| FID | {said['metrics']['fid']['mean']:.5g} |" in card
    assert "classifier(digits) features, 32 samples" in card
    assert "Weights: cc-by-4.0" in card
    assert "3 steps of 8 images an expert" in card
    (digits / "evaluation.json").unlink()


def test_the_card_says_where_nothing_is_known(digits, tmp_path):
    card = (export_diffusers(find_trained(digits), tmp_path / "out", licence="unknown") / "README.md").read_text()
    assert "None are recorded" in card
    assert "not stated by whoever exported them" in card


# Studies


@pytest.fixture
def study(digits, tmp_path):
    """A study's folder as a search leaves it, with a winner and a trial that is not it."""
    folder, config = tmp_path / "study", Config.load(digits / "config.yaml")
    other = config.with_(training={"seed": 1})
    for number, each in enumerate((other, config)):
        trial = folder / "trials" / f"{number:03d}"
        trial.mkdir(parents=True)
        each.save(trial / "config.yaml")
        for weights in digits.glob("expert-*.safetensors"):
            (trial / weights.name).write_bytes(weights.read_bytes())
    config.with_(name="winner", training={"steps": 2_000}).save(folder / "winner.yaml")
    (folder / "trials.csv").write_text("number,fid,macs,params,features\n0,9.5,3e6,657000,toy\n1,2.25,3e6,657000,toy\n")
    return SimpleNamespace(folder=folder, config=config)


def test_a_study_means_its_winner_at_proxy_length(study, capsys):
    main(["export", str(study.folder)])
    said = " ".join(capsys.readouterr().out.split())
    assert "not trained in full yet: weights of its trial 001, 3 steps an expert" in said
    assert "| FID | 2.25 | one seed, so not known |" in (study.folder / "diffusers" / "README.md").read_text()


def test_a_winner_that_was_confirmed_is_exported_as_it_was_confirmed(study, digits, capsys):
    confirmed = study.folder / "confirmation" / "003"
    confirmed.mkdir(parents=True)
    study.config.with_(training={"seed": 1_000}).save(confirmed / "config.yaml")
    for weights in digits.glob("expert-*.safetensors"):
        (confirmed / weights.name).write_bytes(weights.read_bytes())
    main(["export", str(study.folder)])
    said = " ".join(capsys.readouterr().out.split())
    assert "weights of its confirmation 003, 3 steps an expert" in said
    assert "2.25" not in (study.folder / "diffusers" / "README.md").read_text(), "which is the score of trial 3, if there is one"


def test_a_study_whose_winner_is_trained_in_full_means_that(study, digits, capsys):
    full = study.folder / "winner"
    full.mkdir()
    for number in range(1, 5):
        file = f"expert-{number}.safetensors"
        save_tensors(full / file, load_tensors(digits / file), read_header(digits / file) | {"step": 2_000})
    Config.load(study.folder / "winner.yaml").save(full / "config.yaml")
    main(["export", str(study.folder), "--json"])
    captured = capsys.readouterr()
    assert json.loads(captured.out)["ensemble"] == str(full)
    assert "trained in full" in captured.err
    (full / "expert-2.safetensors").unlink()  # a training that is not done yet
    assert find_trained(study.folder).folder.name == "001"


def test_what_cannot_be_exported_is_said(study, tmp_path, digits):
    with pytest.raises(UserError, match="neither a trained ensemble"):
        find_trained(tmp_path)
    for weights in study.folder.glob("trials/001/*.safetensors"):
        weights.unlink()
    with pytest.raises(UserError, match="no weights of the winner"):
        find_trained(study.folder)
    with pytest.raises(UserError, match="out: .* holds something else"):
        exported(digits, digits)
    taken = tmp_path / "file"
    taken.touch()
    with pytest.raises(UserError, match="out: .* holds something else"):
        exported(digits, taken)
    assert meme.diffusers_model.Experts  # the module stays imported
