"""Report of a search as one HTML file that needs no network."""

import json
import math
import re
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from meme.support.files import write_text
from meme_nas.record.ranking import front
from meme_nas.record.trial_log import TrialRecord
from meme_nas.report import costs, words
from meme_nas.report.claims import LEAST_JUDGED, audit_words
from meme_nas.report.details import details, embedded, films
from meme_nas.report.figures import hypervolume_figure, lengths_figure, pareto_figures, progress_figure, spectra_figure
from meme_nas.report.patterns import colour_of, pattern
from meme_nas.report.summary import Summary
from meme_nas.rescoring.findings import Agreement

TEMPLATE = "report.html.j2"
MOST_BARS = 16  # choices shown by importance; with many experts, the others explain next to nothing


def write_report(summary: Summary, path: Path) -> None:
    """Write ``summary`` to ``path`` as one self-contained page. The write is atomic."""
    write_text(path, page(summary))


def page(summary: Summary, *, live: bool = False) -> str:
    """Return the report as self-contained HTML.

    With ``live`` the page loads plotly.js from the server of ``meme_nas.report.live`` and reloads when the search progresses.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # titles, reasons and file names come from elsewhere
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    paretos = pareto_figures(summary)
    figures = {
        **paretos,
        "progress": progress_figure(summary),
        "hypervolume": hypervolume_figure(summary),
        "spectra": spectra_figure(summary),
        "lengths": lengths_figure(summary),
    }
    best = [trial.number for trial in front(summary.trials, summary.objectives)]
    return environment.get_template(TEMPLATE).render(
        summary=summary,
        state=words.state_line(summary),
        verdict=words.verdict(summary),
        notes=words.notes(summary),
        figures=figures,
        paretos=[(name, costs.NAMES[kind]) for name, kind in zip(paretos, costs.costs_of(summary.objectives), strict=True)],
        objectives=costs.listed([words.metric_name(summary), *(costs.NAMES[kind] for kind in summary.objectives[1:])]),
        figures_json=_script_json(figures),
        plotly_js="" if live else get_plotlyjs(),
        live=live,
        patterns=_patterns(summary),
        scale=", ".join(colour_of(place / 10) for place in range(11)),
        samples=_samples(summary),
        films=films(summary),
        details=details(summary, [trial for trial in summary.trials if trial.is_yardstick or trial.number in best]),
        bars=_bars(summary.importance),
        bars_left_out=max(0, len(summary.importance) - MOST_BARS),
        audit=_audit(summary),
        columns=[(title.format(metric=words.metric_name(summary)), *rest) for title, *rest in _COLUMNS],
        metric=words.metric_name(summary),
        rows=[_row(trial, summary.winner, trial.number in best) for trial in summary.trials],
    )


def _script_json(content: Any) -> str:
    """Return ``content`` as JSON without ``<``, so that it cannot close its script element or open a comment."""
    return json.dumps(content, ensure_ascii=True).replace("<", "\\u003c")


def _patterns(summary: Summary) -> list[dict[str, Any]]:
    """Return the tables of splits of the winner and, unless it is the winner, of the hand-made pattern."""
    hand_made = words.yardstick(summary, words.HAND_MADE)
    shown = []
    if summary.winner and not summary.winner.is_yardstick:
        compared = hand_made.config if hand_made else None
        shown.append(pattern(f"Winner, trial {summary.winner.number}", summary.winner.config, compared))
    if hand_made:
        won = hand_made.is_same(summary.winner)
        shown.append(pattern("Hand-made pattern" + (", the winner" if won else ""), hand_made.config, None))
    return list(filter(None, shown))


def _samples(summary: Summary) -> list[dict[str, Any]]:
    """Return samples and scores of the winner and of each yardstick."""
    winner = summary.winner
    shown = [(f"Winner, trial {winner.number}", winner)] if winner and not winner.is_yardstick else []
    for trial in words.yardsticks(summary):
        won = trial.is_same(winner)
        name = words.KIND_NAMES.get(trial.kind, trial.kind)
        shown.append((name[:1].upper() + name[1:] + (", the winner" if won else ""), trial))
    return [_sample(summary, title, trial) for title, trial in shown]


def _sample(summary: Summary, title: str, trial: TrialRecord) -> dict[str, Any]:
    score = words.best_score(summary, trial) if trial.state == "complete" else None
    longer = summary.confirmed and summary.confirmed.of(trial)
    if longer:
        score = words.Score(longer.mean, longer.deviation, len(longer.scores), rescored=True)
    return {
        "title": title,
        "image": embedded(summary.folder_of(trial) / "samples.png"),
        "score": f"{words.metric_name(summary)} {score}" if score else "no score",
        "details": _cost(trial) if score else ": ".join(filter(None, (trial.state, trial.reason))),
    }


def _cost(trial: TrialRecord) -> str:
    return f"{words.quantity(trial.scored.macs)} MACs, {words.quantity(trial.scored.params)} parameters"


def _audit(summary: Summary) -> dict[str, Any] | None:
    """Return the content of the section on the proxy; None without an audit."""
    if not summary.audited:
        return None
    ranked = sorted(summary.audited, key=lambda each: each.mean)
    return {
        "sentences": audit_words(summary),
        "signals": [{"name": each.signal, "taus": [_tau(each), _tau(each.among_best)]} for each in summary.agreements],
        "rows": [
            {
                "name": f"trial {each.trial.number}" + ("" if each.trial.kind == "candidate" else f", {each.trial.kind}"),
                "proxy": words.score_text(each.trial.scored.quality),
                "longer": str(words.Score(each.mean, each.deviation, len(each.scores), rescored=True)),
            }
            for each in ranked
        ],
    }


def _tau(found: Agreement | None) -> str:
    """Return tau as text, with its interval if there are enough configurations for one."""
    if found is None:
        return words.NONE
    return f"{found.tau:.2f}" + (f" ({found.low:.2f} to {found.high:.2f})" if found.count >= LEAST_JUDGED else "")


def _bars(importance: dict[str, float]) -> list[dict[str, Any]]:
    """Return the most important choices, each with its share and the length of its bar relative to the longest."""
    ranked = sorted(((name, share) for name, share in importance.items() if math.isfinite(share)), key=lambda pair: -pair[1])
    longest = max((share for _, share in ranked), default=0.0) or 1.0
    return [
        {"name": _choice_name(name), "text": f"{100 * share:.1f}%", "length": f"{100 * share / longest:.1f}%"}
        for name, share in ranked[:MOST_BARS]
    ]


def _choice_name(name: str) -> str:
    """Return a readable name, such as ``expert 2, level 1, split`` for ``expert2.level1.low``."""
    parts = re.sub(r"(expert|level|interval)(\d)", r"\1 \2", name).replace("_", " ").split(".")
    return ", ".join("split" if part == "low" else part for part in parts)


# Title of each column, and True if it holds numbers, which are right-aligned and sorted as numbers.
_COLUMNS = (
    ("Trial", True),
    ("Kind", False),
    ("State", False),
    ("{metric}", True),
    ("MACs", True),
    ("Params", True),
    ("Latency", True),
    ("Time", True),
    ("Splits", False),
    ("Reason", False),
)


def _row(trial: TrialRecord, winner: TrialRecord | None, on_front: bool) -> dict[str, Any]:
    """Return a table row. Every cell is a pair (text, sort key)."""
    outcome = trial.outcome
    names = ("quality", "macs", "params", "latency_ms")
    score, macs, params, latency = outcome.values(names) if outcome else (None,) * len(names)
    seconds = outcome.seconds if outcome else None
    cells = [
        (str(trial.number), trial.number),
        (trial.kind, trial.kind),
        (trial.state, trial.state),
        (words.score_text(score), score),
        (words.quantity(macs), macs),
        (words.quantity(params), params),
        (words.latency_text(latency), latency),
        (words.duration(seconds), seconds),
        (words.splits_text(trial), words.splits_text(trial)),
        (trial.reason, trial.reason),
    ]
    won = trial.is_same(winner)
    kind = "yardstick" if trial.is_yardstick else "candidate"
    classes = [trial.state, kind, *(["won"] if won else []), *(["front"] if on_front else [])]
    return {"number": trial.number, "cells": cells, "classes": " ".join(classes)}
