"""Where the trials of a study leave their files. No Optuna: workers ask here too."""

from pathlib import Path

from meme_nas.record.tasks import CONFIRMATION, FINALIST, PROBABILITIES

TRIALS = "trials"
# Kinds of trials, and where these leave their files.
APART = {kind: kind for kind in ("audit", PROBABILITIES, CONFIRMATION)} | {FINALIST: "finalists"}
LOCK = ".lock"
LATENCY = "latency"


def latency_folder(study: Path) -> Path:
    """Return where the latencies of networks are recorded."""
    return study / LATENCY


def trial_folder(study: Path, number: int, kind: str = "candidate", rung: int = 0) -> Path:
    """Return where a trial keeps its config, weights and samples.

    Those of lower rungs, of the audit and of finalists are apart, as they have numbers of their own.
    """
    return study / (APART.get(kind) or (f"rung-{rung}" if rung else TRIALS)) / f"{number:03d}"
