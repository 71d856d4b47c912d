"""The commands as a user runs them: a whole small search, the winner trained further, and what is said of wrong input."""

import os
import re
import subprocess
import sys
import zipfile
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import CIFAR, ROOT
from PIL import Image
from searches import InThisProcess

import run_search
from meme.cli.verbs import main as meme_main
from meme.config.presets import preset
from meme.config.schema import Config
from meme.errors import UserError
from meme.pipeline import evaluate, load_ensemble, open_reference, pick_device, train
from meme_nas import run as run_module
from meme_nas.record.study import read_trials

TINY = ["--engine", "local", "--proxy-steps", "6", "--samples", "64", "--p-share", "0"]
TINY += ["--trunk-share", "0.002", "--confirm-share", "0.01", "--confirm-seeds", "2"]
SMALL = [*TINY, "--strategy", "joint", "--audit-factor", "0"]


@pytest.fixture
def without_workers(monkeypatch):
    """Searches run their trials in this process, and time no training before they begin."""
    monkeypatch.setattr(run_module, "open_engine", lambda settings, workers: InThisProcess())
    monkeypatch.setattr(run_module, "forecast_lines", lambda settings: [])


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A search of four trials, done."""
    folder = tmp_path_factory.mktemp("results") / "digits"
    run_search.main(["--budget", "4", "--study", str(folder), *SMALL])
    return folder


def test_a_search_leaves_everything_it_should(study):
    table = pd.read_csv(study / "trials.csv")
    assert table["state"].tolist() == ["complete"] * 4
    assert {"number", "fid", "macs", "params", "latency_ms", "seconds", "expert4.p"} <= set(table.columns)
    assert (table["fid"] > 0).all()
    training, full = Config.load(study / "winner.yaml").training, preset("digits-meme").training
    assert (training.trunk_steps, 4 * training.steps + training.trunk_steps) == (16, 4 * full.steps)
    assert sorted(path.name for path in (study / "yardsticks").iterdir()) == [
        "hand-made.yaml",
        "multi-expert.yaml",
        "single-model.yaml",
    ]
    assert list((study / "front").glob("*.yaml"))
    assert Image.open(study / "samples.png").size[0] >= 64
    assert "Pareto" in (study / "report.html").read_text()


def test_a_trial_can_be_opened_and_scored_to_the_same_number(study):
    trial = read_trials(study)[0]
    from meme_nas.worker.objective import open_basis

    basis = open_basis(trial.config, "cpu", None)
    score = evaluate(load_ensemble(study / "trials" / "000"), basis.images, basis.space)
    assert score.fid == pytest.approx(trial.outcome.fid, rel=1e-6)


@pytest.mark.slow
def test_by_default_experts_are_searched_one_by_one_and_the_proxy_is_audited(tmp_path, capsys, monkeypatch):
    shown, before = run_module._audit_shown, []

    @contextmanager
    def look(*arguments):
        with shown(*arguments) as on_change:

            def changed():
                on_change()
                if not before and (tmp_path / "report.html").exists():
                    before.append((tmp_path / "report.html").read_text())

            yield changed

    monkeypatch.setattr(run_module, "_audit_shown", look)
    monkeypatch.setattr(run_module, "HAND_OVER_SECONDS", 0.0)
    run_search.main(["--budget", "5", "--study", str(tmp_path), "--audit-size", "4", *TINY])
    said = capsys.readouterr().out
    trials = read_trials(tmp_path)
    assert [trial.kind for trial in trials[:3]] == ["hand-made", "multi-expert", "single-model"]
    assert len(trials) == 3 + 2 * 4 and all(trial.state == "complete" for trial in trials)
    [report] = before
    assert "data:image/png" in report and "What the proxy is worth" not in report, "one to read meanwhile"
    assert "ranks the audited with Kendall's tau" in " ".join(said.split())
    assert "What the proxy is worth" in (tmp_path / "report.html").read_text()
    assert len(list((tmp_path / "audit").iterdir())) == 4, "four configurations, with the seed of the search"
    best = Config.load(tmp_path / "winner.yaml")
    assert any(trial.config.experts == best.experts for trial in trials if trial.choices)
    run_search.main(["--budget", "5", "--study", str(tmp_path), "--audit-size", "4", *TINY])
    assert len(read_trials(tmp_path)) == len(trials)


@pytest.mark.slow
def test_a_bank_shared_by_two_studies_trains_nothing_twice(tmp_path, without_workers):
    options = ["--budget", "4", "--bank", str(tmp_path / "bank"), "--study"]
    run_search.main([*options, str(tmp_path / "a"), *SMALL])
    weights = {path: path.stat().st_mtime_ns for path in (tmp_path / "bank").rglob("*.safetensors")}
    run_search.main([*options, str(tmp_path / "b"), *SMALL])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "bank").rglob("*.safetensors")} == weights
    first, second = (read_trials(tmp_path / name) for name in "ab")
    assert [trial.outcome.fid for trial in first] == [trial.outcome.fid for trial in second]


def test_the_same_command_goes_on(study, without_workers, capsys):
    before = read_trials(study)
    run_search.main(["--budget", "5", "--study", str(study), *SMALL])
    after = read_trials(study)
    assert after[:4] == before
    assert len(after) == 5
    run_search.main(["--budget", "5", "--study", str(study), *SMALL])
    assert "the budget of 5 is spent" in capsys.readouterr().out
    assert len(read_trials(study)) == 5


@pytest.mark.slow
def test_a_search_over_every_dimension_leaves_configs_that_meme_alone_loads(tmp_path, without_workers):
    names = ["split", "p", "pool_stride", "low_pool", "high_pool", "time", "experts", "boundaries"]
    run_search.main(["--budget", "4", "--study", str(tmp_path), *SMALL, "--dimensions", *names])
    trial = read_trials(tmp_path)[3]
    assert (trial.kind, trial.state) == ("candidate", "complete")
    assert {"experts", "interval8.length", "expert8.level2.high_pool", "expert1.time"} <= set(trial.choices)
    assert len(trial.config.experts) == trial.choices["experts"]
    assert Config.load(tmp_path / "trials" / "003" / "config.yaml") == trial.config
    for exported in (tmp_path / "front").glob("*.yaml"):
        assert Config.load(exported).training.steps > trial.config.training.steps
    assert "time_conditioning" in (tmp_path / "report.html").read_text()


def test_other_settings_are_refused(study, capsys):
    with pytest.raises(SystemExit) as stop:
        run_search.main(["--budget", "6", "--study", str(study), *SMALL, "--seed", "3"])
    assert stop.value.code == 2
    assert "seed: the study in" in capsys.readouterr().err


def test_the_winner_trains_samples_and_scores_without_optuna_and_ray(study, tmp_path):
    content = yaml.safe_load((study / "winner.yaml").read_text())
    content["training"]["steps"] = 12
    config = tmp_path / "winner.yaml"
    config.write_text(yaml.safe_dump(content))
    script = """
