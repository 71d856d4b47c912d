"""Sentences that compare configurations. Each states its test, or what it leaves open. Plain text, never HTML.

Architectures are compared over training seeds that chose neither side, by a paired interval. A result of one training is stated
for its weights only and claims nothing about architectures.
"""

import math
from collections.abc import Sequence

from meme.support.intervals import Interval, log_ratios, paired
from meme_nas.record.trial_log import TrialRecord
from meme_nas.report.spread import Dominant
from meme_nas.report.summary import Summary
from meme_nas.rescoring.findings import Agreement, Confirmed, Judged, Regret
from meme_nas.settings import MOST_AUDITED

LEAST_JUDGED = 6  # configurations; fewer often agree in order by chance, and then the interval has no width
TOLERATED = 0.05  # of log FID; the deviation between training seeds on digits, results/README.md
PATTERN_WON = "No longer training was made: the search found nothing better than the hand-made pattern."
NOT_CONFIRMED = (
    "Not confirmed: the best that the search found, by short trainings. They can rank configurations the other way round than "
    "full ones do."
)
WEIGHTS_NOTE = (
    "“For these weights” means the trainings by which the search chose the winner. Another training seed may order the "
    "architectures the other way round: only trainings with seeds that chose neither tell how they compare."
)
SPREAD_NOTE = (
    "± is the standard deviation over sampling seeds, for these weights. Differences are paired, since both sides share the "
    "noise of each seed, so whether two such ranges overlap says nothing of them."
)


def unconfirmed_words(best: TrialRecord) -> str:
    """Return the sentence on a winner that was not trained longer."""
    return PATTERN_WON if best.kind == "hand-made" else NOT_CONFIRMED


def confirmed_words(confirmed: Confirmed, metric: str) -> str:
    """Return the result of the confirmation and the recommended config, in two sentences."""
    difference, seeds = confirmed.difference, len(confirmed.winner.scores)
    length = f"{confirmed.steps:,} steps an expert"
    length += f" after {confirmed.trunk_steps:,} of the trunk" if confirmed.trunk_steps else ""
    trained = f"Trained for {length} with {seeds} seeds that chose neither, the winner (trial {confirmed.winner.trial.number})"
    said = f"{trained} {_compared(difference, metric)}"
    if confirmed.winner_is_better:
        return f"{said} It is the recommended config, winner.yaml."
    return (
        f"{said} The recommended config, winner.yaml, is therefore the hand-made pattern; best-of-search.yaml is the best that "
        "the search found."
    )


def judged_words(judged: Judged, metric: str) -> str:
    """Return the sentence on the audit's winner, by the audit's seeds that did not choose it."""
    seeds = f"{judged.difference.count} training seeds that did not choose it"
    return f"In the audit, with {seeds}, the winner (trial {judged.winner.number}) {_compared(judged.difference, metric)}"


def _compared(difference: Interval, metric: str) -> str:
    """Return the verdict on a difference of logarithms, winner less hand-made pattern, with its interval."""
    found = f"it has {_percent(difference.mean)} {metric.upper()} than the hand-made pattern ({interval_text(difference)}"
    if difference.high < 0:
        return f"is better: {found})."
    if difference.low > 0:
        return f"is worse: {found})."
    return f"is not shown to be better: {found}), which may be chance."


