"""Text for costs in the report. The costs shown are those that the search minimises."""

import math
from collections.abc import Sequence

from meme_nas.record.trial_log import TrialRecord

NAMES = {"macs": "MACs", "params": "parameters", "latency_ms": "latency"}
AXES = {"macs": "MACs an image and step", "params": "parameters", "latency_ms": "latency, ms an image"}


def costs_of(objectives: Sequence[str]) -> tuple[str, ...]:
    """Return the kinds of cost to show: those among ``objectives``, or MACs if none is minimised."""
    return tuple(objectives[1:]) or ("macs",)


def cost_of(trial: TrialRecord, kind: str) -> float:
    """Return one kind of cost of a complete trial; NaN if it is unknown."""
    value = trial.scored.values([kind])[0]
    return math.nan if value is None else float(value)


def named(objectives: Sequence[str]) -> str:
    """Return the names of the costs to show, such as ``MACs and parameters``."""
    return listed([NAMES[kind] for kind in costs_of(objectives)])


def at_no_more(objectives: Sequence[str]) -> str:
    """Return text such as `` at no more MACs``; empty if no cost is minimised."""
    return f" at no more {named(objectives)}" if objectives[1:] else ""


def compared(trial: TrialRecord, other: TrialRecord, objectives: Sequence[str]) -> str:
    """Return the costs of ``trial`` relative to those of ``other``, such as ``2% fewer MACs and equal parameters``."""
    found = [(kind, cost_of(trial, kind), cost_of(other, kind)) for kind in costs_of(objectives)]
    return listed([_difference(*each) for each in found])


def listed(parts: Sequence[str]) -> str:
    """Return the parts as a list in a sentence: ``a``, ``a and b``, ``a, b and c``."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def _difference(kind: str, cost: float, other: float) -> str:
    if not (math.isfinite(cost) and math.isfinite(other) and other > 0):
        return f"unknown {NAMES[kind]}"
    percent = 100 * abs(cost - other) / other
    if percent < 0.05:
        return f"equal {NAMES[kind]}"
    less, more = ("lower", "higher") if kind == "latency_ms" else ("fewer", "more")
    return f"{percent:.{0 if percent >= 1 else 1}f}% {less if cost < other else more} {NAMES[kind]}"
