"""Text of the report: numbers in readable form, and sentences that can be quoted. Plain text, never HTML."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from meme.config.architecture import OVERRIDES, ExpertConfig
from meme.config.schema import even_intervals
from meme_nas.record.effort import Effort
from meme_nas.record.trial_log import TrialRecord
from meme_nas.report.claims import (
    NOT_CONFIRMED,
    SPREAD_NOTE,
    WEIGHTS_NOTE,
    confirmed_words,
    dominant_words,
    judged_words,
    weights_difference,
)
from meme_nas.report.costs import at_no_more, compared, cost_of, costs_of, listed
from meme_nas.report.summary import Summary

HAND_MADE = "hand-made"
NONE = "\N{EN DASH}"
UNRECORDED_DEVICE = "one that was not recorded"
KIND_NAMES = {
    "candidate": "candidate",
    HAND_MADE: "hand-made pattern",
    "multi-expert": "multi-expert (one architecture for all)",
    "single-model": "single model (trained as long as all experts)",
}
_RIVALS = {
    HAND_MADE: "the hand-made pattern",
    "multi-expert": "one architecture for all experts",
    "single-model": "a single model trained as long as all experts together",
}
SEARCH_SCORE_NOTE = (
    "These are the search's own scores, one sampling seed each: the best of many is flattered by chance "
    "until it is scored again with other seeds."
)


@dataclass(frozen=True)
class Score:
    """FID or KID of a trial as the report quotes it: rescored over sampling seeds, or the search's own."""

    mean: float
    deviation: float
    seeds: int
    rescored: bool
    samples: int | None = None
    """Number of images, if it differs from the search's; else None."""
    values: tuple[float, ...] = ()
    """Score with each sampling seed if the trial was scored again; else empty."""

    @property
    def has_spread(self) -> bool:
        return self.seeds > 1

    def __str__(self) -> str:
        if not self.has_spread:
            return score_text(self.mean)
        decimals = _decimals(self.deviation) if self.deviation > 0 else 2
        return f"{self.mean:.{decimals}f} ± {self.deviation:.{decimals}f}"


def score_of(trial: TrialRecord) -> float:
    """Return the first objective of a complete trial in the search; NaN if it has none."""
    score = trial.scored.quality
    return math.nan if score is None else score


def search_score(trial: TrialRecord) -> Score:
    """Return the search's own score of a complete trial."""
    return Score(score_of(trial), 0.0, 1, rescored=False)


def final_score(summary: Summary, trial: TrialRecord) -> Score | None:
    """Return the score of ``trial`` as a finalist; None if it is none or a score is not finite."""
    for finalist in summary.finalists:
        if finalist.trial.is_same_config(trial) and finalist.scores and all(map(math.isfinite, finalist.scores)):
            scores = finalist.scores
            return Score(finalist.mean, finalist.deviation, len(scores), rescored=True, samples=finalist.samples, values=scores)
    return None


def best_score(summary: Summary, trial: TrialRecord) -> Score:
    """Return the score of a complete trial as a finalist if it is one, else the search's score."""
    return final_score(summary, trial) or search_score(trial)


def yardstick(summary: Summary, kind: str) -> TrialRecord | None:
    """Return the trial of the yardstick ``kind``; None if there is none."""
    return next((trial for trial in summary.trials if trial.kind == kind), None)


def yardsticks(summary: Summary) -> list[TrialRecord]:
    return [trial for trial in summary.trials if trial.is_yardstick]


def state_line(summary: Summary) -> str:
    """Return a line such as ``50 of 50 trials: 48 complete, 1 failed, 1 refused``."""
    states = Counter(trial.state for trial in summary.trials)
    total, running = len(summary.trials), states["running"]
    if not total:
        return "No trial has started yet"
    counts = [f"{states[state]} {state}" for state in ("complete", "failed", "refused") if states[state]]
    if running:
        counts.append(f"{running} running or interrupted")
    so_far = " started so far" if running else ""
    return f"{total - running} of {total} trials{so_far}: {', '.join(counts)}"


def verdict(summary: Summary) -> list[str]:
    """Return the sentences on the result of the search, the most important first."""
    if summary.winner is None:
        return [_no_winner(summary)]
    if summary.confirmed:
        return [confirmed_words(summary.confirmed, summary.metric), *_searched_words(summary, summary.winner)]
    if summary.judged:
        return [judged_words(summary.judged, summary.metric), *_searched_words(summary, summary.winner)]
    return _searched_words(summary, summary.winner)


