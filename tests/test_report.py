"""What the report says and that it holds on its own, from searches that went well and searches that did not."""

import base64
import html
import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import plotly.graph_objects
import pytest
from browser import browser

from meme.config.presets import experts_of, preset, yardsticks
from meme.config.schema import Config
from meme_nas.record.ranking import winner
from meme_nas.record.tasks import Outcome
from meme_nas.record.trial_log import TrialRecord
from meme_nas.report.details import details
from meme_nas.report.figures import hypervolume_figure, pareto_figure, pareto_figures, progress_figure, spectra_figure
from meme_nas.report.labels import PLOT_SIZE, offsets
from meme_nas.report.page import write_report
from meme_nas.report.spread import Dominant
from meme_nas.report.summary import Frame, Portrait, Spectrum, Summary
from meme_nas.report.words import NONE, Score, duration, notes, quantity, score_text, splits_text, state_line, verdict
from meme_nas.rescoring.findings import Rescored
from search_spaces.space import SplitSpace

ATTACK = "</script><script>alert('x')</script>"
PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")
YARDSTICKS = yardsticks("digits-meme")
HAND_MADE = YARDSTICKS["hand-made"]


def trial(number, kind="candidate", fid=None, macs=4.0e6, config=None, state="complete", reason="", **outcome):
    config = config or YARDSTICKS.get(kind, HAND_MADE)
    choices = SplitSpace(config).choices(config) if config.network.family == "iu-net" else {}
    scores = {"params": 660_000, "latency_ms": 5.25, "features": "classifier(digits)", "training_seconds": 41.0}
    known = Outcome(number, fid=fid, macs=macs, **(scores | outcome)) if state == "complete" else None
    return TrialRecord(number, state, kind, config, choices, reason, known)


def with_split(*low_channels) -> Config:
    """The hand-made pattern with another split of its first expert."""
    first, *others = HAND_MADE.experts
    return HAND_MADE.with_(experts=[first.model_copy(update={"low_channels": low_channels}), *others])


def summary(trials, winner=None, folder=Path("nowhere"), objectives=("fid", "macs"), **details) -> Summary:
    return Summary("A search", folder, trials, winner, objectives=objectives, **details)


def searched(folder=Path("nowhere"), fids=((10.9, 11.2, 11.5), (12.5, 12.9, 13.3)), **details) -> Summary:
    """Three yardsticks and four candidates, of which trial 4 wins; one failed, one was refused, one is running."""
    trials = [
        trial(0, "hand-made", 12.8, 4.1e6),
        trial(1, "multi-expert", 14.1, 4.4e6, params=None, latency_ms=None),
        trial(2, "single-model", 15.0, 4.4e6),
        trial(3, fid=13.0, macs=3.9e6, config=with_split(16, 0)),
        trial(4, fid=11.0, macs=4.018e6, config=with_split(16, 8)),
        trial(5, state="failed", reason=f"OSError: {ATTACK}"),
        trial(6, state="refused", reason="4.41e+06 MACs, over max_macs 4.2e+06"),
        trial(7, state="running"),
    ]
    finalists = [Rescored(trials[number], scores) for number, scores in zip((4, 0), fids, strict=False)]
    return summary(trials, trials[4], folder, finalists=finalists, **details)


def spectra_of(experts: int) -> tuple[Spectrum, ...]:
    return tuple(Spectrum(number, 125, (0.0, 0.5, 1.0), (0.0, -1.0, -2.0)) for number in range(1, experts + 1))


def portrayed(folder=Path("nowhere"), **details) -> Summary:
    """As ``searched``, with portraits of the winner and the hand-made pattern."""
    plain = searched(folder, **details)
    film = (Frame(0, 951, PNG), Frame(2, 700, PNG), Frame(2, 500, PNG), Frame(1, 250, PNG), Frame(1, 0, PNG))
    portraits = [Portrait(plain.trials[number], film, spectra_of(2)) for number in (4, 0)]
    return replace(plain, portraits=portraits)


