"""What a person and a script see of the command line: help, near misses, --quiet and --json, Ctrl-C."""

import io
import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT
from processes import LONGEST, training

import run_search
from meme.cli.console import Output, as_a_step, console, emit, printing, remarks
from meme.cli.verbs import VERBS, main
from meme.config.presets import preset
from meme.config.schema import Config
from meme_nas.settings import SearchSettings


@pytest.fixture
def printed(monkeypatch, capsys):
    """Return the output of a command, which must end with status 0."""
    monkeypatch.setenv("COLUMNS", "100")

    def printed(run, *words):
        with pytest.raises(SystemExit) as stop:
            run(list(words))
        assert not stop.value.code
        return capsys.readouterr().out

    return printed


def refused(run, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        run(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


# Help


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_has_an_example_that_it_takes_and_no_stray_none(verb, printed):
    said = printed(main, verb, "--help")
    flat = " ".join(said.replace("│", " ").split())
    assert f"Example: python -m meme {verb} " in flat
    assert "None" not in flat  # but what leaving an option out means
    assert "(required)" in flat or verb == "cost"


def test_the_help_of_a_search_groups_every_setting(printed):
    said = printed(run_search.main, "--help")
    for title in ("search options", "trial options", "engine options", "output options"):
        assert title in said
    for name in [*SearchSettings.model_fields, "quiet", "json"]:
        assert f"--{name.replace('_', '-')}" in said
    assert "Example: python run_search.py" in said
    assert "(default: None)" not in said
    assert "(default: results/ and the preset's name)" in " ".join(said.replace("│", " ").split())
    grouped = [name for fields in run_search.GROUPS.values() for name in fields]
    assert len(grouped) == len(set(grouped))


def test_all_verbs_are_listed():
    """In a process, as a user asks for them."""
    command, surroundings = [sys.executable, "-m", "meme", "--help"], os.environ | {"COLUMNS": "100"}
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=surroundings, check=True).stdout
    assert [verb for verb in VERBS if f"• {verb}" not in said] == []


@pytest.mark.parametrize("run, option", [(main, "--init-from"), (run_search.main, "--proposal-lag")], ids=["meme", "run_search"])
def test_shell_completion_is_printed_as_the_readme_says(run, option, printed):
    said = printed(run, "--tyro-print-completion", "bash")
    assert "complete " in said and option in said
    assert "--tyro-print-completion" in (ROOT / "README.md").read_text()


# Near misses

MISSES = {
    "verb": (["trian", "digits-meme"], "there is no verb 'trian'; did you mean train?"),
    "unlike any verb": (["zzz"], "there is no verb 'zzz'; allowed are train, sample,"),
    "flag": (["train", "digits-meme", "--devise", "cpu"], "there is no option --devise; did you mean --device?"),
    "flag with a value": (["train", "digits-meme", "--dat=x"], "there is no option --dat; did you mean --data?"),
    "flag of another verb": (["cost", "--seeds", "3"], "there is no option --seeds; allowed are --quiet, --json"),
    "choice": (["evaluate", "x", "--features", "rando"], "features: 'rando' is not allowed; did you mean random?"),
    "one of several choices": (["evaluate", "x", "--metrics", "fd"], "metrics: 'fd' is not allowed; did you mean fid?"),
    "preset": (["train", "digits-mem"], "preset: there is no 'digits-mem'; did you mean digits-meme"),
}


@pytest.mark.parametrize("arguments, sentence", MISSES.values(), ids=MISSES)
def test_a_near_miss_is_answered_with_the_nearest_name(arguments, sentence, capsys):
    said = refused(main, arguments, capsys)
    assert said.startswith(f"error: {sentence}")
    assert said.count("\n") == 1


def test_near_misses_of_a_search(capsys):
    assert "there is no option --buget; did you mean --budget?" in refused(run_search.main, ["--buget", "3"], capsys)
    assert "engine: 'loca' is not allowed; did you mean local?" in refused(run_search.main, ["--engine", "loca"], capsys)


def test_what_comes_after_the_value_of_a_choice_is_no_choice(capsys, tmp_path):
    said = refused(main, ["evaluate", "--features", "random", str(tmp_path)], capsys)
    assert "not a trained ensemble" in said


# --quiet and --json


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "few.yaml"
    preset("digits-meme").with_(training={"steps": 2, "batch_size": 4}, evaluation={"samples": 16}).save(path)
    return path


def one_object(capsys):
    """What standard output holds: one JSON document and nothing else."""
    return json.loads(capsys.readouterr().out)


def test_every_verb_for_scripts_prints_one_json_document(config, capsys):
    folder = config.with_suffix("")
    main(["train", str(config), "--json"])
    assert one_object(capsys) == {"folder": str(folder), "experts": 4, "steps": 2, "skipped": 0}
    main(["sample", str(folder), "--count", "4", "--json"])
    assert one_object(capsys) == {"samples": 4, "seed": 0, "path": str(folder / "samples.png")}
    main(["evaluate", str(folder), "--metrics", "fid", "--seeds", "2", "--json"])
    scores = one_object(capsys)
    assert len(scores["metrics"]["fid"]["values"]) == 2
    assert "16 samples" in scores["protocol"]
    main(["export", str(folder), "--json"])
    assert one_object(capsys)["has_scores"] is True
    main(["cost", str(config), "--json"])
    assert [row["expert"] for row in one_object(capsys)] == [1, 2, 3, 4]
    main(["data", "digits", "--json"])
    assert one_object(capsys)["images"] == 1797


def test_quiet_leaves_only_results(config, tmp_path, capsys):
    main(["train", str(config), "--out", str(tmp_path / "out"), "--quiet"])
    said = capsys.readouterr()
    assert said.out.replace("\n", " ").split() == f"trained 4 experts x 2 steps: {tmp_path / 'out'}".split()
    assert said.err == ""


@pytest.mark.slow
def test_a_search_prints_one_json_object(tmp_path, capsys):
    study = tmp_path / "study"
    small = ["--engine", "local", "--workers", "1", "--proxy-steps", "2", "--samples", "16", "--budget", "2"]
    small += ["--trunk-share", "0.002", "--p-share", "0", "--confirm-share", "0"]
    run_search.main([*small, "--study", str(study), "--json"])
    said = capsys.readouterr()
    record = json.loads(said.out)
    assert record["folder"] == str(study)
    assert record["trials"] == {"complete": 3}
    assert [each["kind"] for each in record["finalists"]] == ["hand-made", "multi-expert", "single-model"]
    assert all(len(each["fid"]) == 3 and each["macs"] > 0 for each in record["finalists"])
    assert Config.load(record["winner"]["config"]).name == "winner"
    assert "trials at a time" in said.err  # progress is still told, elsewhere
    run_search.main([*small, "--study", str(study), "--quiet"])
    quiet = capsys.readouterr()
    assert "trials are done" not in quiet.out
    assert "winner (trial" in quiet.out


def test_printing_is_as_before_once_it_ends(capsys):
    before = console.quiet, remarks.quiet, remarks.stderr
    with pytest.raises(RuntimeError), printing(Output(quiet=True, json=True)):
        with as_a_step():
            emit({"step": 1})
        emit({"whole": 2})
        raise RuntimeError
    assert (console.quiet, remarks.quiet, remarks.stderr) == before
    emit({"after": 3})
    assert json.loads(capsys.readouterr().out) == {"whole": 2}


# A reader that leaves


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "command", [["run_search.py", "--dry-run"], ["run_search.py", "--help"], ["-m", "meme", "cost", "digits-meme"]]
)
def test_a_reader_that_leaves_ends_a_command_without_a_word(command, unbuffered):
    surroundings = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    nobody, output = os.pipe()
    os.close(nobody)
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=surroundings, stdout=output, stderr=subprocess.PIPE, text=True
    )
    os.close(output)
    assert (done.returncode, done.stderr) == (1, "")