def _searched_words(summary: Summary, winner: TrialRecord) -> list[str]:
    """Return the sentences that compare the winner with each yardstick by scores at proxy length."""
    if winner.kind == HAND_MADE:
        sentences = [_nothing_better(summary, winner)]
    else:
        sentences = [_against(summary, winner, HAND_MADE) or _unrivalled(summary, winner)]
    others = [kind for kind in _RIVALS if kind not in (HAND_MADE, winner.kind)]
    sentences += filter(None, (_against(summary, winner, kind) for kind in others))
    return _said_once(sentences, _basis(summary, winner, best_score(summary, winner)))


def notes(summary: Summary) -> list[str]:
    """Return the notes that explain the verdict's numbers."""
    devices = [said] if (said := _latency_devices(summary)) else []
    if summary.winner is None:
        return devices
    score = best_score(summary, summary.winner)
    found = [WEIGHTS_NOTE, SPREAD_NOTE if score.has_spread else "" if score.rescored else SEARCH_SCORE_NOTE]
    if summary.finalists and not (summary.confirmed or summary.judged) and summary.winner.kind != HAND_MADE:
        found.append(NOT_CONFIRMED)
    return found + ([dominant_words(summary.dominant, summary.metric)] if summary.dominant else []) + devices


def _latency_devices(summary: Summary) -> str:
    """Return a sentence on latencies of several kinds of device; empty if there is one kind, or latency is not minimised."""
    outcomes = [trial.outcome for trial in summary.trials if trial.outcome and trial.outcome.latency_ms is not None]
    kinds = sorted({outcome.latency_device or UNRECORDED_DEVICE for outcome in outcomes})
    if "latency_ms" not in summary.objectives or len(kinds) < 2:
        return ""
    return f"Latencies were measured on several kinds of device ({'; '.join(kinds)}), and only those of one kind can be compared."


def metric_name(summary: Summary) -> str:
    """Return the name of the first objective, ``FID`` or ``KID``."""
    return summary.metric.upper()


def feature_spaces(summary: Summary) -> str:
    """Return the feature space of the scores, such as ``classifier(digits)``; empty while nothing is scored."""
    names = {trial.scored.features: None for trial in summary.trials if trial.state == "complete"}
    return " / ".join(name for name in names if name)


def quantity(value: float | None) -> str:
    """Return a number as text such as ``4.03M``; a dash for None."""
    if value is None or not math.isfinite(value):
        return NONE
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * limit:
            return f"{_three_digits(value / limit)}{letter}"
    return _three_digits(value)


def score_text(value: float | None) -> str:
    """Return a score with three significant digits; a dash for None."""
    return NONE if value is None or not math.isfinite(value) else _three_digits(value)


def costs_text(trial: TrialRecord, kinds: Sequence[str]) -> str:
    """Return the costs of a complete trial, such as ``4.03M MACs and 660k parameters``. Latency is per image."""
    texts = {"macs": "{} MACs", "params": "{} parameters", "latency_ms": "{} ms an image"}
    return listed([texts[kind].format(quantity(cost_of(trial, kind))) for kind in kinds])


def effort_text(effort: Effort) -> str:
    """Return the effort of a search in one line."""
    share = 100 * effort.scoring / max(1, effort.passes)
    return (
        f"{effort.made:.0f} trainings of an expert of {effort.charged:.0f} that the budget counts; {quantity(effort.training)} "
        f"passes of an image in training, a step's gradient as two, and {quantity(effort.scoring)} in scoring ({share:.0f} %)"
    )


def latency_text(milliseconds: float | None) -> str:
    return NONE if milliseconds is None else f"{score_text(milliseconds)} ms"


def duration(seconds: float | None) -> str:
    """Return a duration as text such as ``41 s``, ``3.2 min``, ``1.5 h``, ``4.2 days``; a dash for None."""
    if seconds is None or not math.isfinite(seconds):
        return NONE
    if seconds < 100:
        return f"{seconds:.{1 if seconds < 10 else 0}f} s"
    if seconds < 6000:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 100 * 3600 else f"{seconds / 86400:,.1f} days"


