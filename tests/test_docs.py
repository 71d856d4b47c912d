"""What README and docs tell a reader to type is what the programs take, and links lead somewhere; the site builds strictly."""

import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from conftest import ROOT

import meme.cli.commands
import meme_nas
from meme.cli.console import Output
from meme.cli.parsing import read_settings
from meme.cli.verbs import VERBS
from meme.cli.verbs import main as meme_main
from meme_nas.settings import SearchSettings

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "results" / "README.md"])
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
OTHERS = {"cd", "export", "git", "source", "ssh", "time"}
"""Programs of others that a reader has; what follows them is not looked at."""


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands_of(page: Path) -> list[str]:
    """Whole lines of shell, and what stands in a sentence as code and begins like one of our programs."""
    text = page.read_text()
    blocks = chain.from_iterable(block.splitlines() for block in fenced(text, "bash"))
    indented = re.findall(r"^    (python .*)$", text, re.MULTILINE)
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    inline = re.findall(r"`((?:python (?:-m meme|run_search\.py|benchmarks/)|pip install )[^`\n]*)`", prose)
    lines = [line.partition(" #")[0].strip() for line in (*blocks, *indented, *inline)]
    return [part.strip() for line in lines if line and not line.startswith("#") for part in line.split("&&")]


ALL = sorted({(name_of(page), command) for page in PAGES for command in commands_of(page)})


def test_the_walk_finds_commands_of_every_kind():
    found = {command.split(" --")[0] for _, command in ALL}
    assert {
        "make search",
        "python run_search.py",
        "python -m meme cost",
        "optuna-dashboard results/digits-meme/study.journal",
    } <= found
    assert len(ALL) > 60


@pytest.mark.parametrize("page, command", ALL, ids=[f"{page}: {command}" for page, command in ALL])
def test_a_command_is_one_that_its_program_takes(page, command, monkeypatch):
    words = [word for word in shlex.split(command) if word != "\N{HORIZONTAL ELLIPSIS}"]
    program = words[0]
    if program == "python":
        check_python(words[1:], monkeypatch)
    elif program == "make":
        done = subprocess.run([*words, "--dry-run"], capture_output=True, cwd=ROOT, check=False)
        assert done.returncode == 0, done.stderr
    elif program == "pip":
        for extra in re.findall(r"meme-nas\[([^\]]*)\]", command):
            assert set(extra.split(",")) <= set(EXTRAS)
    elif program == "ray":
        check_ray(words[1:])
    elif program in ("optuna-dashboard", "tensorboard"):
        check_other(program, words[1:])
    else:
        assert program in OTHERS, f"the test does not know {program}"


def check_python(words: list[str], monkeypatch) -> None:
    if "--help" in words:
        return
    if words[0] == "run_search.py":
        read_settings(SearchSettings, words[1:], "run_search.py")
    elif words[:2] == ["-m", "meme"]:
        check_verb(words[2:], monkeypatch)
    else:
        script = ROOT / words[0]
        assert script.is_file()
        source = script.read_text()
        own, passed_on = (words[1:], []) if "--" not in words else (words[1 : words.index("--")], words[words.index("--") + 1 :])
        read_settings(SearchSettings, passed_on, "run_search.py")
        for flag in (word.lstrip("-") for word in own if word.startswith("--")):
            assert flag in source or flag.replace("-", "_") in source, f"{words[0]} has no --{flag}"


def check_verb(words: list[str], monkeypatch) -> None:
    """The verb's own function is reached with these words; it does nothing here."""
    called = []
    if all(word in {*VERBS, "/"} for word in words) or words[0].startswith("--tyro-"):  # verbs named, or the parser's own
        return
    last = ("_config", "_folder", "_sources", "_ablation", "_costs", "_data")
    for name in [name for name in vars(meme.cli.commands) if name.endswith(last)]:
        monkeypatch.setattr(meme.cli.commands, name, lambda *args, **kwargs: called.append(args))
    meme_main(words)
    assert called


def check_ray(words: list[str]) -> None:
    """Ray's own parser, without what the command does."""
    from ray.scripts.scripts import cli

    command = cli.commands[words[0]]
    command.make_context(words[0], words[1:])


def check_other(program: str, words: list[str]) -> None:
    module = {"optuna-dashboard": "optuna_dashboard", "tensorboard": "tensorboard"}[program]
    assert program.removeprefix("optuna-") in EXTRAS
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{program} is not installed: its flags are not looked at")
    flags = [word for word in words if word.startswith("--")]
    if flags:
        help_text = subprocess.run([Path(sys.executable).parent / program, "--help"], capture_output=True, text=True, check=True)
        assert [flag for flag in flags if flag not in help_text.stdout] == []


def known_flags() -> set[str]:
    from typing import get_type_hints

    from meme.cli.parsing import _choices

    verbs = [get_type_hints(verb, include_extras=True) for verb in VERBS.values()]
    search = {name: field.annotation for name, field in SearchSettings.model_fields.items()}
    return set(chain.from_iterable(map(_choices, [*verbs, search | {"output": Output}]))) | {"--help"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_an_option_that_is_named_alone_exists(page):
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    named = {flag.split()[0] for flag in re.findall(r"`(--[a-z][^`\n]*)`", prose)}
    assert named - known_flags() == set()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_link_leads_to_a_file_and_a_heading_that_are_there(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        file, _, heading = target.partition("#")
        found = (page.parent / file).resolve() if file else page
        assert found.is_file(), f"{target} is not there"
        assert found.is_relative_to(ROOT)
        if heading:
            headings = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            assert heading in [re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings]


def test_every_page_is_in_the_site_and_python_in_it_compiles():
    listed = set(re.findall(r"^([a-z0-9-]+)$", (ROOT / "docs" / "index.md").read_text(), re.MULTILINE))
    assert listed == {page.stem for page in ROOT.glob("docs/*.md")} - {"index"}
    for page in PAGES:
        for number, block in enumerate(fenced(page.read_text(), "python")):
            if page.stem != "add-a-dimension":  # which shows lines out of their context
                compile(block, f"{page}:{number}", "exec")


def test_the_api_page_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text()
    for module in (meme, meme_nas):
        missing = [name for name in module.__all__ if not re.search(rf":: {module.__name__}\.{name}\b", page)]
        assert missing == []
        assert all((getattr(module, name).__doc__ or "").strip() for name in module.__all__)


# The site


def build(source: Path, target: Path) -> subprocess.CompletedProcess:
    pytest.importorskip("sphinx", reason="the extra docs is not installed: the site is not built")
    pytest.importorskip("myst_parser")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", str(source), str(target)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_the_site_builds_and_its_links_are_pages(tmp_path):
    done = build(ROOT / "docs", tmp_path)
    assert done.returncode == 0, done.stderr
    index = (tmp_path / "index.html").read_text()
    for link in ("results.html", "example.html", "architecture.html", "own-images.html", "licence.html"):
        assert f'href="{link}"' in index
    api = (tmp_path / "api.html").read_text()
    assert 'id="meme.train"' in api and 'id="meme_nas.SearchSettings.budget"' in api


def test_a_link_that_leads_nowhere_fails_the_build(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "conf.py").write_text('extensions = ["myst_parser"]\n')
    (tmp_path / "docs" / "index.md").write_text("# Title\n\n[nowhere](missing.md)\n")
    done = build(tmp_path / "docs", tmp_path / "site")
    assert done.returncode != 0 and "missing.md" in done.stderr
