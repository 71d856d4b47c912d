"""The report a person opens after a search: one HTML file that needs no network."""

import base64
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from meme.config import Config, ExpertConfig
from meme.files import write_text
from meme_nas import report_words as words
from meme_nas.report_figures import pareto_figure, progress_figure
from meme_nas.study import trial_folder
from meme_nas.summary import Summary
from meme_nas.trial_log import TrialRecord

TEMPLATE = "report.html.j2"
MOST_BARS = 16  # choices shown by importance; with many experts the rest explain next to nothing
_SHARE_COLOURS = (
    (237, 242, 250),
    (122, 163, 219),
    (43, 92, 168),
    (24, 56, 124),
)  # from all convolution to all attention


def write_report(summary: Summary, path: Path) -> None:
    """Write ``summary`` to ``path`` as one page with everything in it; the file appears whole or not at all."""
    write_text(path, _page(summary))


def _page(summary: Summary) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # titles, reasons and file names come from elsewhere
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    figures = {"pareto": pareto_figure(summary), "progress": progress_figure(summary)}
    return environment.get_template(TEMPLATE).render(
        summary=summary,
        state=words.state_line(summary),
        verdict=words.verdict(summary),
        notes=words.notes(summary),
        figures=figures,
        figures_json=_script_json(figures),
        plotly_js=get_plotlyjs(),
        patterns=_patterns(summary),
        scale=", ".join(_colour(place / 10) for place in range(11)),
        samples=_samples(summary),
        bars=_bars(summary.importance),
        bars_left_out=max(0, len(summary.importance) - MOST_BARS),
        audit=_audit(summary),
        columns=[(title.format(metric=words.metric_name(summary)), *rest) for title, *rest in _COLUMNS],
        metric=words.metric_name(summary),
        rows=[_row(trial, summary.winner) for trial in summary.trials],
    )


def _script_json(content: Any) -> str:
    """JSON that can stand in a script element: no ``<``, so nothing in it can close the element or open a comment."""
    return json.dumps(content, ensure_ascii=True).replace("<", "\\u003c")


@dataclass(frozen=True)
class _Cell:
    """One expert's split at one level."""

    low: int
    width: int
    change: int
    """C_l here less C_l of the hand-made pattern."""

    @property
    def share(self) -> float:
        return self.low / self.width

    @property
    def colour(self) -> str:
        return _colour(self.share)

    @property
    def ink(self) -> str:
        return "#fff" if self.share > 0.45 else "#16233b"


def _patterns(summary: Summary) -> list[dict]:
    """The winner's splits and, unless it is the same, the hand-made pattern's, to be drawn alike."""
    hand_made = words.yardstick(summary, words.HAND_MADE)
    shown = []
    if summary.winner and not summary.winner.is_yardstick:
        compared = hand_made.config if hand_made else None
        shown.append(_pattern(f"Winner, trial {summary.winner.number}", summary.winner.config, compared))
    if hand_made:
        won = summary.winner is not None and summary.winner.number == hand_made.number
        shown.append(_pattern("Hand-made pattern" + (", the winner" if won else ""), hand_made.config, None))
    return [pattern for pattern in shown if pattern["experts"]]


