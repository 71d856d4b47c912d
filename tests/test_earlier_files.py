"""Files that an earlier version left still open: a trained ensemble, its diffusers folder, a bank and a study.

``tests/earlier`` was made on 2026-11-29, before modules moved into folders; ``expected.json`` holds what was read from it then.
"""

import json
import shutil
from pathlib import Path

import torch
from toys import score

import meme.diffusers_model  # noqa: F401  # before diffusers
from meme.config.schema import Config
from meme.diffusion.ensemble import Ensemble
from meme.pipeline import draw, load_ensemble
from meme_nas.record.study import Study, read_trials
from meme_nas.settings import SearchSettings
from meme_nas.strategies.joint import Joint
from meme_nas.worker.bank import ExpertBank
from meme_nas.worker.objective import open_basis

import diffusers  # isort: skip
from diffusers.utils import dynamic_modules_utils  # isort: skip

EARLIER = Path(__file__).parent / "earlier"
EXPECTED = json.loads((EARLIER / "expected.json").read_text())


def sums(ensemble: Ensemble) -> list[float]:
    """Return the sum of two drawn images, and the sum of their squares."""
    images = torch.cat([torch.as_tensor(batch) for batch in draw(ensemble, 2, seed=0)]).double()
    return [float(images.sum()), float(images.square().sum())]


def test_a_trained_ensemble_draws_what_it_drew(tmp_path):
    shutil.copytree(EARLIER / "ensemble", tmp_path / "ensemble")
    found, (total, squares) = sums(load_ensemble(tmp_path / "ensemble")), EXPECTED["images"]
    assert abs(found[0] - total) <= 2 and abs(found[1] / squares - 1) < 1e-3  # of 8-bit pixels, which another CPU may round


def test_an_exported_folder_opens_in_diffusers(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = str(EARLIER / "exported")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    images = pipeline(batch_size=1, num_inference_steps=2, seed=0).images
    assert images[0].size == (8, 8)


def test_a_bank_has_its_experts(tmp_path):
    shutil.copytree(EARLIER / "bank", tmp_path / "bank")
    config = Config.load(EARLIER / "ensemble" / "config.yaml")
    basis = open_basis(config, "cpu", None)
    bank = ExpertBank(tmp_path / "bank", basis.data, basis.held_out)
    found = bank.find(config, 2)
    assert found is not None and (found.id, found.loss) == (EXPECTED["bank"]["id"], EXPECTED["bank"]["loss"])
    assert bank.load(config, 2, found)


def test_a_study_has_its_trials_and_goes_on(tmp_path):
    folder = shutil.copytree(EARLIER / "study", tmp_path / "study")
    expected = EXPECTED["trials"][: EXPECTED["kept_trials"]]
    assert [described(trial) for trial in read_trials(folder) if trial.state != "running"] == expected  # one was cut off
    settings = SearchSettings(budget=8, study=folder, strategy="joint", p_share=0.0)
    search = Joint(settings, Study(folder, settings.in_force(), settings.objectives))
    while (task := search.next_task()) is not None:
        search.record(score(task))
    search.study.close()
    complete = [described(trial) for trial in read_trials(folder) if trial.state == "complete"]
    assert complete[: len(expected)] == expected and len(complete) > len(expected)


def described(trial) -> dict:
    names = ("number", "kind", "state", "choices")
    return {name: getattr(trial, name) for name in names} | {"architecture": trial.config.architecture_id}
