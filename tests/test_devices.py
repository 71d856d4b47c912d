"""Precision is one setting, and time is measured on the device that did the work."""

import re
from pathlib import Path

import pytest
import torch

from meme.cli.verbs import main
from meme.config.presets import preset
from meme.config.schema import Config
from meme.data.images import open_images
from meme.errors import UserError
from meme.pipeline import _Drawn, draw, load_ensemble, train
from meme.scoring.cost import measure_pass_ms, timed_network
from meme.support.devices import calculating_in, exact_convolutions, wait_for
from meme.support.tensor_files import load_tensors
from meme.training.interval_loss import hold_out, interval_loss
from meme.training.trainer import Training, _header, train_expert
from meme_nas.record.study import Study
from meme_nas.settings import SearchSettings

ROOT = Path(__file__).parent.parent
BRIEF = preset("digits-meme").with_(training={"steps": 6, "batch_size": 4}, evaluation={"samples": 8}, sampling={"steps": 4})


@pytest.fixture(scope="module")
def images():
    return open_images("digits", size=8, channels=1)


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(BRIEF, images, folder=folder)
    return folder


def dtype_in(device, precision):
    """What a product of matrices comes out as."""
    with calculating_in(device, precision):
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32


@pytest.mark.parametrize(
    "device, precision, expected",
    [
        ("cuda", "auto", torch.bfloat16),
        ("cpu", "auto", torch.float32),
        ("cuda", "fp32", torch.float32),
        ("cuda", "fp16", torch.float16),
        ("cpu", "bf16", torch.bfloat16),
        ("cpu", "fp16", torch.float16),
    ],
)
def test_each_precision_is_what_networks_calculate_with(device, precision, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # or autocast would refuse the device
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *arguments, **options: True)
    assert dtype_in(device, precision) == expected


