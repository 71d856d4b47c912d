"""What a search leaves for other programs: a table of trials, the winner and the front as plain configs."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from meme.config import Config
from meme.files import write_text
from meme_nas.pareto import OBJECTIVES, front
from meme_nas.settings import SearchSettings
from meme_nas.strategy import winner
from meme_nas.study import trial_folder
from meme_nas.trial_log import TrialRecord


def trials_table(trials: Sequence[TrialRecord]) -> pd.DataFrame:
    """A row a trial: number, state, kind, scores, seconds, every choice, and the reason of a failure or refusal."""
    return pd.DataFrame([_row(trial) for trial in trials]).convert_dtypes()  # whole numbers stay whole beside empty cells


def write_trials(folder: Path, trials: Sequence[TrialRecord]) -> None:
    """Write ``trials.csv``."""
    write_text(folder / "trials.csv", trials_table(trials).to_csv(index=False))


def export_configs(
    folder: Path, trials: Sequence[TrialRecord], settings: SearchSettings, best: TrialRecord | None = None
) -> None:
    """Write ``winner.yaml``, the yardsticks and the whole Pareto front as configs of full training length.

    They are plain configs: ``python -m meme train`` takes them with Optuna and Ray not installed.
    """
    best = best or winner(trials, settings.objectives)
    if best:
        full_training(best, settings, "winner").save(folder / "winner.yaml")
    for trial in trials:
        if trial.is_yardstick:
            full_training(trial, settings, trial.kind).save(folder / "yardsticks" / f"{trial.kind}.yaml")
    shutil.rmtree(folder / "front", ignore_errors=True)
    for trial in front(trials, settings.objectives):
        name = f"trial-{trial.number:03d}"
        full_training(trial, settings, name).save(folder / "front" / f"{name}.yaml")


def full_training(trial: TrialRecord, settings: SearchSettings, name: str) -> Config:
    """The trial's config with the training length and the samples of its preset."""
    full = settings.full_config()
    steps = round(full.training.steps * trial.config.training.steps / settings.steps_of_a_proxy(full))
    return trial.config.with_(name=name, training={"steps": steps}, evaluation={"samples": full.evaluation.samples})


def drop_weights(folder: Path, trials: Sequence[TrialRecord], objectives: Sequence[str] = OBJECTIVES) -> None:
    """Delete the weights of finished trials that are not worth keeping; their configs and samples stay."""
    keep = trials_worth_keeping(trials, objectives)
    for trial in trials:
        if trial.finished and trial.number not in keep:
            for weights in trial_folder(folder, trial.number).glob("*.safetensors"):
                weights.unlink(missing_ok=True)


def trials_worth_keeping(trials: Sequence[TrialRecord], objectives: Sequence[str] = OBJECTIVES) -> set[int]:
    """Numbers of the trials whose weights are looked at again: the front, the yardsticks and the winner.

    Until every yardstick is finished that is all of them: the hand-made pattern's MACs decide on the winner.
    """
    if not all(trial.finished for trial in trials if trial.is_yardstick):
        return {trial.number for trial in trials}
    best = winner(trials, objectives)
    chosen = [*front(trials, objectives), *(trial for trial in trials if trial.is_yardstick), *([best] if best else [])]
    return {trial.number for trial in chosen}


def _row(trial: TrialRecord) -> dict:
    outcome = trial.outcome
    scores = {
        name: getattr(outcome, name) if outcome else None for name in ("fid", "kid", "macs", "params", "latency_ms", "seconds")
    }
    row = {"number": trial.number, "state": trial.state, "kind": trial.kind, **scores}
    row |= {"architecture": trial.config.architecture_id, "features": outcome.features if outcome else None}
    return row | trial.choices | {"reason": trial.reason}