import sys
for name in ("optuna", "ray", "meme_nas", "search_spaces"):
    sys.modules[name] = None
from meme.cli.verbs import main
folder = sys.argv[1]
main(["train", folder + ".yaml"])
main(["sample", folder, "--count", "9"])
main(["evaluate", folder, "--seeds", "2", "--samples", "64"])
"""
    command = [sys.executable, "-c", script, str(tmp_path / "winner")]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=one_thread, check=False)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert re.search(r"FID +\d+\.\d+ \+- \d+\.\d+", said)
    for metric in ("sFID", "KID", "inception score", "precision", "recall"):
        assert metric in said
    assert "classifier(digits) features, 64 samples against all 1,797 images of digits" in said
    assert "ddim 20 steps, 2 sampling seeds" in said
    networks = ("trunk", *(f"expert-{number}" for number in range(1, 5)))
    assert {path.name for path in (tmp_path / "winner").iterdir() if not path.name.startswith(".")} == {
        "config.yaml",
        "evaluation.json",
        "samples.png",
        *(f"{name}.safetensors" for name in networks),
        *(f"{name}.training.safetensors" for name in networks),
    }


def test_dry_run_trains_nothing(tmp_path, capsys):
    run_search.main(["--dry-run", "--study", str(tmp_path / "study")])
    said = capsys.readouterr().out
    assert "8 dimensions" in said
    assert "one trial" in said
    assert not (tmp_path / "study").exists()


# Wrong input


def wrong_yaml(tmp_path, **changes):
    content = preset("digits-meme").model_dump(mode="json") | changes
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def expert_with(**changes):
    experts = preset("digits-meme").model_dump(mode="json")["experts"]
    return [experts[0] | changes, *experts[1:]]


def truncated(folder):
    folder.mkdir()
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(folder / "whole.png")
    (folder / "half.png").write_bytes((folder / "whole.png").read_bytes()[:60])
    return str(folder)


SEARCHES = {
    "budget": (["--budget", "0"], r"budget: .*greater than or equal to 1, not 0"),
    "preset": (["--preset", "digits-mem"], "preset: there is no 'digits-mem'; did you mean digits-meme"),
    "nothing to search": (["--preset", "digits-ldm-s"], "preset: digits-ldm-s has no splits"),
    "missing data": (["--data", "/nowhere/at/all"], "data: .*does not exist"),
    "device": (["--device", "toaster"], "device: must be one of auto, cpu"),
    "max-macs": (["--max-macs", "1000"], "max_macs: no candidate has so few"),
    "workers": (["--workers", "4", "--proposal-lag", "2"], "workers: at most proposal_lag 2, not 4"),
    "image size": (["--image-size", "9"], "image.size: must be a multiple of"),
}


@pytest.mark.parametrize("arguments, sentence", SEARCHES.values(), ids=SEARCHES)
def test_wrong_settings_of_a_search(arguments, sentence, tmp_path, capsys):
    assert_refused(run_search.main, [*arguments, "--study", str(tmp_path / "study")], sentence, capsys)
    assert not (tmp_path / "study").exists()


def test_wrong_data_of_a_search(tmp_path, capsys):
    study = ["--study", str(tmp_path / "study")]
    (tmp_path / "empty").mkdir()
    assert_refused(run_search.main, ["--data", str(tmp_path / "empty"), *study], "data: .* has no image", capsys)
    folder = truncated(tmp_path / "truncated")
    assert_refused(run_search.main, ["--data", folder, "--strict", *study], "half.png", capsys)
    assert not (tmp_path / "study").exists()


def test_a_results_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert_refused(run_search.main, ["--study", str(tmp_path / "file" / "x")], "study: .*can't be written", capsys)


def test_a_device_that_is_not_there_is_refused_with_those_that_are(monkeypatch):
    assert pick_device("auto") == torch.device("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert [str(pick_device(choice)) for choice in ("auto", "cpu", "cuda", "cuda:1")] == ["cuda", "cpu", "cuda", "cuda:1"]
    for choice in ("cuda:2", "mps", "meta", "cuda:-1", ""):
        with pytest.raises(UserError, match=f"device: must be one of auto, cpu, cuda, cuda:0, cuda:1 on .*, not {choice!r}"):
            pick_device(choice)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(UserError, match="device: must be one of auto, cpu on this machine, not 'cuda'"):
        pick_device("cuda")


CONFIGS = {
    "split": ({"experts": expert_with(low_channels=[4, 8])}, r"experts\[1\].low_channels\[1\]: must be a multiple of"),
    "probability": ({"experts": expert_with(p=1.5)}, r"experts\[1\].p: .*less than or equal to 1, not 1.5"),
    "unknown key": ({"trainin": {}}, "trainin: unknown key; did you mean training"),
    "no data": ({"data": ""}, "data: name a folder or a zip"),
}  # fmt: skip


@pytest.mark.parametrize("changes, sentence", CONFIGS.values(), ids=CONFIGS)
def test_wrong_configs(changes, sentence, tmp_path, capsys):
    assert_refused(meme_main, ["train", wrong_yaml(tmp_path, **changes)], sentence, capsys)
    assert not (tmp_path / "wrong").exists()


def test_a_folder_without_a_trained_ensemble(tmp_path, capsys):
    assert_refused(meme_main, ["sample", str(tmp_path)], "not a trained ensemble", capsys)


def test_training_does_not_overwrite_another(study, capsys):
    assert_refused(
        meme_main, ["train", "digits-ldm-s", "--out", str(study / "trials" / "000")], "holds a training with other", capsys
    )


def assert_refused(main, arguments, sentence, capsys):
    """Exit status 2 and one line on standard error."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert re.search(sentence, said), said
    assert said.startswith("error: ")
    assert said.count("\n") == 1


