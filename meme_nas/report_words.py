"""What the report says: numbers as a person writes them, and sentences that can be quoted. Plain text, never HTML."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from meme.architecture import OVERRIDES, ExpertConfig
from meme.config import even_intervals
from meme_nas.report_costs import at_no_more, compared, cost_of, costs_of, listed
from meme_nas.settings import MOST_AUDITED
from meme_nas.summary import Agreement, Confirmed, Summary
from meme_nas.trial_log import TrialRecord

HAND_MADE = "hand-made"
NONE = "\N{EN DASH}"
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
TRUSTED_TAU = 0.3  # lower end of an interval
LEAST_JUDGED = 6  # configurations; fewer are often ordered alike by chance, and then the interval has no width
SPREAD_NOTE = (
    "± is the standard deviation over sampling seeds; it does not cover the chance in training. "
    "“Not distinguishable” means that the intervals mean ± sd overlap."
)
SEARCH_SCORE_NOTE = (
    "These are the search's own scores, one sampling seed each: the best of many is flattered by chance "
    "until it is scored again with other seeds."
)


@dataclass(frozen=True)
class Score:
    """A trial's FID or KID as it is quoted: rescored over sampling seeds, or the search's own."""

    mean: float
    deviation: float
    seeds: int
    rescored: bool
    samples: int | None = None
    """Where they are others than the search's."""

    @property
    def has_spread(self) -> bool:
        return self.seeds > 1

    def overlaps(self, other: "Score") -> bool:
        return abs(self.mean - other.mean) <= self.deviation + other.deviation

    def __str__(self) -> str:
        if not self.has_spread:
            return score_text(self.mean)
        decimals = _decimals(self.deviation) if self.deviation > 0 else 2
        return f"{self.mean:.{decimals}f} ± {self.deviation:.{decimals}f}"


def score_of(trial: TrialRecord) -> float:
    """What the search scored a complete trial by."""
    score = trial.scored.quality
    return math.nan if score is None else score


def search_score(trial: TrialRecord) -> Score:
    """The score that the search gave a complete trial."""
    return Score(score_of(trial), 0.0, 1, rescored=False)


def final_score(summary: Summary, trial: TrialRecord) -> Score | None:
    """The score of ``trial`` as a finalist, if it is one."""
    for finalist in summary.finalists:
        if finalist.trial.is_same_config(trial) and finalist.scores and all(map(math.isfinite, finalist.scores)):
            return Score(finalist.mean, finalist.deviation, len(finalist.scores), rescored=True, samples=finalist.samples)
    return None


def best_score(summary: Summary, trial: TrialRecord) -> Score:
    """Of a complete trial: the finalist's score where there is one, else the search's."""
    return final_score(summary, trial) or search_score(trial)


def yardstick(summary: Summary, kind: str) -> TrialRecord | None:
    """The trial that ran the yardstick ``kind``."""
    return next((trial for trial in summary.trials if trial.kind == kind), None)


def yardsticks(summary: Summary) -> list[TrialRecord]:
    return [trial for trial in summary.trials if trial.is_yardstick]


def state_line(summary: Summary) -> str:
    """``50 of 50 trials: 48 complete, 1 failed, 1 refused``."""
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
    """What the search came to, the most important sentence first."""
    if summary.winner is None:
        return [_no_winner(summary)]
    if summary.confirmed:
        return [confirmed_words(summary.confirmed, summary.metric), *_searched_words(summary, summary.winner)]
    return _searched_words(summary, summary.winner)


def _searched_words(summary: Summary, winner: TrialRecord) -> list[str]:
    """Return what the scores at proxy length say of the winner against each yardstick."""
    if winner.kind == HAND_MADE:
        sentences = [_nothing_better(summary, winner)]
    else:
        sentences = [_against(summary, winner, HAND_MADE) or _unrivalled(summary, winner)]
    others = [kind for kind in _RIVALS if kind not in (HAND_MADE, winner.kind)]
    sentences += filter(None, (_against(summary, winner, kind) for kind in others))
    return _said_once(sentences, _basis(summary, winner, best_score(summary, winner)))


def notes(summary: Summary) -> list[str]:
    """How to read the verdict's numbers."""
    if summary.winner is None:
        return []
    score = best_score(summary, summary.winner)
    found = [SPREAD_NOTE if score.has_spread else "" if score.rescored else SEARCH_SCORE_NOTE]
    is_over = bool(summary.finalists)
    return found + ([NOT_CONFIRMED] if is_over and not summary.confirmed and summary.winner.kind != HAND_MADE else [])


