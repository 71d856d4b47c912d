"""Pareto fronts: which trials no other beats in everything."""

from collections.abc import Iterable

from meme_nas.study import TrialRecord


def front(trials: Iterable[TrialRecord]) -> list[TrialRecord]:
    """The completed trials that no other beats at both FID and MACs, cheapest first; of equals the earliest."""
    scored = [trial for trial in trials if trial.state == "complete"]
    scored.sort(key=lambda trial: (trial.outcome.macs, trial.outcome.fid, trial.number))
    kept: list[TrialRecord] = []
    for trial in scored:
        if not kept or trial.outcome.fid < kept[-1].outcome.fid:
            kept.append(trial)
    return kept
