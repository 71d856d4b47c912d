"""Files of a search for other programs: a table of trials, and the winner and the front as plain configs."""

import csv
import io
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from meme.config.presets import yardsticks
from meme.config.schema import Config
from meme.support.files import write_text
from meme_nas.record.folder import trial_folder
from meme_nas.record.ranking import Standings, front, winner
from meme_nas.record.trial_log import TrialRecord
from meme_nas.report.claims import confirmed_words, unconfirmed_words
from meme_nas.rescoring.findings import Confirmed
from meme_nas.settings import SearchSettings


class Kept:
    """Keep a study's folder current: rewrite ``trials.csv``, delete weights that are no longer on the front.

    The table has one row per trial: number, state, kind, scores, seconds, every choice, and the reason of a failure or refusal.
    Each call looks at new trials only, so that its cost does not grow with the search.
    """

    def __init__(self, folder: Path, objectives: Sequence[str]):
        self._folder, self._standings = folder, Standings(objectives)
        self._columns: dict[str, None] = {}
        self._lines: dict[int, str] = {}  # rows of finished trials, by number
        self._held: set[int] = set()  # finished trials whose weights are on disk

    def update(self, trials: Sequence[TrialRecord]) -> None:
        self._held |= {trial.number for trial in self._standings.update(trials)}
        self._write(trials)
        if (keep := self._standings.worth_keeping) is not None:
            drop_weights(self._folder, self._held - keep)
            self._held &= keep

    def _write(self, trials: Sequence[TrialRecord]) -> None:
        rows = {trial.number: _row(trial) for trial in trials if trial.number not in self._lines}
        columns = self._columns | dict.fromkeys(name for row in rows.values() for name in row)
        if columns.keys() != self._columns.keys():  # for example at the first trial with choices
            rows, self._lines = {trial.number: _row(trial) for trial in trials}, {}
            self._columns = dict.fromkeys(name for name in columns if name != "reason") | {"reason": None}
        lines = {number: _line([row.get(name) for name in self._columns]) for number, row in rows.items()}
        self._lines |= {trial.number: lines[trial.number] for trial in trials if trial.finished and trial.number in lines}
        body = "".join(self._lines.get(trial.number) or lines[trial.number] for trial in trials)
        write_text(self._folder / "trials.csv", _line(self._columns) + body)


def _line(values: Iterable) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()


def export_configs(
    folder: Path,
    trials: Sequence[TrialRecord],
    settings: SearchSettings,
    best: TrialRecord | None = None,
    confirmed: Confirmed | None = None,
) -> None:
    """Write ``winner.yaml``, the yardsticks and the whole Pareto front as configs of full training length.

    They are plain configs: ``python -m meme train`` takes them without Optuna and Ray. ``winner.yaml`` is the recommended config.
    If that is the hand-made pattern, ``best-of-search.yaml`` is the best config that the search found. A comment at the top of
    both states the result of the confirmation.
    """
    best = best or winner(trials, settings.objectives)
    (folder / "best-of-search.yaml").unlink(missing_ok=True)
    if best:
        recommended = confirmed.recommended if confirmed else best
        said = confirmed_words(confirmed, settings.first_objective) if confirmed else unconfirmed_words(best)
        _save(full_training(recommended, settings, "winner"), folder / "winner.yaml", said)
        if recommended is not best:
            _save(full_training(best, settings, "best-of-search"), folder / "best-of-search.yaml", said)
    for trial in trials:
        if trial.is_yardstick:
            full_training(trial, settings, trial.kind).save(folder / "yardsticks" / f"{trial.kind}.yaml")
    for earlier in (folder / "front").glob("trial-*.yaml"):  # other files there are the user's
        earlier.unlink()
    for trial in front(trials, settings.objectives):
        name = f"trial-{trial.number:03d}"
        full_training(trial, settings, name).save(folder / "front" / f"{name}.yaml")


def _save(config: Config, path: Path, said: str) -> None:
    """Write a config below ``said`` as a comment."""
    lines = textwrap.wrap(said, width=118)
    write_text(path, "".join(f"# {line}\n" for line in lines) + config.to_yaml())


def full_training(trial: TrialRecord, settings: SearchSettings, name: str) -> Config:
    """Return the trial's config with its preset's training length and number of samples, and the current path of the data."""
    rivals = yardsticks(settings.preset_name)
    own = settings.applied_to(rivals[trial.kind]) if trial.kind in rivals else settings.full_config()
    full = settings.in_full(own)
    steps = max(1, round(full.training.steps * len(full.experts) / len(trial.config.experts)))
    training = {"steps": steps, "trunk_steps": full.training.trunk_steps}
    where = {"data": full.data, "follow_links": full.follow_links}
    return trial.config.with_(name=name, **where, training=training, evaluation={"samples": full.evaluation.samples})


def drop_weights(folder: Path, numbers: Iterable[int]) -> None:
    """Delete the weights of the trials ``numbers``. Their configs and samples stay."""
    for number in numbers:
        for weights in trial_folder(folder, number).glob("expert-*.safetensors"):
            weights.unlink(missing_ok=True)


def _row(trial: TrialRecord) -> dict:
    outcome = trial.outcome
    scores = {
        name: getattr(outcome, name) if outcome else None
        for name in ("fid", "kid", "macs", "params", "latency_ms", "latency_device", "seconds")
    }
    row = {"number": trial.number, "state": trial.state, "kind": trial.kind, **scores}
    row |= {"architecture": trial.architecture_id, "features": outcome.features if outcome else None}
    return row | trial.choices | {"reason": trial.reason}
