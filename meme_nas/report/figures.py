"""Plots of the report as plotly.js figures.

Figures are plain dicts. Text that starts with ``--`` names a CSS variable. The browser inserts its value, so that figures follow
the light or dark theme.
"""

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from meme_nas.record.ranking import front, hypervolumes
from meme_nas.record.trial_log import TrialRecord
from meme_nas.report.costs import AXES, cost_of, costs_of
from meme_nas.report.labels import along_steps, offsets
from meme_nas.report.summary import AtLength, Spectrum, Summary
from meme_nas.report.words import (
    HAND_MADE,
    KIND_NAMES,
    Score,
    best_score,
    duration,
    feature_spaces,
    final_score,
    latency_text,
    metric_name,
    quantity,
    score_of,
    score_text,
    search_score,
    splits_text,
    yardstick,
    yardsticks,
)

Figure = dict[str, Any]

LOG_FROM = 8  # ratio of largest to smallest score above which the axis is logarithmic
# Symbol, size and colour. A triangle looks smaller than other symbols of its size.
_MARKS = {
    HAND_MADE: ("diamond", 13, "--hand-made"),
    "multi-expert": ("square", 12, "--multi-expert"),
    "single-model": ("triangle-up", 17, "--single-model"),
    "candidate": ("circle", 11, "--accent"),
    "winner": ("star", 20, "--winner"),
}
_SHORT_NAMES = {"single-model": "single model", "candidate": "other finalists"}


def pareto_figures(summary: Summary) -> dict[str, Figure | None]:
    """Return one figure for each minimised cost, by the id of its place in the page."""
    kinds = costs_of(summary.objectives)
    return {f"pareto-{kind}" if place else "pareto": pareto_figure(summary, kind) for place, kind in enumerate(kinds)}


def pareto_figure(summary: Summary, kind: str) -> Figure | None:
    """Return the plot of FID or KID against one kind of cost: complete trials, front, yardsticks and winner.

    None while no trial is complete. Points and front show the search's own scores. Symbols show the quoted scores: mean and
    deviation if a trial was scored again. The distance of a symbol to its point is the selection bias of the search's score.
    """
    cost = partial(cost_of, kind=kind)
    complete = [trial for trial in _complete(summary) if math.isfinite(cost(trial))]
    if not complete:
        return None
    shown = [trial for trial in _marked(summary) if math.isfinite(cost(trial))]
    marked = [_mark(summary, trial, cost, best_score(summary, trial)) for trial in shown]
    ticks = {} if kind == "latency_ms" else {"tickformat": "~s"}
    x_axis = _axis(AXES[kind], **ticks, range=_padded([cost(trial) for trial in complete]))
    y_axis = _score_axis(summary, complete)
    points = _points("trials", complete, cost, _POINT)
    return {
        "data": [points, _front(summary, cost), *marked],
        "layout": _layout(xaxis=x_axis, yaxis=y_axis, annotations=_labels(summary, cost, x_axis, y_axis)),
    }


def progress_figure(summary: Summary) -> Figure | None:
    """Return the plot of the search's own scores over trial numbers, with the best score so far; None if no trial is complete.

    The best score is over the searched space, which does not contain all yardsticks.
    """
    complete = _complete(summary)
    if not complete:
        return None
    searched = [trial for trial in complete if trial.in_space]
    candidates = [trial for trial in complete if not trial.is_yardstick]
    marked = [_mark(summary, trial, _number, search_score(trial)) for trial in _marked(summary, finalists=False)]
    return {
        "data": [_points("candidates", candidates, _number, _POINT), _running_best(searched), *marked],
        "layout": _layout(
            xaxis=_axis("trial", range=[-1, complete[-1].number + 1]),
            yaxis=_score_axis(summary, complete, title=metric_name(summary)),
        ),
    }


def hypervolume_figure(summary: Summary) -> Figure | None:
    """Return the plot of the front's hypervolume over trial numbers.

    The volume is a share of the box from 0 to ``ROOM`` times the hand-made pattern's values of all objectives. None if the
    hand-made pattern has no score.
    """
    searched = [trial for trial in _complete(summary) if trial.in_space]
    hand_made = yardstick(summary, HAND_MADE)
    objectives = summary.objectives
    if hand_made is None or hand_made.state != "complete" or not all(_finite(trial, objectives) for trial in searched):
        return None
    reference = [ROOM * value for value in hand_made.scored.values(objectives)]
    volumes = hypervolumes(searched, objectives, reference)
    trace = {
        "type": "scatter",
        "name": "hypervolume",
        "mode": "lines+markers",
        "x": [trial.number for trial in searched],
        "y": volumes,
        "customdata": [trial.number for trial in searched],
        "line": {"shape": "hv", "color": "--accent", "width": 2},
        "marker": {"size": 6, "color": "--accent"},
        "hovertemplate": "after trial %{x}: %{y:.4f}<extra></extra>",
    }
    x_axis = _axis("trial", range=[-1, searched[-1].number + 1])
    return {
        "data": [trace],
        "layout": _layout(xaxis=x_axis, yaxis=_axis("hypervolume", range=_padded(volumes)), showlegend=False),
    }


