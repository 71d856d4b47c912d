"""Small real searches, from the command line to what they leave, with the settings that reach into every part."""

import json
import statistics

import pandas as pd
import pytest
from PIL import Image
from searches import InThisProcess

import run_search
from meme.config.schema import Config
from meme.data.images import open_images
from meme.pipeline import evaluate, load_ensemble
from meme_nas import run
from meme_nas.record.folder import trial_folder
from meme_nas.record.study import read_everything, read_trials
from meme_nas.worker.objective import open_basis

pytestmark = pytest.mark.slow

TINY = ["--preset", "digits-meme", "--samples", "32", "--features", "random", "--cascades-per-candidate", "1"]
TINY += ["--trunk-share", "0.002", "--confirm-share", "0.01", "--confirm-seeds", "2"]
BY_KID = ["--objectives", "kid", "macs", "--rungs", "2", "--proxy-steps", "4", "--budget", "5", "--audit-size", "4"]
BY_KID += ["--p-share", "0.01"]
OVER_SEEDS = ["--training-seeds", "3", "--proxy-steps", "2", "--budget", "12", "--audit-factor", "0"]
OVER_SEEDS += ["--p-share", "0"]


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    """A command that searches on a folder of few digits, and returns the study's folder."""
    images = tmp_path_factory.mktemp("images")
    for number, digit in enumerate(open_images("digits", size=8, channels=1).tensor(range(48))):
        Image.fromarray(((digit[0] + 1) * 127.5).round().byte().numpy()).save(images / f"{number}.png")

    def command(folder, *options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "open_engine", lambda settings, workers: InThisProcess())
            run_search.main(["--data", str(images), "--study", str(folder), *TINY, *options])
        return folder

    return command


@pytest.fixture(scope="module")
def by_kid(search, tmp_path_factory):
    return search(tmp_path_factory.mktemp("kid"), *BY_KID)


@pytest.fixture(scope="module")
def over_seeds(search, tmp_path_factory):
    return search(tmp_path_factory.mktemp("seeds"), *OVER_SEEDS)


def test_a_search_by_kid_leaves_everything(by_kid):
    table = pd.read_csv(by_kid / "trials.csv")
    assert (table["state"] == "complete").all() and table["kid"].notna().all() and table["fid"].isna().all()
    report = (by_kid / "report.html").read_text()
    assert all(words in report for words in ("KID against cost", "KID over trials", "What the proxy is worth"))
    assert "FID against" not in report and "FID over" not in report
    best = Config.load(by_kid / "winner.yaml")
    splits = [expert.low_channels for expert in best.experts]  # whose p were chosen afterwards
    trials = [trial for trial in read_trials(by_kid) if trial.choices]
    assert any([expert.low_channels for expert in trial.config.experts] == splits for trial in trials)
    later = {trial.kind for trial in read_everything(by_kid)}
    assert {"audit", "probabilities", "confirmation", "finalist"} <= later
    audited = [trial for trial in read_everything(by_kid) if trial.kind == "audit"]
    assert audited and all(trial.state == "complete" and trial.config.training.steps == 8 for trial in audited)


def test_rungs_leave_their_trials_apart(by_kid):
    below = [trial for trial in read_everything(by_kid) if trial.config.training.steps == 2]
    assert {trial.kind for trial in below} == {"hand-made", "candidate", "expert"}
    assert {trial.config.training.steps for trial in read_trials(by_kid)} == {4, 16 + 16}  # the single model, with the trunk's
    assert not list(by_kid.glob("rung-1/*/*.safetensors"))


def test_an_earlier_search_by_kid_is_a_warm_start(by_kid, search, tmp_path):
    short = ["--budget", "4", "--proxy-steps", "2", "--audit-factor", "0", "--p-share", "0.01"]
    search(tmp_path, *short, "--warm-start", str(by_kid))
    assert all(trial.state == "complete" for trial in read_trials(tmp_path))


def test_a_score_is_the_mean_over_training_seeds(over_seeds):
    trials = read_trials(over_seeds)
    for trial in trials:
        assert len(trial.outcome.fids) == 3 and trial.outcome.fid == pytest.approx(statistics.fmean(trial.outcome.fids))
    first = trials[0]
    folder = trial_folder(over_seeds, first.number)
    assert Config.load(folder / "config.yaml").training.seed == 0  # what is kept is trained with the first of them
    basis = open_basis(first.config, "cpu", None)
    assert evaluate(load_ensemble(folder), basis.images, basis.space).fid == pytest.approx(first.outcome.fids[0], rel=1e-4)


def test_winner_and_rivals_are_scored_again_over_all_training_seeds(over_seeds, search, capsys):
    search(over_seeds, *OVER_SEEDS, "--json")
    record = json.loads(capsys.readouterr().out)
    trials = {trial.number: trial for trial in read_trials(over_seeds)}
    assert {"hand-made", "multi-expert", "single-model"} <= {each["kind"] for each in record["finalists"]}
    for each in record["finalists"]:
        found = trials[each["trial"]].outcome.fids
        assert len(each["fid"]) == 3  # sampling seeds; each the mean over training seeds, so near the search's own score
        assert abs(statistics.fmean(each["fid"]) - statistics.fmean(found)) < 0.5 * statistics.fmean(found)
    winner, exported = trials[record["winner"]["trial"]], Config.load(record["winner"]["config"])
    assert exported.experts == winner.config.experts and exported.training.seed == 0
    assert exported.training.steps > winner.config.training.steps
