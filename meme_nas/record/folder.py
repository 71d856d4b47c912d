"""Folders of a study's files. No Optuna, because workers import this too."""

from pathlib import Path

from meme_nas.record.tasks import CONFIRMATION, FINALIST, PROBABILITIES

TRIALS = "trials"
# Kinds of trials with folders of their own, and the names of these folders.
APART = {kind: kind for kind in ("audit", PROBABILITIES, CONFIRMATION)} | {FINALIST: "finalists"}
LOCK = ".lock"
LATENCY = "latency"


def latency_folder(study: Path) -> Path:
    """Return the folder with the recorded latencies of networks."""
    return study / LATENCY


def trial_folder(study: Path, number: int, kind: str = "candidate", rung: int = 0) -> Path:
    """Return the folder of a trial's config, weights and samples.

    Lower rungs and the stages after the search have other parent folders, because their trials have separate numbers.
    """
    return study / (APART.get(kind) or (f"rung-{rung}" if rung else TRIALS)) / f"{number:03d}"
