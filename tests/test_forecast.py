"""What a search says of its length before it begins: every training and score of the budget, at a speed timed here."""

import re

import pytest
import torch
from PIL import Image

from meme_nas import forecast
from meme_nas.forecast import describe, search_seconds
from meme_nas.report.words import duration
from meme_nas.settings import SearchSettings

SEARCH_ALONE = {"audit_factor": 0, "confirm_share": 0.0, "p_share": 0.0}


@pytest.fixture
def speed(monkeypatch):
    """A training step takes a millisecond an image."""
    monkeypatch.setattr(forecast, "_training_seconds_an_image", lambda config, device: 1e-3)


def test_all_that_the_budget_pays_for_is_counted(speed):
    trained = 50 * 4 * 46 * 32  # trials, experts, steps, images
    drawn = 250 * 20  # images, sampler steps, of a cascade
    last = 4 * 3 * 1000 * 20  # winner and three yardsticks, sampling seeds
    factorised = (trained + ((48 * 4 + 3) * drawn + last) / 3) / 1000  # cascades of the candidates beside the yardsticks
    alone = {"audit_factor": 0, "trunk_share": 0.0, "confirm_share": 0.0, "p_share": 0.0}
    assert search_seconds(SearchSettings(**alone), 1) == pytest.approx(factorised)
    assert search_seconds(SearchSettings(**alone), 4) == pytest.approx(factorised / 4)
    joint = (trained + (50 * drawn + last) / 3) / 1000
    assert search_seconds(SearchSettings(strategy="joint", **alone), 1) == pytest.approx(joint)
    longer = search_seconds(SearchSettings(proxy_steps=2 * 46, **alone), 1) - factorised
    assert longer == pytest.approx(trained / 1000)


@pytest.mark.parametrize("seeds, factor, audited", [(1, 2, 8), (3, 3, 5)])
def test_an_audit_is_counted_with_its_seeds_of_which_one_goes_on_from_the_search(speed, seeds, factor, audited):
    without = search_seconds(SearchSettings(audit_factor=0, trunk_share=0.125, p_share=0.0), 1)
    trained = (audited * (seeds * factor - 1) * 4 * 46 + (seeds - 1) * 1_000) * 32  # a trunk for every seed but the search's
    drawn = audited * seeds * 250 * 20
    settings = SearchSettings(audit_factor=factor, audit_size=audited, audit_seeds=seeds, trunk_share=0.125, p_share=0.0)
    assert search_seconds(settings, 1) - without == pytest.approx((trained + drawn / 3) / 1000)


def test_trunks_and_the_confirmation_are_counted(speed):
    alone = {"audit_factor": 0, "confirm_share": 0.0, "p_share": 0.0, "budget": 10}
    without = search_seconds(SearchSettings(trunk_share=0.0, **alone), 1)
    trunk = search_seconds(SearchSettings(trunk_share=0.125, **alone), 1) - without
    assert trunk == pytest.approx(2 * 1_000 * 32 / 1000)  # the iU-Net's; the Multi-Expert's, which the single model goes on from
    chosen = SearchSettings(trunk_share=0.125, p_share=0.5, audit_factor=0, confirm_share=0.0, budget=10)
    trained = 3 * 4 * 750 * 32  # of each expert its own p, half and twice of it; 4,000 steps in all, of which the trunk has 1,000
    drawn = 9 * 2 * 250 * 20  # alternatives and the winner as it is, sampling seeds
    assert search_seconds(chosen, 1) - without - trunk == pytest.approx((trained + drawn / 3) / 1000)
    confirmed = SearchSettings(trunk_share=0.125, audit_factor=0, confirm_share=0.25, confirm_seeds=3, p_share=0.0, budget=10)
    trained = 3 * (1_000 + 2 * 4 * 250) * 32  # 2,000 of 8,000 steps in all, of which the trunk has 1,000
    drawn = 2 * 3 * 2 * 1_000 * 20  # configurations, training and sampling seeds
    assert search_seconds(confirmed, 1) - without - trunk == pytest.approx((trained + drawn / 3) / 1000)


def test_the_speed_is_timed_with_the_threads_of_a_trial(monkeypatch):
    used, timed = [], forecast.run_training
    monkeypatch.setattr(forecast, "run_training", lambda *rest: (used.append(torch.get_num_threads()), timed(*rest))[1])
    before = torch.get_num_threads()
    assert 0 < search_seconds(SearchSettings(cpus_per_trial=1), 1) < 24 * 3600
    assert set(used) == {1} and torch.get_num_threads() == before


@pytest.mark.parametrize("preset, images", [("digits-meme", 32), ("cifar10-meme", 61), ("ffhq-meme", 1)])
def test_on_a_cpu_no_more_of_a_batch_is_timed_than_takes_a_moment(preset, images, monkeypatch):
    seen = []
    monkeypatch.setattr(forecast, "_timed", lambda config, steps, device: seen.append(config.training.batch_size) or steps)
    assert search_seconds(SearchSettings(preset=preset, data="somewhere", device="cpu"), 1) > 0
    assert set(seen) == {images}


def test_a_set_up_that_a_busy_machine_made_long_does_not_count(monkeypatch):
    took = iter([9.0, 4.0, 2.0 + 20 * 0.5, 2.0])
    monkeypatch.setattr(forecast, "_timed", lambda config, steps, device: next(took))
    config = SearchSettings(preset="digits-meme").full_config().with_(training={"batch_size": 4})
    assert forecast._training_seconds_an_image(config, torch.device("cpu")) == pytest.approx(0.5 / 4)


def test_networks_that_know_classes_are_timed_too():
    config = SearchSettings(preset="digits-meme").full_config().with_(network={"classes": 10}, training={"batch_size": 2})
    assert forecast._training_seconds_an_image(config, torch.device("cpu")) > 0


def test_a_long_search_without_a_gpu_is_told_of_a_smaller_network(monkeypatch, capsys, tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    monkeypatch.setattr(forecast, "_training_seconds_an_image", lambda config, device: 0.001 if config.image.size < 32 else 0.02)
    describe(SearchSettings(data=str(tmp_path), device="cpu", engine="local", workers=2))
    said = capsys.readouterr().out
    assert "the search, its audit and the confirmation of its winner take about" in said
    assert re.search(r"without a GPU, --preset thumbnails-meme \(16 pixels a side\) takes [\d.]+ min", said)
    small = {"device": "cpu", "engine": "local", "workers": 2}
    describe(SearchSettings(preset="thumbnails-meme", data=str(tmp_path), **small, **SEARCH_ALONE))
    said = capsys.readouterr().out
    assert "the search takes about" in said and said.rstrip().endswith("on this machine") and "without a GPU" not in said


def test_no_larger_network_is_named_as_the_shorter_way(monkeypatch):
    monkeypatch.setattr(forecast, "_training_seconds_an_image", lambda config, device: 0.02)
    slow = {"data": "somewhere", "device": "cpu", "engine": "local", "workers": 1}
    assert len(forecast.forecast_lines(SearchSettings(preset="cifar10-meme", **slow))) == 2
    assert len(forecast.forecast_lines(SearchSettings(preset="tiny-meme", **slow))) == 1


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_start_up_belongs_to_the_time_of_a_tiny_search(speed, engine):
    tiny = SearchSettings(engine=engine, budget=1, proxy_steps=1, samples=2, workers=1, trunk_share=0.0, **SEARCH_ALONE)
    rest = search_seconds(tiny, 1)
    said = forecast.forecast_lines(tiny)[0]
    assert rest < 5 and said == f"the search takes about {duration(forecast.START_SECONDS[engine] + rest)} on this machine"
