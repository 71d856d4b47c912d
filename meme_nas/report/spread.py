"""Share of the spread of a search's scores that one kind of choice explains.

The logarithm of the score is regressed on all choices of one kind by least squares. A numeric choice has a linear and a square
term, another choice one term for each option except the first. R² is adjusted for the number of terms, so that a kind which
explains nothing has about 0, whatever its number of choices.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meme_nas.record.trial_log import TrialRecord

MOST = 0.5  # share of the spread that a dominant kind explains at least
LITTLE = 1 / 3  # largest share of the other kinds together, relative to the dominant kind's
LEAST_FREE = 10  # configurations beyond the number of terms; with fewer, R² is chance
KIND_NAMES = {"low": "split", "length": "boundaries"}


@dataclass(frozen=True)
class Dominant:
    """A kind of choice that explains most of the spread."""

    kind: str
    share: float
    """Adjusted R² of that kind alone."""
    others: tuple[str, ...]
    """The other kinds that were searched."""
    share_of_others: float
    """Adjusted R² of the other kinds together."""
    count: int
    """Number of scored configurations."""


def dominant(trials: Sequence[TrialRecord], objective: str) -> Dominant | None:
    """Return the kind that alone explains more than ``MOST`` of the spread, if all others explain less than a third as much.

    None if there is no such kind, if only one was searched, or if too few configurations are scored.
    """
    scored = [trial for trial in trials if trial.state == "complete" and trial.choices]
    scores = np.array([trial.scored.values([objective])[0] for trial in scored], dtype=float)
    values = np.log(scores) if len(scores) and scores.min() > 0 else scores
    columns = _columns_by_kind(scored)
    for kind in columns:
        others = {other: own for other, own in columns.items() if other != kind}
        if not others:
            break
        share = _explained(np.hstack(columns[kind]), values)
        rest = _explained(np.hstack([column for own in others.values() for column in own]), values)
        if share > MOST and rest < LITTLE * share:
            return Dominant(kind, share, tuple(others), rest, len(scored))
    return None


def kind_of(choice: str) -> str:
    """Return the kind of a choice by its name: ``split`` for ``expert2.level1.low``, ``p`` for ``expert2.p``."""
    last = choice.rpartition(".")[2]
    return KIND_NAMES.get(last, last.replace("_", " "))


def _columns_by_kind(scored: Sequence[TrialRecord]) -> dict[str, list[NDArray[np.float64]]]:
    """Return the regression terms (T, ...) of every kind for T trials, without choices that only some trials have."""
    names = [name for name in (scored[0].choices if scored else ()) if all(name in trial.choices for trial in scored)]
    found: dict[str, list[NDArray[np.float64]]] = {}
    for name in names:
        terms = _terms([trial.choices[name] for trial in scored])
        if terms.size:
            found.setdefault(kind_of(name), []).append(terms)
    return found


def _terms(values: Sequence[object]) -> NDArray[np.float64]:
    """Return the regression terms (T, ...) of one choice: value and square if numeric, else a column for each further option.

    There are none if all values are equal, and only the value if there are two.
    """
    options = list(dict.fromkeys(values))
    if len(options) == 1:
        return np.empty((len(values), 0))
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    if len(numbers) < len(values):
        return np.array([[float(value == option) for option in options[1:]] for value in values])
    centred = np.array(numbers) - np.mean(numbers)
    scaled = centred / np.abs(centred).max()
    return np.stack([scaled, scaled**2], axis=1) if len(options) > 2 else scaled[:, None]


def _explained(terms: NDArray[np.float64], values: NDArray[np.float64]) -> float:
    """Return adjusted R²; NaN with fewer than ``LEAST_FREE`` free configurations, or if all scores are equal."""
    design = np.hstack([np.ones((len(values), 1)), terms])
    fitted, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
    free, total = len(values) - int(rank), float(np.square(values - values.mean()).sum())
    if free < LEAST_FREE or total <= 0:
        return math.nan
    return 1 - float(np.square(values - design @ fitted).sum()) / free * (len(values) - 1) / total