def weights_difference(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Return the difference of two ensembles of fixed weights, paired over sampling seeds; empty if there is no interval."""
    ratios = log_ratios(ours, theirs) if len(ours) == len(theirs) > 1 else None
    if ratios is None:
        return ""
    difference = paired(ratios)
    found = f"{_percent(difference.mean)}, {interval_text(difference)}, paired over sampling seeds"
    return f": {found}" if difference.excludes_zero else f", which shows no difference: {found}"


def audit_words(summary: Summary) -> list[str]:
    """Return the audit's sentences on the search's choice, if there is one, and on its ranking."""
    seeds = len(summary.audited[0].scores)
    words = [regret_words(summary.regret, summary.metric)] if summary.regret else []
    return [*words, agreement_words(summary.agreements, seeds)]


def regret_words(regret: Regret, metric: str) -> str:
    """Return the sentence that compares the search's own choice with the best audited configuration."""
    behind, picked = regret.behind, f"trial {regret.picked.number}"
    if behind.count < 2:
        return _regret_of_weights(regret, metric)
    best = f"the best of the {regret.count} audited configurations that cost no more than the hand-made pattern"
    bounds = " to ".join(f"{100 * math.expm1(bound):.1f}%" for bound in (behind.low, behind.high))
    tested = (
        f"its {metric.upper()} is {100 * math.expm1(behind.mean):.1f}% above the lowest there, and {bounds} above the truly best "
        f"(95% interval, {behind.count} training seeds that the search has not used)"
    )
    if behind.low > 0:
        return f"What the search alone would have picked ({picked}) is not {best}: {tested}."
    if behind.high <= TOLERATED:
        return f"The search's own choice deserves trust: {picked} is as good as {best}, or nearly; {tested}."
    return f"Whether what the search alone would have picked ({picked}) is {best} is not shown: {tested}."


def _regret_of_weights(regret: Regret, metric: str) -> str:
    whose = "one seed that the search has not used" if regret.is_fresh else "the search's own seed"
    head = (
        f"For these weights, trained longer with {whose}, what the search alone would have picked (trial {regret.picked.number})"
    )
    best = f"the best of the {regret.count} audited configurations that cost no more than the hand-made pattern"
    tail = "One training seed says nothing of the architectures (--audit-seeds 3 does)."
    if regret.best.number == regret.picked.number:
        return f"{head} is {best}, too. {tail}"
    higher = f"{100 * math.expm1(regret.behind.mean):.1f}% higher {metric.upper()}"
    return f"{head} has {higher} than {best} (trial {regret.best.number}), which luck flatters. {tail}"


def agreement_words(found: Sequence[Agreement], seeds: int) -> str:
    """Return the sentence on the rank agreement of search and longer training. ``seeds`` is the audit's number of seeds."""
    if not found:
        return "Too few configurations were audited to say how far the proxy's ranking can be trusted."
    score, best = found[0], found[0].among_best
    longer = "Longer training, going on with the search's own seed,"
    if seeds > 1:
        longer = f"Longer training with {seeds - 1} seed{'s' * (seeds > 2)} that the search has not used"
    said = f"{longer} ranks the audited with Kendall's tau {_tau(score)} with the proxy"
    if score.count < LEAST_JUDGED:
        return f"{said}: too few to say whether the ranking deserves trust (--audit-size {MOST_AUDITED} takes more)."
    if best is None:
        return f"{said}{'' if score.low > 0 else ', which is not shown to be more than chance'}."
    said += f", and {_tau(best)} among the best, from which the search chooses"
    if best.count >= LEAST_JUDGED and best.low > 0:
        return f"{said}: the proxy tells the best apart."
    if score.low > 0:
        return f"{said}: the proxy tells poor from good; that it tells the best apart is not shown."
    return f"{said}: that the proxy's ranking is more than chance is not shown."


def _tau(found: Agreement) -> str:
    count = f"{found.count} configurations"
    if found.count < LEAST_JUDGED:
        return f"{found.tau:.2f} ({count}, too few for an interval)"
    return f"{found.tau:.2f} (95% interval {found.low:.2f} to {found.high:.2f}, {count})"


def dominant_words(found: Dominant, metric: str) -> str:
    """Return the sentences on the kind of choice that explains most of the spread of scores."""
    others = " and ".join(filter(None, (", ".join(found.others[:-1]), found.others[-1])))
    name, rest = metric.upper(), f"{100 * max(0.0, found.share_of_others):.0f}%"
    said = (
        f"In this search {found.kind} alone explains {100 * found.share:.0f}% of the spread of {name} over {found.count} "
        f"configurations, {others} {rest} (adjusted R² of log {name}). The ranking is therefore one of {found.kind}, and says "
        f"little of {others}."
    )
    if found.kind != "p":
        return said
    return (
        f"{said} Which p is best depends on the length of the training, so after a full training another may be better "
        "(--p-share chooses p at a length that tells)."
    )


def interval_text(difference: Interval) -> str:
    """Return the interval of a difference of logarithms as text, in percent."""
    return f"95% interval {_percent(difference.low)} to {_percent(difference.high)}"


def _percent(log_ratio: float) -> str:
    """Return a difference of logarithms as text such as ``4.1% lower`` or ``12% higher``."""
    percent = 100 * math.expm1(min(log_ratio, 700.0))
    if percent > 1e6:
        return "any amount higher"
    return f"{abs(percent):.{0 if abs(percent) >= 9.95 else 1}f}% {'lower' if percent < 0 else 'higher'}"