def _pattern(title: str, config: Config, compared: Config | None) -> dict:
    network = config.network
    if compared and (compared.network.widths != network.widths or len(compared.experts) != len(config.experts)):
        compared = None
    levels = [
        {"number": level, "size": config.image.size // 2 ** (level - 1), "width": width}
        for level, width in enumerate(network.widths, start=1)
    ]
    others = compared.experts if compared else config.experts
    experts = [
        {"number": number, "interval": expert.interval, "p": expert.p, "cells": _cells(expert, other, network.widths)}
        for number, (expert, other) in enumerate(zip(config.experts, others, strict=True), start=1)
        if expert.low_channels
    ]
    return {"title": title, "levels": levels, "experts": experts, "compared": compared is not None}


def _cells(expert: ExpertConfig, other: ExpertConfig, widths: tuple[int, ...]) -> list[_Cell]:
    return [
        _Cell(low, width, low - before)
        for low, before, width in zip(expert.low_channels, other.low_channels, widths, strict=True)
    ]


def _colour(share: float) -> str:
    """Between the two nearest of the scale's colours."""
    place = min(max(share, 0.0), 1.0) * (len(_SHARE_COLOURS) - 1)
    index = min(int(place), len(_SHARE_COLOURS) - 2)
    below, above, part = _SHARE_COLOURS[index], _SHARE_COLOURS[index + 1], place - index
    return "rgb({}, {}, {})".format(*(round(a + part * (b - a)) for a, b in zip(below, above, strict=True)))


def _samples(summary: Summary) -> list[dict]:
    """A picture and its scores for the winner and each yardstick."""
    winner = summary.winner
    shown = [(f"Winner, trial {winner.number}", winner)] if winner and not winner.is_yardstick else []
    for trial in words.yardsticks(summary):
        won = winner is not None and trial.number == winner.number
        name = words.KIND_NAMES.get(trial.kind, trial.kind)
        shown.append((name[:1].upper() + name[1:] + (", the winner" if won else ""), trial))
    return [_sample(summary, title, trial) for title, trial in shown]


def _sample(summary: Summary, title: str, trial: TrialRecord) -> dict:
    score = words.best_score(summary, trial) if trial.state == "complete" else None
    return {
        "title": title,
        "image": _embedded(trial_folder(summary.folder, trial.number) / "samples.png"),
        "score": f"{words.metric_name(summary)} {score}" if score else "no score",
        "details": _cost(trial) if score else ": ".join(filter(None, (trial.state, trial.reason))),
    }


def _cost(trial: TrialRecord) -> str:
    return f"{words.quantity(trial.outcome.macs)} MACs, {words.quantity(trial.outcome.params)} parameters"


def _embedded(path: Path) -> str | None:
    """A PNG as a data URL; None where it can't be read."""
    try:
        return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    except OSError:
        return None


def _audit(summary: Summary) -> dict | None:
    """What the section on the proxy shows; None without an audit."""
    if not summary.audited:
        return None
    ranked = sorted(summary.audited, key=lambda each: each.mean)
    return {
        "sentences": [words.audit_verdict(summary.agreements), *words.audited_words(summary)],
        "signals": [
            {"name": each.signal, "tau": f"{each.tau:.2f}", "interval": f"{each.low:.2f} to {each.high:.2f}"}
            for each in summary.agreements
        ],
        "rows": [
            {
                "name": f"trial {each.trial.number}" + ("" if each.trial.kind == "candidate" else f", {each.trial.kind}"),
                "proxy": words.score_text(each.trial.outcome.quality),
                "longer": str(words.Score(each.mean, each.deviation, len(each.scores), rescored=True)),
            }
            for each in ranked
        ],
    }


def _bars(importance: dict[str, float]) -> list[dict]:
    """The most important choices first, each with its share and its length relative to the longest."""
    ranked = sorted(((name, share) for name, share in importance.items() if math.isfinite(share)), key=lambda pair: -pair[1])
    longest = max((share for _, share in ranked), default=0.0) or 1.0
    return [
        {"name": _choice_name(name), "text": f"{100 * share:.1f}%", "length": f"{100 * share / longest:.1f}%"}
        for name, share in ranked[:MOST_BARS]
    ]


def _choice_name(name: str) -> str:
    """``expert2.level1.low`` as a person says it; other names as they are."""
    parts = re.sub(r"(expert|level|interval)(\d)", r"\1 \2", name).replace("_", " ").split(".")
    return ", ".join("split" if part == "low" else part for part in parts)


# Title and whether it holds numbers, which are right-aligned and sorted as such.
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


def _row(trial: TrialRecord, winner: TrialRecord | None) -> dict:
    """A table row: every cell as (text, what it is sorted by)."""
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
    won = winner is not None and trial.number == winner.number
    return {"cells": cells, "state": trial.state, "won": won, "yardstick": trial.is_yardstick}