def splits_text(trial: TrialRecord) -> str:
    """Return the splits of all experts, such as ``8·16@0.8  16·24@0.4``: for each expert C_l of all levels, finest first, @ p_n.

    Brackets hold an expert's interval if intervals are uneven, and its differences from the paper's block.
    """
    config = trial.config
    if not config.network.splits_channels:
        return "no splits (LDM U-Net)"
    even = [expert.interval for expert in config.experts] == list(even_intervals(len(config.experts), config.diffusion.timesteps))
    return "  ".join(
        f"{'·'.join(map(str, expert.low_channels))}@{expert.p:g}{_beyond_the_split(expert, even)}" for expert in config.experts
    )


def _beyond_the_split(expert: ExpertConfig, even: bool) -> str:
    details = [] if even else [f"t {expert.interval[0]}-{expert.interval[1] - 1}"]
    for name, value in expert.model_dump(include=set(OVERRIDES)).items():
        details.append(f"{name} {'·'.join(map(str, value)) if isinstance(value, tuple) else value}")
    return f" ({', '.join(details)})" if details else ""


def _no_winner(summary: Summary) -> str:
    if any(trial.state == "complete" for trial in summary.trials):
        return "Only yardsticks outside the searched space have a score, so there is no winner yet."
    return "No trial has a score yet, so there is no winner."


def _nothing_better(summary: Summary, winner: TrialRecord) -> str:
    candidates = sum(not trial.is_yardstick and trial.state == "complete" for trial in summary.trials)
    score = best_score(summary, winner)
    has = f"{_subject(winner)} has {metric_name(summary)} {score} ({_basis(summary, winner, score)})."
    if not candidates:
        return f"No candidate has a score yet; {has}"
    nobody = "the one scored candidate has not" if candidates == 1 else f"none of {candidates} scored candidates has"
    lower = f"a lower {metric_name(summary)}{at_no_more(summary.objectives)}"
    return f"Nothing beat the hand-made pattern: {nobody} {lower}. {_capital(has)}"


def _unrivalled(summary: Summary, winner: TrialRecord) -> str:
    score = best_score(summary, winner)
    return (
        f"{_capital(_subject(winner))} has {metric_name(summary)} {score} at {costs_text(winner, costs_of(summary.objectives))} "
        f"({_basis(summary, winner, score)}); the hand-made pattern has no score to compare it with."
    )


def _against(summary: Summary, winner: TrialRecord, kind: str) -> str | None:
    """Return the sentence that compares the winner's weights with one yardstick's; None if the yardstick has no score.

    The scores are the finalists' if both have one, else the search's. The winner was chosen by these weights, so the sentence
    claims nothing about architectures.
    """
    rival = yardstick(summary, kind)
    if rival is None or rival.state != "complete":
        return None
    again, rival_again = final_score(summary, winner), final_score(summary, rival)
    ours, theirs = (again, rival_again) if again and rival_again else (search_score(winner), search_score(rival))
    cost, basis = _than(compared(winner, rival, summary.objectives)), _basis(summary, winner, ours)
    numbers = f"{metric_name(summary)} {score_text(ours.mean)} against {score_text(theirs.mean)}"
    difference = weights_difference(ours.values, theirs.values)
    return f"For these weights, at {cost} {_RIVALS[kind]}, {_subject(winner)} has {numbers}{difference} ({basis})."


def _subject(winner: TrialRecord) -> str:
    return f"the {'hand-made pattern' if winner.kind == HAND_MADE else 'winner'} (trial {winner.number})"


def _basis(summary: Summary, winner: TrialRecord, score: Score) -> str:
    """Return the conditions of a score, without which it cannot be compared: feature space, number of samples, seeds."""
    seeds = f"{score.seeds} sampling seed{'s' * (score.seeds > 1)}" + ("" if score.rescored else ", as searched")
    seeds += f", at proxy length ({winner.config.training.steps:,} steps)" if summary.confirmed else ""
    features = winner.scored.features or "unnamed"
    return f"{features} features, {score.samples or winner.config.evaluation.samples:,} samples, {seeds}"


def _said_once(sentences: list[str], basis: str) -> list[str]:
    """Return ``sentences`` with their common ``basis`` in the first one only."""
    return [sentences[0], *(sentence.replace(f" ({basis}).", ".") for sentence in sentences[1:])]


def _than(cost: str) -> str:
    return f"{cost} {'than' if '%' in cost else 'as'}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _decimals(value: float) -> int:
    """Return the number of decimals that shows one significant digit of ``value``, or two if the first is a 1."""
    exponent = math.floor(math.log10(value))
    return min(8, max(0, -exponent + (value / 10**exponent < 1.95)))


def _three_digits(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-6:
        return f"{value:.2e}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(float(f'{value:.2e}')))))}f}"
