"""Warm start of a study: the points of an earlier study's Pareto front that are in the new space, best first."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from meme_nas.record.ranking import cost_limits, front
from meme_nas.record.study import read_trials
from meme_nas.record.trial_log import TrialRecord
from search_spaces.domain import Choices
from search_spaces.space import Space


@dataclass(frozen=True)
class WarmStart:
    """Points to propose first, in this order."""

    points: tuple[Choices, ...] = ()
    said: str | None = None
    """Sentence on the number of points taken from the earlier front; None without a warm start."""


def warm_start(folder: Path, space: Space, objectives: Sequence[str]) -> WarmStart:
    """Return the Pareto front of the study in ``folder`` over score and the costs in ``objectives``, limited to ``space``.

    Trials within the costs of the earlier hand-made pattern, which limit a winner, are first. Both parts are sorted by score, so
    that the first trial is the earlier winner. Raises ``UserError`` if ``folder`` holds no study.
    """
    trials = read_trials(folder)
    measured = ("quality", *objectives[1:])  # the earlier study may have minimised the other of FID and KID
    usable = [trial for trial in trials if trial.outcome and None not in trial.outcome.values(measured)]
    best = sorted(front(usable, measured), key=lambda trial: _rank(trial, measured, cost_limits(trials, measured)))
    points: list[Choices] = []
    reasons: dict[str, None] = {}
    for trial in best:
        reason = _misfit(trial.choices, space)
        if reason:
            reasons[reason] = None
            continue
        point = {name: trial.choices[name] for name in space.domains}
        if point not in points:  # trials that differ only in dimensions no longer searched give one point
            points.append(point)
    fitting = sum(not _misfit(trial.choices, space) for trial in best)
    return WarmStart(tuple(points), _said(folder, len(best), fitting, len(points), list(reasons)))


def _rank(trial: TrialRecord, objectives: Sequence[str], limits: Sequence[float]) -> tuple[bool, float, int]:
    quality, *costs = trial.scored.values(objectives)
    return any(cost > limit for cost, limit in zip(costs, limits, strict=True)), quality, trial.number


def _misfit(choices: Choices, space: Space) -> str | None:
    """Return the reason why ``choices`` are not in ``space``; None if they are."""
    for name, domain in space.domains.items():
        if name not in choices:
            return f"the earlier study did not search {name}"
        if choices[name] not in domain.values:
            return f"{name} {choices[name]} is not in this space"
    return None


def _said(folder: Path, found: int, fitting: int, points: int, reasons: Sequence[str]) -> str:
    start = f"warm start: the study in {folder}"
    if not found:
        return f"{start} has no scored trial of its space, so nothing is taken from it"
    front = f"the {found} on the front of {folder}" if found > 1 else f"the one on the front of {folder}"
    why = f" ({'; '.join(reasons[:2])}{'; and more' if len(reasons) > 2 else ''})" if reasons else ""
    if not fitting:
        return f"warm start: none of {front} fits this space{why}; the search begins without them"
    taken = "all" if fitting == found else f"{fitting} fit this space{why} and"
    different = f", {points} of them different here" if points < fitting else ""
    return f"warm start: of {front}, {taken} are proposed first, the best first{different}"