# Data of one's own


def test_a_folder_of_mixed_images_is_searched_with_one_flag(tmp_path, without_workers, capsys):
    folder = tmp_path / "mine"
    folder.mkdir()
    source = np.random.default_rng(0)
    for number, (mode, shape) in enumerate([("RGB", (40, 50, 3)), ("L", (64, 33)), ("RGBA", (35, 35, 4)), ("RGB", (90, 40, 3))]):
        Image.fromarray(source.integers(0, 255, shape, dtype=np.uint8), mode).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"not an image")
    arguments = [
        "--data",
        str(folder),
        "--budget",
        "1",
        "--proxy-steps",
        "1",
        "--samples",
        "8",
        "--engine",
        "local",
        "--image-size",
        "8",
        "--trunk-share",
        "0",
        "--p-share",
        "0",
        "--confirm-share",
        "0",
    ]
    run_search.main([*arguments, "--study", str(tmp_path / "study")])
    said = " ".join(capsys.readouterr().out.split())
    assert "1 of 5 files could not be read and were skipped: broken.png" in said
    trials = read_trials(tmp_path / "study")
    assert {trial.state for trial in trials} == {"complete"}
    assert trials[0].outcome.features == "random-conv"


@pytest.mark.skipif(not CIFAR.exists(), reason=f"needs {CIFAR}")
def test_cifar10_trains(tmp_path):
    """A zip of every 250th of its images: ``test_data.py`` reads them all."""
    with zipfile.ZipFile(CIFAR) as archive, zipfile.ZipFile(tmp_path / "few.zip", "w") as few:
        for name in [name for name in archive.namelist() if name.endswith(".jpg")][::250]:
            few.writestr(name, archive.read(name))
    small = {"training": {"steps": 2, "batch_size": 8}, "evaluation": {"samples": 16, "features": "random"}}
    config = preset("cifar10-meme").with_(data=str(tmp_path / "few.zip"), sampling={"steps": 4}, **small)
    images = open_reference(config)
    assert images.pixels.shape == (200, 3, 32, 32)
    ensemble = train(config, images, folder=tmp_path / "trained")
    from meme.scoring.features import choose_features

    score = evaluate(ensemble, images, choose_features("random", images))
    assert score.fid > 0
    assert score.grid.shape == (16, 3, 32, 32)


def test_a_zip_is_the_folder_it_holds(tmp_path):
    Image.fromarray(np.full((12, 12), 7, np.uint8)).save(tmp_path / "a.png")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "a.png")
    images = open_reference(preset("digits-meme").with_(data=str(tmp_path / "images.zip")))
    assert images.pixels.shape == (1, 1, 8, 8)
