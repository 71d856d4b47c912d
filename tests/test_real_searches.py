"""Small real searches, from the command line to what they leave, with the settings that reach into every part."""

import json
import statistics

import pandas as pd
import pytest
from PIL import Image

import run_search
from meme.config import Config
from meme.data import open_images
from meme.pipeline import evaluate, load_ensemble
from meme_nas.audit import SEEDS
from meme_nas.objective import open_basis
from meme_nas.study import read_everything, read_trials, trial_folder

TINY = ["--engine", "local", "--workers", "1", "--preset", "digits-meme", "--samples", "32", "--features", "random"]
BY_KID = [
    *("--objectives", "kid", "macs", "--training-seeds", "3", "--rungs", "2", "--proxy-steps", "4"),
    *("--budget", "12", "--cascades-per-candidate", "1", "--audit-size", "4"),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of few digits: what is held out is then looked at quickly."""
    folder = tmp_path_factory.mktemp("images")
    for number, digit in enumerate(open_images("digits", size=8, channels=1).tensor(range(48))):
        Image.fromarray(((digit[0] + 1) * 127.5).round().byte().numpy()).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def by_kid(tmp_path_factory, images):
    """Of KID and MACs, every candidate trained with three seeds, at two rungs."""
    folder = tmp_path_factory.mktemp("results") / "kid"
    run_search.main(["--data", str(images), "--study", str(folder), *TINY, *BY_KID])
    return folder


def test_a_search_by_kid_leaves_everything(by_kid):
    table = pd.read_csv(by_kid / "trials.csv")
    assert (table["state"] == "complete").all() and table["kid"].notna().all() and table["fid"].isna().all()
    report = (by_kid / "report.html").read_text()
    assert all(words in report for words in ("KID against cost", "KID over trials", "<p>", "What the proxy is worth"))
    assert "FID" not in report.replace(str(by_kid), "").rpartition("</script>")[2] and "FID against" not in report
    best = Config.load(by_kid / "winner.yaml")
    assert any(trial.config.experts == best.experts for trial in read_trials(by_kid) if trial.choices)


def test_a_score_is_the_mean_over_training_seeds(by_kid):
    trials = read_trials(by_kid)
    for trial in trials:
        assert len(trial.outcome.fids) == 3
        assert trial.outcome.kid == pytest.approx(statistics.fmean(trial.outcome.fids))
    first = trials[0]
    folder = trial_folder(by_kid, first.number)
    assert Config.load(folder / "config.yaml").training.seed == 0  # what is kept is trained with the first of them
    basis = open_basis(first.config, "cpu", None)
    score = evaluate(load_ensemble(folder), basis.images, basis.space, metrics=("kid",))
    assert score.measured["kid"].value == pytest.approx(first.outcome.fids[0], rel=1e-4, abs=1e-6)


def test_the_audit_takes_the_last_seed_of_the_search_and_two_others(by_kid):
    audited = [trial for trial in read_everything(by_kid) if trial.kind == "audit"]
    assert audited and all(trial.state == "complete" for trial in audited)
    for trial in audited:
        assert trial.config.training.steps == 8 and len(trial.outcome.fids) == SEEDS
        assert Config.load(trial_folder(by_kid, trial.number, "audit") / "config.yaml").training.seed == 2


def test_rungs_leave_their_trials_apart(by_kid):
    below = [trial for trial in read_everything(by_kid) if trial.config.training.steps == 2]
    assert {trial.kind for trial in below} == {"hand-made", "candidate", "expert"}
    assert {trial.config.training.steps for trial in read_trials(by_kid)} == {4, 16}  # 16: the single model
    assert not list(by_kid.glob("rung-1/*/*.safetensors"))


def test_finalists_are_scored_again_over_all_training_seeds(by_kid, images, capsys):
    run_search.main(["--data", str(images), "--study", str(by_kid), *TINY, *BY_KID, "--json"])
    record = json.loads(capsys.readouterr().out)
    assert {"hand-made", "multi-expert", "single-model"} <= {each["kind"] for each in record["finalists"]}
    assert all(len(each["kid"]) == 3 for each in record["finalists"])
    winner = next(trial for trial in read_trials(by_kid) if trial.number == record["winner"]["trial"])
    exported = Config.load(record["winner"]["config"])
    assert exported.experts == winner.config.experts and exported.training.seed == 0


def test_an_earlier_search_by_kid_is_a_warm_start(by_kid, images, tmp_path):
    options = ["--budget", "4", "--proxy-steps", "2", "--audit-factor", "0", "--warm-start", str(by_kid)]
    run_search.main(["--data", str(images), "--study", str(tmp_path), *TINY, *options])
    assert all(trial.state == "complete" for trial in read_trials(tmp_path))
