"""A trained ensemble as a folder that diffusers opens: experts, scheduler, first stage, pipeline and model card.

It holds nothing but safetensors, JSON, the pipeline's few lines of Python and the card.
"""

import csv
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from meme.config.schema import Config
from meme.data.first_stage import open_first_stage
from meme.diffusion.sampler import build_scheduler
from meme.errors import UserError, shell_command
from meme.export.model_card import model_card
from meme.support.files import write_text
from meme.training.trainer import check_expert

EVALUATION = "evaluation.json"  # what `python -m meme evaluate` leaves in a trained folder
_INDEX, _PIPELINE = "model_index.json", "pipeline.py"


@dataclass(frozen=True)
class Trained:
    """A trained ensemble with its scores."""

    folder: Path
    config: Config
    scores: dict
    """``evaluation.json``, or the row of ``trials.csv``; empty where neither is there."""
    remark: str = ""
    """Which ensemble of a study was taken; empty where the folder was the ensemble's own."""


def find_trained(folder: Path) -> Trained:
    """Find the trained ensemble in ``folder``. Of a study it is the winner, trained in full if that is there, else as its trial
    left it.

    Raises ``UserError`` where there is none.
    """
    if (folder / "config.yaml").is_file():
        config = Config.load(folder / "config.yaml")
        _check_experts(config, folder)
        return Trained(folder, config, _evaluation(folder))
    if not (folder / "winner.yaml").is_file():
        raise UserError(f"folder: {folder} is neither a trained ensemble (config.yaml) nor a study with a winner (winner.yaml)")
    if _is_trained(folder / "winner"):
        found = find_trained(folder / "winner")
        return Trained(found.folder, found.config, found.scores, f"the study's winner, trained in full: {found.folder}")
    return _winning_trial(folder)


def export_diffusers(trained: Trained, out: Path, *, licence: str) -> Path:
    """Write ``trained`` to the folder ``out``, which appears whole or not at all; an earlier export there is replaced.

    Raises ``UserError`` for a folder that holds anything else, or a first stage that cannot be opened.
    """
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / _INDEX).is_file())):
        raise UserError(f"out: {out} holds something else than an earlier export; give another folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as building:
            whole = Path(building) / "export"
            _write(trained, whole, licence)
            shutil.rmtree(out, ignore_errors=True)
            whole.rename(out)
    except OSError as error:
        raise UserError(f"out: {out} can't be written ({error.strerror})") from None
    return out


def _write(trained: Trained, folder: Path, licence: str) -> None:
    from meme.diffusers_model import Experts  # all of diffusers' models, which only an export shall wait for
    from meme.pipeline import load_ensemble

    config = trained.config
    experts = Experts(_portable(config).model_dump(mode="json"))
    for target, source in zip(experts.experts, load_ensemble(trained.folder, one_at_a_time=True).experts, strict=True):
        target.load_state_dict(source.state_dict())
    experts.save_pretrained(folder / "experts", safe_serialization=True)
    scheduler = build_scheduler(config.diffusion, config.sampling, learned_variance=config.network.learned_variance)
    scheduler.save_pretrained(folder / "scheduler")
    if config.first_stage:
        autoencoder = open_first_stage(config.first_stage, config.image).model
        autoencoder.register_to_config(_name_or_path="")  # where it lies on this machine
        autoencoder.save_pretrained(folder / "vae", safe_serialization=True)
    shutil.copyfile(Path(__file__).with_name("diffusers_pipeline.py"), folder / _PIPELINE)
    write_text(folder / _INDEX, json.dumps(_index(config, type(scheduler).__name__), indent=2))
    write_text(folder / "README.md", model_card(config, trained.scores, licence))


def _index(config: Config, scheduler: str) -> dict:
    """Return the file that diffusers reads first: the class of the pipeline and of each of its parts."""
    import diffusers

    kinds = {"vq": "VQModel", "kl": "AutoencoderKL"}
    return {
        "_class_name": [Path(_PIPELINE).stem, "MemePipeline"],
        "_diffusers_version": diffusers.__version__,
        "experts": ["meme.diffusers_model", "Experts"],
        "scheduler": ["diffusers", scheduler],
        "vae": ["diffusers", kinds[config.first_stage.kind]] if config.first_stage else [None, None],
    }


def _portable(config: Config) -> Config:
    """Return ``config`` without the paths of the machine it was trained on."""
    stage = {"first_stage": {"source": "vae", "subfolder": ""}} if config.first_stage else {}
    return config.with_(data=Path(config.data).name, training={"initial_weights": None, "initial_digest": None}, **stage)


def _check_experts(config: Config, folder: Path) -> None:
    for number in range(1, len(config.experts) + 1):
        check_expert(config, number, folder)


def _is_trained(folder: Path) -> bool:
    """Return whether ``folder`` holds all experts of its config, with the config's architecture."""
    try:
        _check_experts(Config.load(folder / "config.yaml"), folder)
    except UserError:
        return False
    return True


def _winning_trial(study: Path) -> Trained:
    """Return the trial with the winner's config, in which only the length of the training may differ, or a confirmation of it
    with another seed.

    Where there are several, the one trained longest is taken.
    """
    winner = Config.load(study / "winner.yaml")
    found: list[Trained] = []
    for path in sorted((*study.glob("trials/*/config.yaml"), *study.glob("confirmation/*/config.yaml"))):
        config, kind = Config.load(path), path.parent.parent.name
        seed = {} if kind == "trials" else {"seed": winner.training.seed}
        alike = config.with_(training={"steps": winner.training.steps} | seed)
        if alike.architecture_id == winner.architecture_id and _is_trained(path.parent):
            name = "trial" if kind == "trials" else kind
            steps = f"weights of its {name} {path.parent.name}, {config.training.steps} steps an expert"
            remark = f"the study's winner, not trained in full yet: {steps}"
            scores = _evaluation(path.parent) or (_trial_scores(path.parent) if kind == "trials" else {})
            found.append(Trained(path.parent, config, scores, remark))
    if not found:
        command = shell_command(["python", "-m", "meme", "train", str(study / "winner.yaml")])
        raise UserError(f"folder: no weights of the winner in {study}; train it: {command}")
    return max(found, key=lambda trained: trained.config.training.steps)


def _evaluation(folder: Path) -> dict:
    try:
        return json.loads((folder / EVALUATION).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _trial_scores(folder: Path) -> dict:
    """Return the scores of a trial from its study's table, in the form of an evaluation with one sampling seed."""
    try:
        with (folder.parent.parent / "trials.csv").open(encoding="utf-8", newline="") as file:
            row = next(row for row in csv.DictReader(file) if int(row["number"]) == int(folder.name))
        fid, features = float(row["fid"]), row["features"]
        costs = {"macs": float(row["macs"]), "params": int(row["params"])}
    except (OSError, ValueError, KeyError, StopIteration):
        return {}
    protocol = f"{features} features, the sampling seed that the search chose it by"
    return {"metrics": {"fid": {"mean": fid, "values": [fid]}}, "protocol": protocol, **costs}