def spectra_figure(summary: Summary) -> Figure | None:
    """Return the plot of every expert's spectrum in the middle of its interval; None without portraits.

    Lines of the winner are solid, those of the hand-made pattern are dotted.
    """
    if not summary.portraits:
        return None
    traces = [
        _spectrum(portrait.trial, spectrum, len(portrait.spectra), dotted=place > 0)
        for place, portrait in enumerate(summary.portraits)
        for spectrum in portrait.spectra
    ]
    x_axis = _axis("frequency", tickformat=".2~f", ticksuffix="π", range=[0, 1.02])
    return {"data": traces, "layout": _layout(xaxis=x_axis, yaxis=_axis("relative log amplitude"))}


def _spectrum(trial: TrialRecord, spectrum: Spectrum, experts: int, dotted: bool) -> Figure:
    colour = _EXPERT_COLOURS[min(len(_EXPERT_COLOURS) - 1, (spectrum.expert - 1) * len(_EXPERT_COLOURS) // max(experts, 1))]
    who = html.escape(KIND_NAMES.get(trial.kind, trial.kind) if trial.is_yardstick else f"trial {trial.number}")
    return {
        "type": "scatter",
        "name": f"expert {spectrum.expert}",
        "showlegend": not dotted,  # dotted lines have the colours of the solid ones
        "mode": "lines+markers",
        "x": list(spectrum.frequencies),
        "y": list(spectrum.relative_log_amplitude),
        "line": {"color": colour, "width": 2, "dash": "dot" if dotted else "solid"},
        "marker": {"size": 6, "color": colour},
        "hovertemplate": f"{who}, expert {spectrum.expert} at t {spectrum.timestep}<br>%{{x:.2f}}π: %{{y:.2f}}<extra></extra>",
    }


ROOM = 1.1  # reference point of the hypervolume, times the hand-made pattern's values: so that the pattern itself has volume
_EXPERT_COLOURS = ("--expert-1", "--expert-2", "--expert-3", "--expert-4")  # from least noise to most
_POINT = {"color": "--muted", "size": 8, "opacity": 0.75}


def _front(summary: Summary, cost: Callable[[TrialRecord], float]) -> Figure:
    """Return the trace of the front over all objectives. Its points are joined only if there are two objectives."""
    best = [trial for trial in front(summary.trials, summary.objectives) if math.isfinite(cost(trial))]
    trace = _points("Pareto front", best, cost, {"color": "--accent", "size": 8})
    line = {"mode": "lines+markers", "line": {"shape": "hv", "color": "--accent", "width": 2}}
    return trace | (line if len(summary.objectives) == 2 else {})


def _marked(summary: Summary, finalists: bool = True) -> list[TrialRecord]:
    """Return the trials that get a symbol of their own, the winner last and so on top."""
    marked = [trial for trial in yardsticks(summary) if trial.state == "complete"]
    if finalists:
        marked += [trial for trial in _complete(summary) if not trial.is_yardstick and final_score(summary, trial)]
    return [trial for trial in marked if not _won(summary, trial)] + ([summary.winner] if summary.winner else [])


def _mark(summary: Summary, trial: TrialRecord, x_of: Callable[[TrialRecord], float], score: Score) -> Figure:
    won = _won(summary, trial)
    symbol, size, colour = _MARKS["winner"] if won else _MARKS.get(trial.kind, ("cross", 12, "--ink"))
    marker = {"symbol": symbol, "size": size, "color": colour, "line": {"width": 1.5, "color": "--panel"}}
    name = f"winner: {_who(trial)}" if won else _short_name(trial)
    trace = _points(name, [trial], x_of, marker) | {"y": [score.mean]}
    if score.rescored:
        trace["hovertext"] = [f"{_hover(trial)}<br>scored again: {score} over {score.seeds} sampling seeds"]
    if score.has_spread:
        trace["error_y"] = {"type": "data", "array": [score.deviation], "color": colour, "thickness": 2, "width": 6}
    if trial.kind == "candidate" and not won:
        first = next(other for other in _marked(summary) if other.kind == "candidate")
        trace |= {"legendgroup": "finalists", "showlegend": trial is first}
    return trace


def _running_best(complete: list[TrialRecord]) -> Figure:
    best, scores = math.inf, []
    for trial in complete:
        best = min(best, score_of(trial))
        scores.append(best)
    return {
        "type": "scatter",
        "name": "best so far",
        "mode": "lines",
        "x": [trial.number for trial in complete],
        "y": scores,
        "line": {"shape": "hv", "color": "--accent", "width": 2},
        "hoverinfo": "skip",
    }


def _points(name: str, trials: list[TrialRecord], x_of: Callable[[TrialRecord], float], marker: Figure) -> Figure:
    return {
        "type": "scatter",
        "name": html.escape(name),
        "mode": "markers",
        "x": [x_of(trial) for trial in trials],
        "y": [score_of(trial) for trial in trials],
        "marker": marker,
        "customdata": [trial.number for trial in trials],  # what a click opens
        "hoverinfo": "text",
        "hovertext": [_hover(trial) for trial in trials],
    }


def _hover(trial: TrialRecord) -> str:
    """Return the hover text of a trial. Plotly reads a subset of HTML, so all text from elsewhere is escaped."""
    outcome = trial.scored
    lines = [
        f"{outcome.metric.upper()} {score_text(outcome.quality)}",
        f"{quantity(outcome.macs)} MACs, {quantity(outcome.params)} parameters",
        f"latency {latency_text(outcome.latency_ms)}, took {duration(outcome.seconds)}",
        *splits_text(trial).split("  "),
    ]
    head = f"<b>trial {trial.number}</b> {html.escape(KIND_NAMES.get(trial.kind, trial.kind))}"
    return "<br>".join([head, *map(html.escape, lines)])


def _labels(summary: Summary, cost: Callable[[TrialRecord], float], x_axis: Figure, y_axis: Figure) -> list[Figure]:
    """Return labels with leader lines for yardsticks and winner. A narrow page omits them."""
    marked = [trial for trial in _marked(summary) if trial.is_yardstick or _won(summary, trial)]
    marked = [trial for trial in marked if math.isfinite(cost(trial))]
    texts = ["winner" if _won(summary, trial) else _short_name(trial) for trial in marked]
    place = partial(_place, cost, y_axis)
    places = [place(trial, best_score(summary, trial)) for trial in marked]
    points = [place(trial, search_score(trial)) for trial in _complete(summary) if math.isfinite(cost(trial))]
    line = front(summary.trials, summary.objectives) if len(summary.objectives) == 2 else []
    corners = [place(trial, search_score(trial)) for trial in line]
    share = partial(_share_of_axes, x_axis["range"], y_axis["range"])
    anchors = list(map(share, places))
    bars = [end for trial in marked for end in _bar_of(place, trial, best_score(summary, trial))]
    obstacles = [*anchors, *map(share, points + bars), *along_steps(list(map(share, corners)))]
    moves = offsets(anchors, texts, obstacles)
    return [_label(anchor, text, move) for anchor, text, move in zip(places, texts, moves, strict=True)]


def _place(cost: Callable[[TrialRecord], float], y_axis: Figure, trial: TrialRecord, score: Score) -> tuple[float, float]:
    """Return cost and score as coordinates of an annotation, the score as its exponent on a log axis."""
    return cost(trial), math.log10(score.mean) if y_axis.get("type") == "log" else score.mean


def _bar_of(
    place: Callable[[TrialRecord, Score], tuple[float, float]], trial: TrialRecord, score: Score
) -> list[tuple[float, float]]:
    """Return points along a score's error bar."""
    shifts = (-1, -0.5, 0.5, 1)
    return [place(trial, replace(score, mean=score.mean + shift * score.deviation)) for shift in shifts]


def _share_of_axes(x_range: list[float], y_range: list[float], place: tuple[float, float]) -> tuple[float, float]:
    (left, right), (bottom, top) = x_range, y_range
    return (place[0] - left) / (right - left), (place[1] - bottom) / (top - bottom)


def _label(place: tuple[float, float], text: str, move: tuple[int, int]) -> Figure:
    return {
        "x": place[0],
        "y": place[1],
        "text": f"<b>{html.escape(text)}</b>",
        "ax": move[0],
        "ay": move[1],
        "xanchor": "center",
        "yanchor": "middle",
        "showarrow": True,
        "arrowhead": 0,
        "arrowwidth": 1,
        "arrowcolor": "--muted",
        "standoff": 9,
        "font": {"color": "--ink"},
    }


def _score_axis(summary: Summary, complete: list[TrialRecord], title: str | None = None) -> Figure:
    spaces = feature_spaces(summary)
    name = metric_name(summary)
    title = title or (f"{name} ({html.escape(spaces)} features)" if spaces else name)
    scores = [score_of(trial) for trial in complete] + _interval_ends(summary)
    if min(scores) > 0 and max(scores) / min(scores) >= LOG_FROM:
        return _axis(f"{title}, log scale", type="log", range=_padded([math.log10(score) for score in scores]))
    return _axis(title, range=_padded(scores))


def _interval_ends(summary: Summary) -> list[float]:
    scores = [score for finalist in summary.finalists if (score := final_score(summary, finalist.trial))]
    return [score.mean + sign * score.deviation for score in scores for sign in (-1, 1)]


def _padded(values: Iterable[float]) -> list[float]:
    """Return the range of ``values`` with a margin for symbols and labels."""
    low, high = min(values), max(values)
    room = 0.1 * (high - low) or 0.1 * abs(high) or 1.0
    return [low - room, high + room]


def _axis(title: str, **details) -> Figure:
    return {
        "title": {"text": title, "standoff": 12},
        "gridcolor": "--grid",
        "linecolor": "--grid",
        "zeroline": False,
        "automargin": True,
        **details,
    }


def _layout(**details) -> Figure:
    return {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13, "color": "--ink"},
        "margin": {"l": 56, "r": 16, "t": 12, "b": 48},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "hoverlabel": {"bgcolor": "--panel", "bordercolor": "--grid", "font": {"color": "--ink"}, "align": "left"},
        "hovermode": "closest",
        **details,
    }


def _complete(summary: Summary) -> list[TrialRecord]:
    return [trial for trial in summary.trials if trial.state == "complete"]


def _won(summary: Summary, trial: TrialRecord) -> bool:
    return trial.is_same(summary.winner)


def _who(trial: TrialRecord) -> str:
    return _short_name(trial) if trial.is_yardstick else f"trial {trial.number}"


def _short_name(trial: TrialRecord) -> str:
    return _SHORT_NAMES.get(trial.kind, trial.kind)


def _finite(trial: TrialRecord, objectives: Sequence[str]) -> bool:
    return all(value is not None and math.isfinite(value) for value in trial.scored.values(objectives))


def _number(trial: TrialRecord) -> int:
    return trial.number


def lengths_figure(summary: Summary) -> Figure | None:
    """Return the plot of scores of audited and confirmed configs against the length of training, one line for each config.

    None if nothing was trained longer. Crossing lines show that the ranking changes with the length.
    """
    lines: list[tuple[TrialRecord, list[AtLength]]] = []
    for trial in _at_several_lengths(summary):
        if not any(trial.is_same_config(other) for other, _ in lines):
            lines.append((trial, summary.lengths_of(trial)))
    traces = [_length_line(summary, trial, found) for trial, found in lines]
    if not traces:
        return None
    x_axis, y_axis = _axis("training steps an expert", type="log"), _axis(metric_name(summary), type="log")
    return {"data": traces, "layout": _layout(xaxis=x_axis, yaxis=y_axis)}


def _at_several_lengths(summary: Summary) -> list[TrialRecord]:
    confirmed = [summary.confirmed.winner.trial, summary.confirmed.hand_made.trial] if summary.confirmed else []
    return [each.trial for each in summary.audited] + confirmed


def _length_line(summary: Summary, trial: TrialRecord, found: list[AtLength]) -> dict[str, Any]:
    is_winner = trial.is_same(summary.winner)
    symbol, size, colour = _MARKS["winner" if is_winner else trial.kind if trial.kind in _MARKS else "candidate"]
    named = is_winner or trial.is_yardstick
    name = f"winner, trial {trial.number}" if is_winner else KIND_NAMES.get(trial.kind, trial.kind)
    name = f"trial {trial.number}" if name == "candidate" else name
    seeds = [f"{each.seeds} training seed{'s' * (each.seeds > 1)}, {each.samples:,} samples" for each in found]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": [each.steps for each in found],
        "y": [each.score for each in found],
        "text": [html.escape(f"{name}: {score_text(each.score)} ({said})") for each, said in zip(found, seeds, strict=True)],
        "hoverinfo": "text",
        "line": {"color": colour if named else "--muted", "width": 3 if named else 1},
        "marker": {"symbol": symbol, "size": size * 0.7 if named else 6, "color": colour if named else "--muted"},
    }
