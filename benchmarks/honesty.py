"""Share of true claims in reports of simulated searches, whose truth is known.

    python benchmarks/honesty.py [--quick] [--repeats 10000] [--searches 3] [--seed 0]

Searches and audits are simulated. The intervals and the words are the product's own. The logarithm of a simulated FID is the sum
of the configuration's true value, the luck of the training seed (one part common to all configurations, one part of each), and
noise of the sampling seed. The deviations of luck are those of digits in ``results/README.md``. The deviation of noise is larger.
"1 sd" is the deviation of one configuration's luck. Each repetition searches, audits and confirms eight configurations, of which
the first is the hand-made pattern:

- ``equal``: all are equally good, so every claim of a difference is false.
- ``better``: the second is better than all others by 0.5, 1 or 2 sd.
- In every second repetition, eight further configurations crash in the search, and one training in ten of the audit fails and is
  run again, once.

``false_alarm`` is the share of confirmations of equal configurations whose words claim a difference. ``coverage`` is the share of
confirmations, over all truths, whose 95 % interval contains the true difference. ``power_*sd`` is the share of confirmations of a
better winner whose words say so. All have the default ``--confirm-seeds``; suffixes name other numbers. ``audit_*`` are the same
shares for audits with five seeds and no confirmation, ``weights_*`` for sentences about fixed weights, ``regret_*`` for the
search's choice. The regret interval is simultaneous for all comparisons, so its coverage may be higher. ``best_told_apart`` is
the share of audits of equal configurations whose words say that the proxy tells the best apart.

Two more tests follow. ``crashing_share`` is the share of trainings, after the first 12, in the two fifths of an expert's space
that always crash. ``front_point_found`` is the share of 20 choices of 8 cascades for the front that include a point of the front
that no weighted sum finds. The last line is one JSON object.
"""

import argparse
import json
import math
import time
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from meme.config.presets import preset
from meme.config.schema import Config
from meme.support.intervals import Interval, log_ratios, paired
from meme_nas.record.ranking import cost_limits, winner
from meme_nas.record.study import Study
from meme_nas.record.tasks import Outcome, Task, attempt
from meme_nas.record.trial_log import TrialRecord
from meme_nas.report.claims import agreement_words, confirmed_words, judged_words, regret_words, weights_difference
from meme_nas.rescoring.audit import agreements, audited_winner, choosers_of, judged, pick, regret
from meme_nas.rescoring.confirmation import compared, seed_pairs
from meme_nas.rescoring.finalists import FRESH_SEEDS
from meme_nas.rescoring.findings import Confirmed, Rescored
from meme_nas.settings import SearchSettings
from meme_nas.strategies.rungs import factorised
from meme_nas.surrogate.choose_cascades import FRONT_TURN, Assembly
from meme_nas.surrogate.kernel import Candidates
from meme_nas.surrogate.model import Surrogate

LUCK, COMMON, NOISE = 0.05, 0.04, 0.02  # deviations of log FID: one config's training, a seed's common part, sampling
CONFIGS, AUDIT_SEEDS = 8, 5
BETTER = (0.5, 1.0, 2.0)  # in units of LUCK
MORE_SEEDS = (2, 5, 10)
LOST = 0.1  # share of the audit's trainings that fail, in repetitions with crashes
LEARNED = 12  # candidates after which a search should have learned the failing region
OBJECTIVES = ("fid", "macs")
BASE = preset("digits-meme")


@dataclass
class Tally:
    """Counts of true and false claims, by name."""

    found: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))

    def add(self, name: str, value: bool) -> None:
        self.found[name].append(value)

    def shares(self) -> dict[str, float]:
        return {name: round(float(np.mean(values)), 4) for name, values in sorted(self.found.items())}


def claims(words: str) -> int:
    """Return -1 if the words say that the winner is better, 1 if they say that it is worse, else 0."""
    return -1 if " is better: " in words else 1 if " is worse: " in words else 0


def holds(interval: Interval, truth: float) -> bool:
    """Return True if the interval contains the truth, up to rounding."""
    return interval.low - 1e-9 <= truth <= interval.high + 1e-9


def scored(truth: np.ndarray, seeds: int, source: np.random.Generator, samplings: int = 1) -> np.ndarray:
    """Return simulated FIDs (configs, seeds * samplings) of trainings with new seeds. Sampling seeds vary slowest."""
    trained = truth[:, None] + source.normal(0, LUCK, (len(truth), seeds)) + source.normal(0, COMMON, seeds)
    noise = source.normal(0, NOISE, (len(truth), samplings, seeds)) + source.normal(0, NOISE, (samplings, seeds))
    return np.exp((trained[:, None] + noise).reshape(len(truth), -1))