def test_another_broken_pipe_is_an_error_like_any_other(monkeypatch):
    def broken(*args, **kwargs):
        raise BrokenPipeError("a worker's")

    monkeypatch.setattr("meme.cli.commands.train_config", broken)
    with open(os.devnull, "w") as output, pytest.raises(BrokenPipeError, match="a worker's"):
        monkeypatch.setattr(sys, "stdout", output)
        main(["train", "digits-meme"])


# Ctrl-C


def test_ctrl_c_ends_a_training_cleanly_and_the_same_command_goes_on(tmp_path):
    path = tmp_path / "long.yaml"
    preset("digits-meme").with_(training={"steps": 100_000, "batch_size": 4}).save(path)
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # a shell's background jobs ignore it
    with training(["train", str(path), "--quiet"], tmp_path / "trains", **heard) as process:
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=LONGEST)
    assert process.returncode == 130
    assert said.strip() == "interrupted; the same command goes on from here"
    left = {path.name for path in (tmp_path / "long").iterdir() if not path.name.startswith(".")}
    assert left == {"config.yaml", "expert-1.training.safetensors"}


@pytest.mark.parametrize("verb, how", [("train", "goes on from here"), ("data", "starts over")])
def test_ctrl_c_says_how_to_go_on(verb, how, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    import meme.cli.commands

    monkeypatch.setattr(meme.cli.commands, "train_config", interrupted)
    monkeypatch.setattr(meme.cli.commands, "describe_data", interrupted)
    with pytest.raises(SystemExit) as stop:
        main([verb, "digits-meme"])
    assert stop.value.code == 130
    assert how in capsys.readouterr().err


def test_consoles_write_where_output_goes_at_the_time(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with printing(Output(json=True)):
        remarks.print("a remark")
        console.print("a result for a person")
    assert stream.getvalue() == "a remark\n"