def test_fp32_turns_an_outer_autocast_off():
    with torch.autocast("cpu", torch.bfloat16), calculating_in("cpu", "fp32"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_fp32_keeps_convolutions_from_tf32_and_nothing_else_does():
    before = torch.backends.cudnn.allow_tf32
    for precision in ("auto", "bf16", "fp16", "fp32"):
        with exact_convolutions(precision):
            assert torch.backends.cudnn.allow_tf32 == (before and precision != "fp32")
    assert torch.backends.cudnn.allow_tf32 == before


def test_no_other_file_makes_an_autocast_context_or_waits_for_a_device():
    files = [path for folder in ("meme", "meme_nas", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    users = {path.relative_to(ROOT).as_posix() for path in files if re.search(r"autocast\(|synchronize\(", path.read_text())}
    assert users == {"meme/support/devices.py"}


# Waiting


def test_the_device_that_did_the_work_is_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waited.append(device))
    wait_for("cuda:1")
    wait_for("cpu")
    assert waited == [torch.device("cuda:1")]


def test_sampling_times_wait_for_the_device_of_the_images(monkeypatch):
    waited = []
    monkeypatch.setattr("meme.pipeline.wait_for", waited.append)
    list(_Drawn(iter([torch.zeros(2, 1, 8, 8, dtype=torch.uint8)])))
    assert waited == [torch.device("cpu")]


def test_latency_waits_for_the_device_that_it_measures(monkeypatch):
    waited = []
    monkeypatch.setattr("meme.scoring.cost.wait_for", waited.append)
    config = BRIEF.with_(network={"channels": 8, "head_channels": 4}, experts=[{"interval": (0, 1000), "low_channels": (4, 12)}])
    measure_pass_ms(timed_network(config, 1, "cpu"), "cpu")
    assert set(waited) == {torch.device("cpu")}


# Where precision counts


def drawn(folder, precision):
    ensemble = load_ensemble(folder)
    ensemble.config = ensemble.config.with_(sampling={"precision": precision})
    return torch.cat(list(draw(ensemble, 8, 0))).float()


def test_images_are_drawn_in_the_precision_that_is_asked_for(trained):
    exact = drawn(trained, "auto")
    assert torch.equal(drawn(trained, "fp32"), exact)
    for precision in ("bf16", "fp16"):
        rounded = drawn(trained, precision)
        assert not torch.equal(rounded, exact)
        assert (rounded - exact).abs().mean() < 8  # of 255


def test_training_precision_is_part_of_the_id_and_sampling_precision_is_not(images):
    header = _header(BRIEF, 1, images, 6)
    assert "precision" not in BRIEF.to_yaml()
    assert _header(BRIEF.with_(training={"precision": "fp32"}), 1, images, 6) != header
    assert _header(BRIEF.with_(sampling={"precision": "fp32"}), 1, images, 6) == header


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_training_in_fewer_bits_is_near_to_that_in_float32(precision, images):
    config = BRIEF.with_(training={"precision": precision, "steps": 30})
    losses = {}
    for each in (config, config.with_(training={"precision": "auto"})):
        train_expert(each, 1, images, on_progress=lambda progress: losses.setdefault(each.training.precision, progress.loss))  # noqa: B023
    assert losses[precision] != losses["auto"]
    assert losses[precision] == pytest.approx(losses["auto"], rel=0.05)


class Stopped(Exception):
    pass


def test_training_in_fp16_resumes_with_its_scale_bit_for_bit(images, tmp_path, monkeypatch):
    monkeypatch.setattr("meme.training.trainer.REPORT_EVERY", 2)
    config = BRIEF.with_(training={"precision": "fp16"})

    def stop(progress):
        if progress.step == 4:
            raise Stopped

    original = Training.__init__

    def with_another_scale(training, *arguments):
        original(training, *arguments)
        training.scaler.load_state_dict(training.scaler.state_dict() | {"scale": 256.0, "growth_interval": 3})

    monkeypatch.setattr(Training, "__init__", with_another_scale)
    with pytest.raises(Stopped):
        train_expert(config, 1, images, folder=tmp_path, on_progress=stop)
    halved = load_tensors(tmp_path / "expert-1.training.safetensors")
    assert float(halved["scaler.scale"]) == 512.0  # doubled after three steps
    resumed, unbroken = train_expert(config, 1, images, folder=tmp_path), train_expert(config, 1, images)
    assert all(map(torch.equal, resumed.state_dict().values(), unbroken.state_dict().values()))


def test_the_held_out_loss_is_of_the_precision_of_training(trained, images):
    _, held_out = hold_out(images)
    expert = load_ensemble(trained).experts[0]
    plain, sampled, rounded = (
        interval_loss(expert, BRIEF.with_(**{section: {"precision": "bf16"}}), 1, held_out).mean
        if section
        else interval_loss(expert, BRIEF, 1, held_out).mean
        for section in ("", "sampling", "training")
    )
    assert plain == sampled != rounded


def test_commands_take_a_precision_and_say_it(trained, tmp_path, capsys):
    main(["evaluate", str(trained), "--precision", "bf16", "--seeds", "1", "--samples", "8", "--metrics", "fid"])
    assert "ddim 4 steps, bf16, 1 sampling seeds" in " ".join(capsys.readouterr().out.split())
    main(["sample", str(trained), "--precision", "fp32", "--count", "1"])
    scored = ["--metrics", "inception_score", "--features", "classifier", "--seeds", "1", "--samples", "8"]
    main(["evaluate", str(trained), "--inception-split", "4", *scored])
    assert "inception score over splits of 4 images" in " ".join(capsys.readouterr().out.split())
    BRIEF.with_(training={"steps": 1}).save(tmp_path / "small.yaml")
    main(["train", str(tmp_path / "small.yaml"), "--precision", "fp32"])
    assert Config.load(tmp_path / "small" / "config.yaml").training.precision == "fp32"
    with pytest.raises(SystemExit):
        main(["sample", str(trained), "--precision", "fp64"])
    assert "precision: 'fp64' is not allowed" in capsys.readouterr().err


def test_a_search_takes_a_precision_and_keeps_to_it(tmp_path):
    settings = SearchSettings(study=tmp_path, precision="bf16")
    config = settings.as_proxy(settings.full_config())
    assert (config.training.precision, config.sampling.precision) == ("bf16", "bf16")
    Study(tmp_path, settings.in_force(), settings.objectives).close()
    with pytest.raises(UserError, match="precision: the study in .* was made with bf16, not fp32"):
        Study(tmp_path, SearchSettings(study=tmp_path, precision="fp32").in_force(), ("fid", "macs"))


def test_studies_from_before_precision_could_be_chosen_go_on(tmp_path):
    settings = SearchSettings(study=tmp_path)
    assert "precision" not in settings.full_config().to_yaml()
    Study(
        tmp_path, {name: value for name, value in settings.in_force().items() if name != "precision"}, settings.objectives
    ).close()
    Study(tmp_path, settings.in_force(), settings.objectives).close()