def trial(number: int, fid: float | None) -> TrialRecord:
    """Return a trial of the searched space, which has failed if ``fid`` is None."""
    kind = "candidate" if number else "hand-made"
    outcome = None if fid is None else Outcome(number, fid=fid, fids=(fid,), macs=1.0)
    config = BASE.with_(training={"steps": 10 + number})
    return TrialRecord(number, "failed" if fid is None else "complete", kind, config, {"expert1.p": 0.5}, "", outcome)


TRIALS = [trial(number, None) for number in range(2 * CONFIGS)]


def searched(truth: np.ndarray, crashing: bool, source: np.random.Generator) -> list[TrialRecord]:
    """Return the record of a search. With ``crashing`` it has an equal number of further trials that failed."""
    found = []
    for base, fid in zip(TRIALS, scored(truth, 1, source)[:, 0], strict=False):
        outcome = Outcome(base.number, fid=float(fid), fids=(float(fid),), macs=1.0)
        found.append(TrialRecord(base.number, "complete", base.kind, base.config, base.choices, "", outcome))
    return found + (TRIALS[CONFIGS:] if crashing else [])


def audited(chosen: list[TrialRecord], truth: np.ndarray, crashing: bool, source: np.random.Generator) -> list[Rescored]:
    """Return the audit's scores. A config with a lost training is left out, as in ``Rescoring.results``."""
    scores = scored(truth, AUDIT_SEEDS, source)
    lost = source.random(scores.shape) < (LOST**2 if crashing else 0)  # a training is lost if it fails twice
    return [Rescored(each, tuple(map(float, scores[each.number]))) for each in chosen if not lost[each.number].any()]


def confirm(tally: Tally, best: TrialRecord, truth: np.ndarray, seeds: int, suffix: str, source: np.random.Generator) -> None:
    """Confirm ``best`` beside the hand-made pattern with new seeds, and count the claims."""
    pairs = seed_pairs(range(seeds))
    samplings = len(pairs) // seeds
    ours, theirs = scored(truth, seeds, source, samplings)[[best.number, 0]]
    found = compared(Rescored(TRIALS[0], tuple(theirs.tolist())), Rescored(best, tuple(ours.tolist())), pairs)
    assert found is not None, "simulated FIDs are above 0"
    hand_made, ours_by_seed, difference = found
    said = claims(confirmed_words(Confirmed(ours_by_seed, hand_made, difference, 100, 0), "fid"))
    count(tally, said, difference, float(truth[best.number] - truth[0]), "", suffix)


def count(tally: Tally, said: int, difference: Interval, true: float, prefix: str, suffix: str = "") -> None:
    tally.add(f"{prefix}coverage{suffix}", holds(difference, true))
    if true == 0:
        tally.add(f"{prefix}false_alarm{suffix}", said != 0)
    else:
        tally.add(f"{prefix}power_{-true / LUCK:g}sd{suffix}".replace("0.5", "half_"), said < 0)
        tally.add(f"{prefix}wrong_way{suffix}", said > 0)


def repeat(tally: Tally, truth: np.ndarray, crashing: bool, source: np.random.Generator, with_tau: bool) -> None:
    """Simulate one search, its audit and its confirmation."""
    settings = SETTINGS
    trials = searched(truth, crashing, source)
    limits, picked = cost_limits(trials, OBJECTIVES), winner(trials, OBJECTIVES)
    assert picked is not None
    results = audited(pick(trials, settings), truth, crashing, source)
    best = audited_winner(results, OBJECTIVES, limits, choosers_of(settings)) or picked
    found = judged(results, best, choosers_of(settings))
    if found:
        said = claims(judged_words(found, "fid"))
        count(tally, said, found.difference, float(truth[best.number] - truth[0]), "audit_")
    lost = regret(results, picked, OBJECTIVES, limits)
    if lost:
        behind = float(truth[picked.number] - min(truth[each.trial.number] for each in results))
        tally.add("regret_coverage", holds(lost.behind, behind))
        if behind == 0:
            tally.add("regret_false_alarm", ") is not the best of the " in regret_words(lost, "fid"))
    if best.number:
        confirm(tally, best, truth, SETTINGS.confirm_seeds, "", source)
        for seeds in MORE_SEEDS:
            confirm(tally, best, truth, seeds, f"_{seeds}_seeds", source)
    weights(tally, source)
    if with_tau and not truth.any():
        words = agreement_words(agreements(results, {"score": [each.trial.scored.fid or 0.0 for each in results]}), AUDIT_SEEDS)
        tally.add("best_told_apart", "the proxy tells the best apart" in words)