def whole_page_of(content: Summary, folder: Path) -> str:
    write_report(content, folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


def page_of(content: Summary, folder: Path) -> str:
    """Without what shows when a trial is chosen."""
    return re.sub(r"<template.*?</template>", "", whole_page_of(content, folder), flags=re.DOTALL)


def without_scripts(page: str) -> str:
    return re.sub(r"<script[^>]*>.*?</script>", "", page, flags=re.DOTALL)


def text_of(page: str) -> str:
    """What a person reads."""
    plain = html.unescape(re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", "", without_scripts(page), flags=re.S)))
    return " ".join(plain.split())


def test_latencies_of_several_kinds_of_device_are_said_where_latency_is_minimised():
    def of_devices(*devices, objectives=("fid", "latency_ms")):
        trials = [trial(number, fid=11.0 + number, latency_device=device) for number, device in enumerate(devices)]
        return [note for note in notes(summary(trials, trials[0], objectives=objectives)) if note.startswith("Latencies")]

    assert of_devices("A GPU", "A CPU, 1 thread", "A GPU") == [
        "Latencies were measured on several kinds of device (A CPU, 1 thread; A GPU), and only those of one kind can be compared."
    ]
    assert "(A GPU; one that was not recorded)" in of_devices("A GPU", None)[0]
    assert of_devices("A GPU", "A GPU") == of_devices(None, None) == []
    assert of_devices("A GPU", "A CPU, 1 thread", objectives=("fid", "macs")) == []


def test_the_winner_is_quoted_with_cost_spread_and_basis():
    first, *others = verdict(searched())
    assert first == (
        "For these weights, at 2% fewer MACs than the hand-made pattern, the winner (trial 4) has FID 11.2 against 12.9: "
        "13% lower, 95% interval 14% lower to 12% lower, paired over sampling seeds "
        "(classifier(digits) features, 1,000 samples, 3 sampling seeds)."
    )
    # The other yardsticks were not scored again, so both sides are as searched, and the sentence says so.
    assert len(others) == 2
    assert "9% fewer MACs than one architecture for all experts" in others[0]
    assert "FID 11.0 against 14.1" in others[0] and "1 sampling seed, as searched" in others[0]
    assert all(sentence.startswith("For these weights, at ") for sentence in (first, *others))
    assert "only trainings with seeds that chose neither tell how they compare" in notes(searched())[0]
    assert "whether two such ranges overlap says nothing" in notes(searched())[1]


def test_a_difference_is_paired_over_seeds_whether_or_not_the_spreads_overlap():
    """The first pair shares its noise, so a steady difference shows in spite of it; the second does not."""
    steady = verdict(searched(fids=((12.0, 12.4, 12.8), (12.5, 12.9, 13.3))))[0]
    assert "FID 12.4 against 12.9: 3.9% lower, 95% interval 4.2% lower to 3.6% lower" in steady
    unsteady = verdict(searched(fids=((12.8, 12.4, 12.0), (12.5, 12.9, 13.3))))[0]
    assert "FID 12.4 against 12.9, which shows no difference: 3.9% lower, 95% interval 18% lower to 12% higher" in unsteady


def test_a_winner_that_loses_when_scored_again_is_said_to_lose():
    assert "against 12.9: 9.3% higher" in verdict(searched(fids=((14.0, 14.1, 14.2), (12.8, 12.9, 13.0))))[0]


def test_luck_of_training_is_never_called_a_difference_of_architectures():
    """Of equal architectures rescored over sampling seeds, every sentence speaks of these weights alone."""
    source, claims = np.random.default_rng(0), 0
    for _ in range(200):
        luck, noise = source.normal(0, 0.05, 2), source.normal(0, 0.01, 3)
        fids = [tuple(12 * np.exp(own + noise + source.normal(0, 0.003, 3))) for own in luck]
        claims += sum(not sentence.startswith("For these weights") for sentence in verdict(searched(fids=fids)))
    assert claims == 0


def test_a_search_that_ranks_p_alone_says_so():
    content = searched(dominant=Dominant("p", 0.97, ("split",), 0.04, 192))
    said = notes(content)[-1]
    assert "p alone explains 97% of the spread of FID over 192 configurations, split 4%" in said
    assert "The ranking is therefore one of p, and says little of split." in said and "--p-share" in said


def test_without_finalists_the_scores_of_the_search_are_named_as_such():
    content = searched(fids=())
    first = verdict(content)[0]
    assert "FID 11.0 against 12.8" in first and "1 sampling seed, as searched" in first and "±" not in first
    assert "flattered by chance" in notes(content)[1]


def test_a_hand_made_winner_means_that_nothing_was_better():
    trials = [trial(0, "hand-made", 12.8), trial(1, fid=13.5), trial(2, fid=13.6)]
    first = verdict(summary(trials, trials[0]))[0]
    assert first.startswith("Nothing beat the hand-made pattern: none of 2 scored candidates has a lower FID")
    assert "No candidate has a score yet" in verdict(summary(trials[:1], trials[0]))[0]


def test_verdicts_where_something_is_missing():
    unrivalled = [trial(0, "hand-made", state="failed", reason="broken"), trial(1, fid=11.0)]
    assert "hand-made pattern has no score to compare it with" in verdict(summary(unrivalled, unrivalled[1]))[0]
    assert verdict(summary([])) == ["No trial has a score yet, so there is no winner."]
    assert "Only yardsticks outside" in verdict(summary([trial(0, "single-model", 12.0)]))[0]
    equal = [trial(0, "hand-made", 12.8), trial(1, fid=11.0)]
    assert verdict(summary(equal, equal[1]))[0].startswith(
        "For these weights, at equal MACs as the hand-made pattern, the winner"
    )


CROSSED = [
    trial(0, "hand-made", 10.0, 4.0e6, params=600_000),
    trial(1, fid=9.0, macs=5.0e6, params=500_000, config=with_split(16, 8)),
    trial(2, fid=9.5, macs=4.5e6, params=700_000, config=with_split(16, 0)),
    trial(3, fid=12.0, macs=5.5e6, params=400_000, config=with_split(8, 8)),
]


@pytest.mark.parametrize(
    "objectives, best, first",
    [
        (("fid", "macs"), {0, 1, 2}, "none of 3 scored candidates has a lower FID at no more MACs. The hand-made pattern"),
        (
            ("fid", "params"),
            {1, 3},
            "For these weights, at 17% fewer parameters than the hand-made pattern, the winner (trial 1) has FID 9.00 against",
        ),
        (("fid", "macs", "params"), {0, 1, 2, 3}, "none of 3 scored candidates has a lower FID at no more MACs and parameters."),
        (
            ("fid",),
            {1},
            "For these weights, at 25% more MACs than the hand-made pattern, the winner (trial 1) has FID 9.00 against 10.0",
        ),
    ],
)
def test_the_report_is_about_what_was_minimised(tmp_path, objectives, best, first):
    content = summary(CROSSED, winner(CROSSED, objectives), objectives=objectives)
    assert first in verdict(content)[0]
    page = page_of(content, tmp_path)
    rows = re.findall(r'<tr class="([^"]*)" data-trial="(\d+)">', page)
    assert {int(number) for classes, number in rows if "front" in classes.split()} == best
    drawn = pareto_figures(content)
    for kind, figure in zip(objectives[1:] or ("macs",), drawn.values(), strict=True):
        traces = {trace["name"]: trace for trace in figure["data"]}
        assert set(traces["Pareto front"]["customdata"]) == best
        by_number = dict(zip(traces["trials"]["customdata"], traces["trials"]["x"], strict=True))
        assert by_number == {each.number: each.scored.values([kind])[0] for each in CROSSED}
    assert all(f'id="{name}"' in page for name in drawn)


def test_the_front_is_of_the_searched_space_only(tmp_path):
    """A strong single model beats every candidate, and is none."""
    trials = [*CROSSED, trial(4, "single-model", 1.0, 1.0e6, params=1_000)]
    content = summary(trials, winner(trials, ("fid", "params")), objectives=("fid", "params"))
    page = page_of(content, tmp_path)
    assert re.findall(r'<tr class="[^"]*front[^"]*" data-trial="(\d+)">', page) == ["1", "3"]
    (front_shown,) = (trace for trace in pareto_figures(content)["pareto"]["data"] if trace["name"] == "Pareto front")
    assert front_shown["customdata"] == [3, 1]


def test_the_state_counts_every_trial():
    assert state_line(searched()) == ("7 of 8 trials started so far: 5 complete, 1 failed, 1 refused, 1 running or interrupted")
    assert state_line(summary([trial(0, fid=1.0), trial(1, state="failed")])) == "2 of 2 trials: 1 complete, 1 failed"
    assert state_line(summary([])) == "No trial has started yet"


def test_numbers_as_a_person_writes_them():
    assert [quantity(value) for value in (None, 0, 999.7, 4_033_376, 1.5e9)] == [NONE, "0", "1.00k", "4.03M", "1.50G"]
    assert [score_text(value) for value in (None, 0.01234, 9.999, 11.24, 312.4)] == [
        NONE,
        "0.0123",
        "10.0",
        "11.2",
        "312",
    ]
    assert [duration(value) for value in (None, 4.04, 41.2, 192, 7200)] == [NONE, "4.0 s", "41 s", "3.2 min", "2.0 h"]
    spreads = [Score(11.2346, deviation, 3, True) for deviation in (0.3, 0.12, 0.004, 0.0, 25.0)]
    assert [str(score) for score in spreads] == [
        "11.2 ± 0.3", "11.23 ± 0.12", "11.235 ± 0.004", "11.23 ± 0.00", "11 ± 25",
    ]  # fmt: skip


def test_every_trial_is_in_the_table_with_its_scores_or_its_reason(tmp_path):
    page = page_of(searched(), tmp_path)
    body = page[page.index("<tbody>", page.index('class="trials"')) :]
    rows = re.findall(r'<tr class="([^"]*)" data-trial="\d+">(.*?)</tr>', body[: body.index("</tbody>")], re.DOTALL)
    assert [re.search(r'data-value="(\d+)"', cells).group(1) for _, cells in rows] == list("01234567")
    assert [name.split()[0] for name, _ in rows] == ["complete"] * 5 + ["failed", "refused", "running"]
    assert "won" in rows[4][0] and "yardstick" in rows[0][0]
    cells = [text_of(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", rows[4][1])]
    assert cells[:8] == ["4", "candidate", "complete", "11.0", "4.02M", "660k", "5.25 ms", "41 s"]
    assert cells[8].startswith("16·8@0.8 8·24@0.4")
    assert "no splits (LDM U-Net)" in rows[1][1] and "over max_macs 4.2e+06" in rows[6][1]


def test_what_comes_from_elsewhere_is_escaped(tmp_path):
    plain = searched(importance={ATTACK: 0.5}, facts={f"fact {ATTACK}": ATTACK})
    trials = [*plain.trials, trial(8, kind=f"kind {ATTACK}", fid=12.0, features=f"space {ATTACK}")]
    hostile = replace(plain, title=f"title {ATTACK}", trials=trials, finalists=[])
    page = page_of(hostile, tmp_path)
    assert "alert('x')</script>" not in page and "<script>alert" not in page
    assert page.count("<script") == page.count("<script>") + 1  # ours: the figures, plotly.js and the page's own
    text = text_of(page)
    for place in ("title ", "OSError: ", "fact ", "kind "):
        assert place + ATTACK in text
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', page, re.DOTALL).group(1))
    assert "space &lt;/script&gt;" in figures["pareto"]["layout"]["yaxis"]["title"]["text"]
    assert "<script>" not in json.dumps(figures)


def test_the_page_loads_nothing_from_elsewhere(tmp_path):
    page = page_of(searched(), tmp_path)
    markup = without_scripts(page)
    assert not re.search(r"""(src|href|action|data)\s*=\s*["']?\s*(https?:)?//""", markup)
    assert not re.search(r"url\(|@import", markup)
    assert "default-src 'none'" in markup
    assert page.count("plotly.js v") == 1 and page.count("Plotly.react(") >= 1


def test_samples_are_embedded_and_missing_ones_are_said_to_be_missing(tmp_path):
    for number in (0, 4):
        (tmp_path / "trials" / f"{number:03d}").mkdir(parents=True)
        (tmp_path / "trials" / f"{number:03d}" / "samples.png").write_bytes(PNG)
    page = page_of(searched(tmp_path), tmp_path)
    assert page.count(f'src="data:image/png;base64,{base64.b64encode(PNG).decode()}"') == 2
    assert page.count("no samples kept") == 2
    text = text_of(page)
    assert "Winner, trial 4 FID 11.2 ± 0.3" in text and "Hand-made pattern FID 12.9 ± 0.4" in text
    assert "FID 15.0 4.40M MACs, 660k parameters" in text


def test_ratios_of_the_winner_stand_beside_the_hand_made_ones(tmp_path):
    page = page_of(searched(), tmp_path)
    winners, hand_made = re.findall(r'<table class="pattern">(.*?)</table>', page, re.DOTALL)
    cells = [re.findall(r'<td class="cell"[^>]*>(.*?)</td>', table) for table in (winners, hand_made)]
    assert cells[1] == [
        f"{low} / {width}"
        for expert in HAND_MADE.experts
        for low, width in zip(expert.low_channels, HAND_MADE.network.widths, strict=True)
    ]
    assert cells[0][2:] == cells[1][2:]
    assert cells[0][:2] == ["16 / 16 ▲", "8 / 32 ▼"]  # against 8 and 16


def test_importance_is_shown_or_its_absence_explained(tmp_path):
    shown = text_of(page_of(searched(importance={"expert2.level1.low": 0.75, "expert2.p": 0.25}), tmp_path))
    assert "expert 2, level 1, split 75.0%" in shown and "expert 2, p 25.0%" in shown
    assert "Not estimated: there are too few complete trials" in text_of(page_of(searched(), tmp_path))


def test_what_an_expert_has_beyond_its_split_is_said():
    first, second, *others = [expert.model_dump() for expert in HAND_MADE.experts]
    changed = [first | {"time_conditioning": "additive", "low_pools": ("max", "average")}, second, *others]
    groups = splits_text(trial(3, config=HAND_MADE.with_(experts=changed))).split("  ")
    assert groups[0] == "8·16@0.8 (low_pools max·average, time_conditioning additive)"
    assert groups[1] == splits_text(trial(0, "hand-made")).split("  ")[1]
    moved = [first | {"interval": (0, 100)}, second | {"interval": (100, 500)}, *others]
    assert splits_text(trial(3, config=HAND_MADE.with_(experts=moved))).startswith("8·16@0.8 (t 0-99)  ")


def test_choices_of_any_dimension_are_named_as_a_person_says_them(tmp_path):
    importance = {"expert2.level1.pool_stride": 0.5, "interval3.length": 0.3, "experts": 0.2}
    shown = text_of(page_of(searched(importance=importance), tmp_path))
    assert "expert 2, level 1, pool stride 50.0%" in shown
    assert "interval 3, length 30.0%" in shown and " experts 20.0%" in shown


def one_expert() -> Summary:
    network = HAND_MADE.network
    config = HAND_MADE.with_(experts=[expert.model_dump() for expert in experts_of(network, (1.0,), 1000)])
    trials = [trial(0, "hand-made", 12.0, config=config), trial(1, fid=11.0, config=config)]
    return summary(trials, trials[1])


def many_experts() -> Summary:
    config = preset("ffhq-meme")
    experts = experts_of(config.network, (0.5,) * 9, 1000)
    config = config.with_(experts=[expert.model_dump() for expert in experts])
    trials = [trial(0, "hand-made", 12.0, config=config), trial(1, fid=300.0, config=config)]
    return summary(trials, trials[0])


EDGE_CASES = {
    "no trials": lambda: summary([]),
    "nothing complete": lambda: summary([trial(0, "hand-made", state="failed", reason="x"), trial(1, state="running")]),
    "only yardsticks": lambda: (lambda trials: summary(trials, trials[0]))(
        [trial(number, kind, 12.0 + number) for number, kind in enumerate(YARDSTICKS)]
    ),
    "no winner": lambda: summary([trial(0, "single-model", 12.0, params=None, latency_ms=None, features=None)]),
    "one expert": one_expert,
    "many experts": many_experts,
    "one seed": lambda: searched(fids=((11.0,), (12.0,))),
    "scores that are no numbers": lambda: searched(fids=((float("nan"),), (12.0,)), importance={"a": float("nan")}),
    "searched": searched,
    "portrayed": portrayed,
}


@pytest.mark.parametrize("name", EDGE_CASES)
def test_every_search_gets_a_whole_page_and_valid_figures(name, tmp_path):
    content = EDGE_CASES[name]()
    page = page_of(content, tmp_path)
    assert page.endswith("</html>") or page.endswith("</html>\n")
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]
    drawn = (partial(pareto_figure, kind="macs"), progress_figure, hypervolume_figure, spectra_figure)
    for figure in filter(None, (draw(content) for draw in drawn)):
        colours_named = re.sub(r'"--[a-z0-9-]+"', '"#123456"', json.dumps(figure, allow_nan=False))
        plotly.graph_objects.Figure(json.loads(colours_named))  # raises on an attribute plotly does not know
    assert ('id="pareto"' in page) == any(record.state == "complete" for record in content.trials)


def test_the_figure_shows_front_yardsticks_winner_and_error_bars():
    traces = {trace["name"]: trace for trace in pareto_figure(searched(), "macs")["data"]}
    assert set(traces) == {"trials", "Pareto front", "hand-made", "multi-expert", "single model", "winner: trial 4"}
    assert len(traces["trials"]["x"]) == 5
    assert traces["Pareto front"]["x"] == [3.9e6, 4.018e6] and traces["Pareto front"]["line"]["shape"] == "hv"
    winner = traces["winner: trial 4"]
    assert winner["y"] == [pytest.approx(11.2)] and winner["error_y"]["array"] == [pytest.approx(0.3)]
    for part in ("trial 4", "candidate", "FID 11.0", "4.02M MACs", "660k parameters", "5.25 ms", "16·8@0.8"):
        assert part in winner["hovertext"][0]
    assert pareto_figure(searched(), "macs")["layout"]["yaxis"]["title"]["text"] == "FID (classifier(digits) features)"


def test_labels_keep_clear_of_points_edges_and_each_other():
    anchors, texts = [(0.5, 0.5), (0.51, 0.5), (0.99, 0.02)], ["first", "second", "in the corner"]
    moves = offsets(anchors, texts, anchors)
    middles = [(x * PLOT_SIZE[0] + dx, (1 - y) * PLOT_SIZE[1] + dy) for (x, y), (dx, dy) in zip(anchors, moves, strict=True)]
    (x0, y0), (x1, y1), (x2, y2) = middles
    assert abs(x0 - x1) > 40 or abs(y0 - y1) >= 20
    assert x2 + 45 < PLOT_SIZE[0] and y2 + 10 <= PLOT_SIZE[1]


def test_the_way_from_noise_to_data_shows_who_has_the_images(tmp_path):
    page = page_of(portrayed(), tmp_path)
    films = re.findall(r'<div class="scroll film".*?(?=<h3>|</section>)', page, re.DOTALL)
    assert [text_of(film) for film in films] == ["Noise 951 Expert 2 700 500 Expert 1 250 done"] * 2
    assert [film.count("data:image/png") for film in films] == [5, 5]
    assert "From noise to data" not in page_of(searched(), tmp_path)


def test_spectra_of_winner_and_hand_made_pattern_share_colours():
    figure = spectra_figure(portrayed())
    lines = [(trace["name"], trace["line"]["dash"], trace["line"]["color"]) for trace in figure["data"]]
    assert [dash for _, dash, _ in lines] == ["solid", "solid", "dot", "dot"]
    assert lines[0][2] == lines[2][2] != lines[1][2] == lines[3][2]
    assert spectra_figure(searched()) is None


def test_the_best_so_far_is_of_the_space_that_is_searched():
    trials = [trial(0, "hand-made", 12.8), trial(1, "single-model", 9.0), trial(2, fid=13.0), trial(3, fid=11.0)]
    best = next(trace for trace in progress_figure(summary(trials))["data"] if trace["name"] == "best so far")
    assert (best["x"], best["y"]) == ([0, 2, 3], [12.8, 12.8, 11.0])


def test_hypervolume_is_the_share_of_the_box_that_searched_trials_beat():
    content = searched()
    trace = hypervolume_figure(content)["data"][0]
    assert trace["x"] == [0, 3, 4]  # yardsticks outside the space, and trials without a score, don't count
    box = 1.1 * 12.8, 1.1 * 4.1e6
    areas = [(1 - fid / box[0]) * (1 - macs / box[1]) for fid, macs in ((12.8, 4.1e6), (11.0, 4.018e6))]
    assert trace["y"][0] == pytest.approx(areas[0])
    assert trace["y"][0] < trace["y"][1] < trace["y"][2] and trace["y"][2] > areas[1]
    assert hypervolume_figure(summary([trial(0, fid=3.0)])) is None


def test_details_of_a_trial_are_in_the_page_and_pictures_have_a_limit(tmp_path, monkeypatch):
    for number in range(5):
        (tmp_path / "trials" / f"{number:03d}").mkdir(parents=True)
        (tmp_path / "trials" / f"{number:03d}" / "samples.png").write_bytes(PNG)
    content = searched(tmp_path)
    shown = {each["number"]: each for each in details(content)}
    assert [each["image"] is not None for each in shown.values()] == [True] * 5 + [False] * 3
    assert shown[4]["facts"][:2] == ["FID 11.0 in the search", "FID 11.2 ± 0.3 scored again, 3 sampling seeds"]
    assert shown[4]["pattern"]["compared"] and not shown[0]["pattern"]["compared"] and shown[1]["pattern"] is None
    assert shown[5]["facts"] == [f"failed: OSError: {ATTACK}"]
    assert shown[4]["file"] == "trials/004/samples.png"  # which says nothing of the machine
    monkeypatch.setattr("meme_nas.report.details.MOST_SAMPLES", 2 * len(shown[0]["image"]))
    limited = details(content, [content.trials[4]])
    assert [each["number"] for each in limited if each["image"]] == [0, 4]


# In a browser


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.fixture
def opened(tab, tmp_path):
    """The report, in a window as wide as a desk's."""
    write_report(portrayed(tmp_path, importance={"expert2.p": 1.0}), tmp_path / "report.html")
    tab.complaints.clear()
    tab.show_as(width=1280)
    tab.open((tmp_path / "report.html").as_uri())
    tab.wait_for("document.querySelectorAll('.main-svg').length >= 8")
    return tab


SHOWN = "[...document.querySelectorAll('.trials tbody tr:not([hidden])')].map(row => row.dataset.trial).join('')"
CHOSEN = "document.querySelector('dialog').open && document.getElementById('chosen').textContent"


def test_a_browser_draws_the_page_without_errors_and_sorts_the_table(opened):
    assert opened.ask("document.querySelectorAll('.scatterlayer .trace').length") >= 10
    opened.ask("document.querySelectorAll('.trials th button')[3].click()")  # by FID
    assert opened.ask(SHOWN) == "40312567"  # then those without one
    assert opened.complaints == []


def test_filters_show_what_they_say(opened):
    def filtered(which="", text=""):
        opened.ask(f"which.value = {which!r}, text.value = {text!r}, filter()")
        return opened.ask(SHOWN)

    assert filtered() == "01234567"
    assert filtered("yardstick") == "012" and filtered("refused") == "6" and filtered("front") == "34"
    assert filtered("candidate", "16·8@0.8 complete") == "4"
    assert opened.ask("document.getElementById('shown').value") == "1 of 8"
    assert opened.complaints == []


def test_a_trial_opens_by_keyboard_alone_and_the_arrows_go_on(opened):
    opened.ask("document.querySelector('tr[data-trial=\"3\"] button').focus()")
    opened.press("Enter")
    assert opened.ask(CHOSEN) == "Trial 3, candidate"
    assert opened.ask("document.querySelectorAll('dialog .pattern td.cell').length") == 8
    opened.press("ArrowRight")
    assert opened.ask(CHOSEN) == "Trial 4, candidate"
    assert opened.ask("location.hash") == "#trial-4"
    opened.press("Escape")
    opened.wait_for("!document.querySelector('dialog').open && location.hash === ''")
    assert opened.ask("document.activeElement.textContent") == "3"  # where the reader was
    assert opened.complaints == []


def test_a_click_on_a_point_opens_its_trial(opened):
    place = opened.ask(
        "document.querySelector('#pareto').scrollIntoView({block: 'center'}), "
        "(box => [box.x + box.width / 2, box.y + box.height / 2])"
        "([...document.querySelectorAll('#pareto .scatterlayer .trace')].at(-1).querySelector('.point').getBoundingClientRect())"
    )
    opened.click(*place)
    opened.wait_for("document.querySelector('dialog').open")
    assert opened.ask(CHOSEN) == "Trial 4, candidate"  # the winner's star lies on top
    assert opened.complaints == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_phone_scrolls_down_only_and_both_themes_have_their_colours(opened, dark):
    opened.show_as(width=390, height=844, dark=dark, phone=True)
    opened.ask("new Promise(done => setTimeout(done, 400))")  # figures are drawn anew
    assert opened.ask("document.documentElement.scrollWidth") <= 390
    background = opened.ask("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(18, 22, 29)" if dark else "rgb(246, 247, 249)")
    assert opened.complaints == []


def test_the_browser_would_have_shown_an_error(tab, tmp_path):
    page = tmp_path / "broken.html"
    page.write_text("<script>throw new Error('seen')</script>")
    tab.open(page.as_uri())
    assert any("seen" in line for line in tab.complaints)
