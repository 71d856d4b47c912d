"""What a search says of its length before it begins: every training and score of the budget, at a speed timed here."""

import pytest
import torch
from PIL import Image

from meme_nas import forecast
from meme_nas.forecast import describe, search_seconds
from meme_nas.report_words import duration
from meme_nas.settings import SearchSettings


@pytest.fixture
def speed(monkeypatch):
    """A training step takes a millisecond an image."""
    monkeypatch.setattr(forecast, "_training_seconds_an_image", lambda config, device: 1e-3)


def test_all_that_the_budget_pays_for_is_counted(speed):
    trained = 50 * 4 * 91 * 32  # trials, experts, steps, images
    drawn = 250 * 20  # images, sampler steps, of a cascade
    last = 4 * 3 * 1000 * 20  # winner and three yardsticks, sampling seeds
    factorised = (trained + (50 * 4 * drawn + last) / 3) / 1000
    alone = {"audit_factor": 0}
    assert search_seconds(SearchSettings(**alone), 1) == pytest.approx(factorised)
    assert search_seconds(SearchSettings(**alone), 4) == pytest.approx(factorised / 4)
    joint = (trained + (50 * drawn + last) / 3) / 1000
    assert search_seconds(SearchSettings(strategy="joint", **alone), 1) == pytest.approx(joint)
    longer = search_seconds(SearchSettings(proxy_steps=2 * 91, **alone), 1) - factorised
    assert longer == pytest.approx(trained / 1000)


@pytest.mark.parametrize("factor, audited", [(2, 8), (3, 5)])
def test_an_audit_is_counted_with_its_seeds_of_which_one_goes_on_from_the_search(speed, factor, audited):
    without = search_seconds(SearchSettings(audit_factor=0), 1)
    trained = audited * (3 * factor - 1) * 4 * 91 * 32
    drawn = audited * 3 * 250 * 20
    longer = search_seconds(SearchSettings(audit_factor=factor, audit_size=audited), 1) - without
    assert longer == pytest.approx((trained + drawn / 3) / 1000)


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
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr(forecast, "_training_seconds_an_image", lambda config, device: 0.001 if config.image.size < 32 else 0.02)
    describe(SearchSettings(data=str(tmp_path), device="cpu", engine="local", workers=2))
    said = capsys.readouterr().out
    assert "the search and its audit take about 64.5 h on this machine" in said
    assert "without a GPU, --preset thumbnails-meme (16 pixels a side) takes 21.7 min" in said
    describe(
        SearchSettings(preset="thumbnails-meme", data=str(tmp_path), device="cpu", engine="local", workers=2, audit_factor=0)
    )
    said = capsys.readouterr().out
    assert "the search takes about" in said and said.rstrip().endswith("on this machine") and "without a GPU" not in said


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_start_up_belongs_to_the_time_of_a_tiny_search(speed, engine):
    tiny = SearchSettings(engine=engine, budget=1, proxy_steps=1, samples=2, audit_factor=0, workers=1)
    rest = search_seconds(tiny, 1)
    said = forecast.forecast_lines(tiny)[0]
    assert rest < 5 and said == f"the search takes about {duration(forecast.START_SECONDS[engine] + rest)} on this machine"
