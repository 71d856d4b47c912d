"""Details of single trials in the report: splits, samples and denoising films, with pictures as data URLs."""

import base64
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from meme_nas.record.folder import trial_folder
from meme_nas.record.trial_log import TrialRecord
from meme_nas.report import words
from meme_nas.report.patterns import pattern
from meme_nas.report.summary import Portrait, Summary

MOST_SAMPLES = 24 * 2**20  # bytes of pictures in the details of all trials; further pictures are only linked


def details(summary: Summary, first: Sequence[TrialRecord] = ()) -> list[dict[str, Any]]:
    """Return the details of every trial, in order. If not all pictures fit, the trials in ``first`` get theirs first."""
    hand_made = words.yardstick(summary, words.HAND_MADE)
    pictures = _pictures(summary, [*first, *summary.trials])
    return [
        {
            "number": trial.number,
            "title": f"Trial {trial.number}, {words.KIND_NAMES.get(trial.kind, trial.kind)}",
            "facts": _facts(summary, trial),
            "pattern": pattern("", trial.config, hand_made.config if hand_made and trial is not hand_made else None),
            "splits": words.splits_text(trial).split("  "),
            "image": pictures.get(trial.number),
            "file": _samples_file(summary, trial).relative_to(summary.folder).as_posix(),
        }
        for trial in summary.trials
    ]


def _facts(summary: Summary, trial: TrialRecord) -> list[str]:
    """Return scores and costs of a trial as text, or the reason why it has none."""
    if trial.state != "complete":
        return [": ".join(filter(None, (trial.state, trial.reason)))]
    outcome, final = trial.scored, words.final_score(summary, trial)
    name = words.metric_name(summary)
    scores = [f"{name} {words.score_text(outcome.quality)} in the search"]
    scores += [f"{name} {final} scored again, {final.seeds} sampling seeds"] if final else []
    scores += [f"latency {words.latency_text(outcome.latency_ms)}", f"took {words.duration(outcome.seconds)}"]
    return [*scores, f"{words.quantity(outcome.macs)} MACs", f"{words.quantity(outcome.params)} parameters"]


def _samples_file(summary: Summary, trial: TrialRecord) -> Path:
    return trial_folder(summary.folder, trial.number) / "samples.png"


def _pictures(summary: Summary, trials: Sequence[TrialRecord]) -> dict[int, str]:
    """Return samples as data URLs by trial number, at most ``MOST_SAMPLES`` bytes in all."""
    found: dict[int, str] = {}
    left = MOST_SAMPLES
    for trial in trials:
        image = None if trial.number in found else embedded(_samples_file(summary, trial))
        if image and len(image) <= left:
            found[trial.number] = image
            left -= len(image)
    return found


def films(summary: Summary) -> list[dict[str, Any]]:
    """Return the portraits as rows of pictures: the noise, then the frames of every expert's run of steps."""
    return [
        {
            "title": f"Winner, trial {portrait.trial.number}" if portrait.trial is summary.winner else "Hand-made pattern",
            "runs": _runs(portrait),
        }
        for portrait in summary.portraits
    ]


def _runs(portrait: Portrait) -> list[dict[str, Any]]:
    return [
        {
            "expert": expert,
            "frames": [{"timestep": frame.timestep, "image": png_url(frame.png)} for frame in frames],
        }
        for expert, frames in groupby(portrait.film, key=lambda frame: frame.expert)
    ]


def embedded(path: Path) -> str | None:
    """Return a PNG as a data URL; None if it can't be read."""
    try:
        return png_url(path.read_bytes())
    except OSError:
        return None


def png_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"