def audit_verdict(found: Sequence[Agreement], seeds: int) -> str:
    """Whether the proxy's ranking deserves trust, in a sentence; ``seeds``: training seeds of the audit."""
    longer = f"longer training with {seeds} seeds" if seeds > 1 else "longer training, going on with the search's own seed,"
    if not found:
        return "Too few configurations were audited to say how far the proxy's ranking can be trusted."
    score = found[0]
    if score.count < LEAST_JUDGED:
        return (
            f"{score.count} audited configurations are too few to say whether the proxy's ranking deserves trust; "
            f"{longer} has Kendall's tau {score.tau:.2f} with it (--audit-size {MOST_AUDITED} takes more)."
        )
    said = f"Kendall's tau {score.tau:.2f}, 95% interval {score.low:.2f} to {score.high:.2f}, {score.count} configurations"
    if score.low > TRUSTED_TAU:
        return f"The proxy's ranking deserves trust: {longer} agrees with it ({said})."
    if score.low > 0:
        return f"The proxy's ranking deserves some trust: {longer} tends to agree with it ({said})."
    return f"The proxy's ranking is not shown to deserve trust: {longer} may as well disagree ({said})."


def audited_words(summary: Summary) -> list[str]:
    """The audited winner against the audited hand-made pattern, over training seeds."""
    by_number = {each.trial.number: each for each in summary.audited}
    rival = yardstick(summary, HAND_MADE)
    ours, theirs = (by_number.get(trial.number) if trial else None for trial in (summary.winner, rival))
    if ours is None or theirs is None or ours is theirs or len(ours.scores) < 2:
        return []  # one training seed, which chose the winner, says nothing of others
    scores = [Score(each.mean, each.deviation, len(each.scores), rescored=True) for each in (ours, theirs)]
    how = "is not distinguishable from" if scores[0].overlaps(scores[1]) else "is better than"
    how = "is worse than" if how == "is better than" and scores[0].mean > scores[1].mean else how
    subject = f"the winner (trial {ours.trial.number}) {how} the hand-made pattern"
    return [f"Trained longer with {len(ours.scores)} training seeds, {subject}: {scores[0]} against {scores[1]}."]


PATTERN_WON = "No longer training was made: the search found nothing better than the hand-made pattern."
NOT_CONFIRMED = (
    "Not confirmed: the best that the search found, by short trainings. They can rank configurations the other way round than "
    "full ones do."
)


def unconfirmed_words(best: TrialRecord) -> str:
    """Return what is said of a winner that was not trained longer."""
    return PATTERN_WON if best.kind == HAND_MADE else NOT_CONFIRMED


def confirmed_words(confirmed: Confirmed, metric: str) -> str:
    """Return what longer trainings said of the winner, and so which config is recommended, in two sentences."""
    difference, seeds = confirmed.difference, len(confirmed.winner.scores)
    length = f"{confirmed.steps:,} steps an expert"
    length += f" after {confirmed.trunk_steps:,} of the trunk" if confirmed.trunk_steps else ""
    change = f"{_percent(difference.mean)} {metric.upper()}"
    interval = f"95% interval {_percent(difference.low)} to {_percent(difference.high)}"
    trained = f"Trained for {length} with {seeds} seeds that chose neither, the winner (trial {confirmed.winner.trial.number})"
    against = f"{change} than the hand-made pattern ({interval}"
    if not confirmed.winner_is_better:
        return (
            f"{trained} is not better: it has {against}). The recommended config, winner.yaml, is therefore the hand-made "
            "pattern; best-of-search.yaml is the best that the search found."
        )
    if difference.excludes_zero:
        return f"{trained} is better: it has {against}). It is the recommended config, winner.yaml."
    return f"{trained} has {against}), which may be chance. It is the recommended config, winner.yaml."


def _percent(log_ratio: float) -> str:
    """Return a difference of logarithms as ``4.1% lower``, ``12% higher``."""
    percent = 100 * math.expm1(log_ratio)
    if not math.isfinite(percent):
        return "any amount higher"
    return f"{abs(percent):.{0 if abs(percent) >= 9.95 else 1}f}% {'lower' if percent < 0 else 'higher'}"


