"""The judge of winners: what it reads back is what it wrote, and its comparisons are those of the records."""

import math

import numpy as np
import pytest
import winner_in_full as judge

from meme.config.presets import preset
from meme.support.intervals import crossed


def record(row: str, search_seed: str, training_seed: int, fid: float):
    found = {"architecture": "abc", "steps": 3_000, "trunk_steps": 4_000, "macs": 4e6, "fid": fid, "fids": f"{fid} {fid}"}
    rest = {"choices": "8/24@0.8", "search_minutes": "14.5" if search_seed else "", "date": "2026-11-29"}
    return judge.Record("tiny-meme", row, search_seed, training_seed, **found, **rest)


@pytest.fixture
def records():
    """Two searches and three training seeds; the winner's log FID is lower by 0.1, and by 0.01 more for each search seed."""
    source = np.random.default_rng(0)
    rows = []
    for seed in (101, 102, 103):
        hand_made = 0.5 * math.exp(0.1 * source.normal())
        rows.append(record("hand-made", "", seed, hand_made))
        rows += [record("winner", str(search), seed, hand_made * math.exp(-0.1 - 0.01 * search)) for search in range(2)]
    return rows


def test_records_come_back_as_they_were_written(tmp_path, records):
    for each in records:
        judge.write_record(tmp_path / "records.csv", each)
    assert judge.read_records(tmp_path / "records.csv") == records
    assert judge.read_records(tmp_path / "none.csv") == []


def test_differences_are_paired_and_the_interval_is_over_searches_and_seeds(records):
    table = judge.differences(records, "winner", "hand-made")
    np.testing.assert_allclose(table, [[-0.10] * 3, [-0.11] * 3], atol=1e-12)
    found = judge.report(records)
    expected = crossed(table)
    assert found["winner_vs_hand_made"] == pytest.approx(-0.105)
    assert found["winner_vs_hand_made_high"] == pytest.approx(expected.high, abs=1e-4)
    assert (found["winner_vs_hand_made_searches"], found["winner_vs_hand_made_seeds"]) == (2, 3)
    assert found["search_minutes"] == 14.5
    assert "winner_vs_single" not in found, "what was not trained is not compared"


def test_a_seed_that_one_side_lacks_is_left_out(records):
    fewer = [each for each in records if (each.row, each.search_seed, each.training_seed) != ("winner", "1", 103)]
    assert judge.differences(fewer, "winner", "hand-made").shape == (2, 2)


def test_rivals_are_trained_as_their_presets_say_and_once_more_with_the_winners_trunk():
    base = preset("tiny-meme").with_(data="somewhere")
    winner = base.with_(training={"steps": 3_000, "trunk_steps": 4_000})
    wanted = {each.row: each.config for each in judge.rivals(base, winner, judge.RIVALS)}
    assert set(wanted) == {"hand-made", "multi-expert", "single-model", "hand-made-alike"}
    assert wanted["hand-made"].training == preset("tiny-meme").training
    assert wanted["hand-made-alike"].training == winner.training and wanted["hand-made-alike"].experts == base.experts
    assert {config.data for config in wanted.values()} == {"somewhere"}
    assert {each.row for each in judge.rivals(base, base, judge.RIVALS)} == {"hand-made", "multi-expert", "single-model"}
