"""Other people's dashboards open what we leave; each is an extra, and its test is skipped where it is not installed."""

import sys

import optuna
import pytest

from meme.cli.verbs import main
from meme.config.presets import preset
from meme_nas.record.study import Study
from meme_nas.record.tasks import Outcome


@pytest.fixture
def few(tmp_path):
    path = tmp_path / "few.yaml"
    preset("digits-meme").with_(training={"steps": 50, "batch_size": 4}).save(path)
    return path


def test_tensorboard_reads_the_losses_of_every_expert(few):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="the extra is not installed")
    main(["train", str(few), "--tensorboard", "--quiet"])
    for number in (1, 2, 3, 4):
        events = reader.EventAccumulator(str(few.with_suffix("") / "tensorboard" / f"expert-{number}")).Reload()
        assert [(event.step, event.value > 0) for event in events.Scalars("loss")] == [(25, True), (50, True)]


def test_without_tensorboard_one_line_says_what_to_install(few, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it were not there
    with pytest.raises(SystemExit) as stop:
        main(["train", str(few), "--tensorboard", "--quiet"])
    assert stop.value.code == 2
    assert "pip install 'meme-nas[tensorboard]'" in capsys.readouterr().err
    main(["train", str(few), "--quiet"])
    assert not (few.with_suffix("") / "tensorboard").exists()


def test_optunas_dashboard_opens_the_journal_and_names_what_is_minimised(tmp_path):
    dashboard = pytest.importorskip("optuna_dashboard", reason="the extra is not installed")
    config = preset("digits-meme")
    study = Study(tmp_path / "study", {}, ("fid", "macs"))
    for number in range(3):
        study.start(config, "single-model", {}, {})
        study.finish(Outcome(number, fid=3.0 - number, macs=4e6))
    study.close()
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "study" / "study.journal"))
    answered = asks(dashboard.wsgi(optuna.storages.JournalStorage(backend)))
    [found] = answered("/api/studies")["study_summaries"]
    details = answered(f"/api/studies/{found['study_id']}")
    assert details["objective_names"] == ["fid", "macs"]
    assert [trial["state"] for trial in details["trials"]] == ["Complete"] * 3


def asks(application):
    """The JSON that a WSGI application answers a GET with."""
    import json
    from wsgiref.util import setup_testing_defaults

    def answer(path):
        surroundings, status = {"PATH_INFO": path}, []
        setup_testing_defaults(surroundings)
        body = b"".join(application(surroundings, lambda code, headers, error=None: status.append(code)))
        assert status[0].startswith("200"), (status, body)
        return json.loads(body)

    return answer
