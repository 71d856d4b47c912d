"""The walls of the house: who may import whom, read from the source itself."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("meme", "meme_nas", "search_spaces")


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Every module a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def tops(path: Path) -> set[str]:
    return {module.split(".")[0] for module in imported(path)}


@pytest.mark.parametrize("path", files("meme"), ids=lambda path: path.name)
def test_the_method_knows_nothing_of_the_search(path):
    assert not tops(path) & {"optuna", "ray", "meme_nas", "search_spaces"}


@pytest.mark.parametrize("path", files("search_spaces"), ids=lambda path: path.name)
def test_search_spaces_are_data(path):
    assert not tops(path) & {"torch", "optuna", "ray", "meme_nas"}
    settings = {"meme.config", "meme.errors"}  # neither of which knows torch
    assert {".".join(module.split(".")[:2]) for module in imported(path) if module.startswith("meme.")} <= settings


def test_ray_stays_in_the_engines_files():
    users = [path for package in OURS for path in files(package) if "ray" in tops(path)]
    assert {path.relative_to(ROOT).as_posix() for path in users} == {
        f"meme_nas/engines/{name}.py" for name in ("ray", "ray_cluster", "ray_training")
    }


def test_optuna_stays_in_the_record_and_the_proposer():
    users = {path.name for package in OURS for path in files(package) if "optuna" in tops(path)}
    assert users == {"study.py", "trial_log.py", "storage.py", "optuna_proposer.py"}


def test_the_sampler_does_not_know_experts_nor_the_ensemble_sampling():
    assert "meme.diffusion.ensemble" not in imported(ROOT / "meme" / "diffusion" / "sampler.py")
    assert "expert" not in (ROOT / "meme" / "diffusion" / "sampler.py").read_text().replace("experts exist", "")
    assert "meme.diffusion.sampler" not in imported(ROOT / "meme" / "diffusion" / "ensemble.py")


def test_search_spaces_import_without_torch():
    code = "import sys, search_spaces.splits, search_spaces.space; assert not {'torch', 'optuna', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_run_search_is_short():
    assert len((ROOT / "run_search.py").read_text().splitlines()) < 80