def metric_name(summary: Summary) -> str:
    """``FID`` or ``KID``."""
    return summary.metric.upper()


def feature_spaces(summary: Summary) -> str:
    """Name of the space the scores are measured in, ``classifier(digits)``; empty while nothing is scored."""
    names = {trial.scored.features: None for trial in summary.trials if trial.state == "complete"}
    return " / ".join(name for name in names if name)


def quantity(value: float | None) -> str:
    """``4.03M``; a dash for None."""
    if value is None or not math.isfinite(value):
        return NONE
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * limit:
            return f"{_three_digits(value / limit)}{letter}"
    return _three_digits(value)


def score_text(value: float | None) -> str:
    """Three significant digits; a dash for None."""
    return NONE if value is None or not math.isfinite(value) else _three_digits(value)


def costs_text(trial: TrialRecord, kinds: Sequence[str]) -> str:
    """``4.03M MACs and 660k parameters`` of a complete trial; latency is that of an image."""
    texts = {"macs": "{} MACs", "params": "{} parameters", "latency_ms": "{} ms an image"}
    return listed([texts[kind].format(quantity(cost_of(trial, kind))) for kind in kinds])


def latency_text(milliseconds: float | None) -> str:
    return NONE if milliseconds is None else f"{score_text(milliseconds)} ms"


def duration(seconds: float | None) -> str:
    """``41 s``, ``3.2 min``, ``1.5 h``, ``4.2 days``; a dash for None."""
    if seconds is None or not math.isfinite(seconds):
        return NONE
    if seconds < 100:
        return f"{seconds:.{1 if seconds < 10 else 0}f} s"
    if seconds < 6000:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 100 * 3600 else f"{seconds / 86400:,.1f} days"


def splits_text(trial: TrialRecord) -> str:
    """``8·16@0.8  16·24@0.4``: C_l at every level, finest first, at p_n; one group an expert.

    In brackets, what else makes an expert: its interval where intervals are uneven, and how it differs from the paper's block.
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
    """The winner against one yardstick: rescored where both are, else both as searched; None without a score."""
    rival = yardstick(summary, kind)
    if rival is None or rival.state != "complete":
        return None
    again, rival_again = final_score(summary, winner), final_score(summary, rival)
    ours, theirs = (again, rival_again) if again and rival_again else (search_score(winner), search_score(rival))
    cost, name, subject = compared(winner, rival, summary.objectives), _RIVALS[kind], _subject(winner)
    numbers, basis = f"{metric_name(summary)} {ours} against {theirs}", _basis(summary, winner, ours)
    if ours.has_spread and ours.overlaps(theirs):
        return f"At {cost}, {subject} is not distinguishable from {name}: {numbers} ({basis})."
    if ours.has_spread and ours.mean > theirs.mean:
        return f"At {cost}, {subject} is worse than {name}: {numbers} ({basis})."
    return f"At {_than(cost)} {name}, {subject} has {numbers} ({basis})."


def _subject(winner: TrialRecord) -> str:
    return f"the {'hand-made pattern' if winner.kind == HAND_MADE else 'winner'} (trial {winner.number})"


def _basis(summary: Summary, winner: TrialRecord, score: Score) -> str:
    """What a score is worth nothing without: feature space, number of samples, seeds."""
    seeds = f"{score.seeds} sampling seed{'s' * (score.seeds > 1)}" + ("" if score.rescored else ", as searched")
    seeds += f", at proxy length ({winner.config.training.steps:,} steps)" if summary.confirmed else ""
    features = winner.scored.features or "unnamed"
    return f"{features} features, {score.samples or winner.config.evaluation.samples:,} samples, {seeds}"


def _said_once(sentences: list[str], basis: str) -> list[str]:
    """``sentences`` with the basis they share in the first one only."""
    return [sentences[0], *(sentence.replace(f" ({basis}).", ".") for sentence in sentences[1:])]


def _than(cost: str) -> str:
    return f"{cost} {'than' if '%' in cost else 'as'}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _decimals(value: float) -> int:
    """Decimals that show the first digit of ``value`` that counts, and the second after a 1."""
    exponent = math.floor(math.log10(value))
    return min(8, max(0, -exponent + (value / 10**exponent < 1.95)))


def _three_digits(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-6:
        return f"{value:.2e}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(float(f'{value:.2e}')))))}f}"