def weights(tally: Tally, source: np.random.Generator) -> None:
    """Score two ensembles of equal weights with fresh sampling seeds, and count the claims."""
    common = source.normal(0, NOISE, len(FRESH_SEEDS))
    ours, theirs = (np.exp(common + source.normal(0, NOISE, len(FRESH_SEEDS))).tolist() for _ in range(2))
    words, ratios = weights_difference(ours, theirs), log_ratios(ours, theirs)
    tally.add("weights_false_alarm", "shows no difference" not in words)
    tally.add("weights_coverage", holds(paired(ratios or []), 0.0))


SETTINGS = SearchSettings(budget=50, audit_size=CONFIGS, audit_seeds=AUDIT_SEEDS, confirm_share=0.0, p_share=0.0, device="cpu")


def simulated(repeats: int, seed: int) -> dict[str, float]:
    """Return the shares of all claims over all truths."""
    tally, source = Tally(), np.random.default_rng(seed)
    for better in (0.0, *BETTER):
        truth = np.zeros(CONFIGS)
        truth[1] = -better * LUCK
        for number in range(repeats):
            repeat(tally, truth, crashing=bool(number % 2), source=source, with_tau=number < repeats // 10)
    return tally.shares()


def crashing_share(seed: int) -> float:
    """Return the share of one expert's later trainings in the two fifths of its space that always fail."""
    settings = SearchSettings(strategy="factorised", sampler="model", budget=50, seed=seed, p_share=0.0, device="cpu")
    study = Study.in_memory(settings.objectives)
    search = factorised(settings, study)
    while not search.done:
        task = search.next_task()
        assert task is not None, "nothing runs beside it"
        search.record(attempt(_crashing, task))
    tried = [_crashes(record.config) for record in study.experts(1).records[LEARNED:]]
    study.close()
    return float(np.mean(tried))


def _crashes(config: Config) -> bool:
    return config.network.splits_channels and config.experts[0].low_channels[1] <= 8


def _crashing(task: Task) -> Outcome:
    """Return an outcome that gets better toward the region that fails."""
    if task.expert in (0, 1) and _crashes(task.config):
        raise RuntimeError("too little attention")
    parts = [abs(sum(expert.low_channels) / 48 - place / 3) for place, expert in enumerate(task.config.experts)]
    cost = 1e6 + sum(sum(expert.low_channels) for expert in task.config.experts) / 48
    if task.expert:
        return Outcome(task.number, task.expert, loss=parts[task.expert - 1], loss_error=0.01, macs=cost, params=7)
    return Outcome(task.number, fid=1 + sum(parts), macs=cost, params=7, latency_ms=0.1, features="none")


def front_point_found(seed: int) -> bool:
    """Return True if (6.3, 5), a point of the front above the line between others, is among the first 8 for the front."""
    points = np.array(
        [(0.0, 10.0), (0.3, 9.0), (8.0, 1.2), (9.0, 0.6), (10.0, 0.0), (6.3, 5.0), *((4.0 + n, 10.0) for n in range(30))]
    )
    values = points[:, 0], np.linspace(0, 3, 12)
    places = np.linspace(0, 1, len(points))[:, None]
    known = [Candidates(places, np.full(len(points), math.nan)), Candidates(places[:12], np.full(12, math.nan))]
    cascades = np.array([(first, second) for first in range(len(points)) for second in range(0, 12, 3)])
    model = Surrogate(known, cascades, values[0][cascades[:, 0]] + values[1][cascades[:, 1]])
    costs = (points[:, 1:], np.zeros((12, 1)))
    assembly = Assembly((np.arange(len(points)), np.arange(12)), costs, np.array([10.0]), np.array([np.inf]), (0,))
    scores, source = {(0, 11): 3.0}, np.random.default_rng(seed)
    for _ in range(8):
        for first, second in assembly.choose(FRONT_TURN, set(scores), model, source, scores):
            scores[first, second] = float(values[0][first] + values[1][second])
    return any(first == 5 for first, _ in scores)


def _show(found: dict[str, float]) -> None:
    for name, value in found.items():
        print(f"{name:<28} {value:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10_000, help="repetitions of each truth")
    parser.add_argument("--searches", type=int, default=3, help="searches with a space that crashes in part")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tenth of the repetitions, one search")
    options = parser.parse_args()
    began, repeats, searches = time.perf_counter(), options.repeats, options.searches
    if options.quick:
        repeats, searches = repeats // 10, 1
    found = simulated(repeats, options.seed)
    _show(found)
    seeds = range(options.seed, options.seed + 20)
    others = {"front_point_found": float(np.mean([front_point_found(seed) for seed in seeds]))}
    others["crashing_share"] = round(float(np.mean([crashing_share(seed) for seed in seeds[:searches]])), 3)
    _show(others)
    found |= others
    print(json.dumps(found | {"repeats": repeats, "seconds": round(time.perf_counter() - began)}))


if __name__ == "__main__":
    main()
