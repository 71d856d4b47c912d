"""A kind of choice that explains the spread of scores is named, and chance never is."""

import numpy as np
import pytest

from meme.config.presets import preset
from meme_nas.record.tasks import Outcome
from meme_nas.record.trial_log import TrialRecord
from meme_nas.report.claims import dominant_words
from meme_nas.report.spread import dominant, kind_of

BASE = preset("digits-meme")


def searched(effect_of_p: float, effect_of_split: float, seed: int, count: int = 120) -> list[TrialRecord]:
    """Two experts with a split and a p each, chosen by chance; the luck of a training has deviation 0.05."""
    source, trials = np.random.default_rng(seed), []
    for number in range(count):
        choices = {f"expert{n}.p": float(source.choice([0.1, 0.4, 0.8])) for n in (1, 2)}
        choices |= {f"expert{n}.level{level}.low": int(source.choice([0, 8, 16])) for n in (1, 2) for level in (1, 2)}
        log = effect_of_p * choices["expert1.p"] + effect_of_split * choices["expert2.level1.low"] / 16 + source.normal(0, 0.05)
        outcome = Outcome(number, fid=float(np.exp(log)), macs=1.0)
        trials.append(TrialRecord(number, "complete", "candidate", BASE, choices, "", outcome))
    return trials


def test_choices_are_grouped_by_kind():
    names = ("expert2.level1.low", "expert2.p", "interval3.length", "experts", "expert1.level2.pool_stride")
    assert [kind_of(name) for name in names] == ["split", "p", "boundaries", "experts", "pool stride"]


def test_a_kind_that_explains_most_is_named_with_its_share():
    found = dominant(searched(1.0, 0.02, 0), "fid")
    assert found.kind == "p" and found.others == ("split",) and found.count == 120
    assert 0.95 < found.share < 0.99 and abs(found.share_of_others) < 0.1  # 0.082 of 0.082 + 0.0025
    other = dominant(searched(0.02, 1.0, 0), "fid")
    assert other.kind == "split" and dominant_words(other, "fid").endswith("one of split, and says little of p.")


@pytest.mark.parametrize("effects", [(0.0, 0.0), (0.5, 0.35), (0.5, 0.4)])
def test_neither_chance_nor_two_kinds_that_share_the_spread_are_named(effects):
    assert all(dominant(searched(*effects, seed), "fid") is None for seed in range(30))


def test_few_configurations_and_one_kind_name_nothing():
    assert dominant([], "fid") is None and dominant(searched(1.0, 0.0, 0, count=12), "fid") is None
    only_p = [
        TrialRecord(t.number, t.state, t.kind, BASE, {k: v for k, v in t.choices.items() if k.endswith(".p")}, "", t.outcome)
        for t in searched(1.0, 0.0, 0)
    ]
    assert dominant(only_p, "fid") is None
