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


# What the modules of a folder may import of ours, in the order in which data goes through them. ``meme.errors`` is everybody's.
METHOD = {
    "support": set(),
    "config": {"support"},
    "data": {"support", "config"},
    "network": {"support", "config"},
    "diffusion": {"support", "config", "network"},
    "training": {"support", "config", "data", "network", "diffusion"},
    "scoring": {"support", "config", "data", "network", "diffusion"},
    "pipeline": {"support", "config", "data", "network", "diffusion", "training", "scoring"},
    "diffusers_model": {"support", "config", "data", "network", "diffusion"},
    "export": {"support", "config", "data", "diffusion", "training", "scoring", "pipeline", "diffusers_model"},
    "analysis": {"support", "config", "network", "diffusion"},
    "paper": {"support", "config", "data", "diffusion", "training", "scoring", "pipeline"},
}
SEARCH = {
    "settings": set(),
    "record": set(),
    "surrogate": {"settings"},
    "strategies": {"settings", "record", "surrogate"},
    "engines": {"settings", "record"},
    "worker": {"record"},
    "rescoring": {"settings", "record", "strategies"},
    "report": {"settings", "record", "rescoring"},
    "results": {"settings", "record", "rescoring", "report"},
}


def room(module: str, package: str) -> str | None:
    """The folder of ``package`` that a module lies in, or the module itself where it lies beside the folders."""
    top, _, rest = module.partition(".")
    return rest.split(".")[0] if top == package and rest else None


def of_rooms(package: str, rooms: dict[str, set[str]]) -> list:
    paths = {path: path.relative_to(ROOT / package).parts[0].removesuffix(".py") for path in files(package)}
    return [
        pytest.param(path, rooms[name], id=path.relative_to(ROOT).as_posix()) for path, name in paths.items() if name in rooms
    ]


@pytest.mark.parametrize("path, allowed", of_rooms("meme", METHOD))
def test_each_folder_of_the_method_imports_what_comes_before_it(path, allowed):
    own = path.relative_to(ROOT / "meme").parts[0].removesuffix(".py")
    found = {room(module, "meme") for module in imported(path)} - {None, own, "errors"}
    assert found <= allowed


@pytest.mark.parametrize("path, allowed", of_rooms("meme_nas", SEARCH))
def test_each_folder_of_the_search_imports_what_comes_before_it(path, allowed):
    own = path.relative_to(ROOT / "meme_nas").parts[0].removesuffix(".py")
    assert {room(module, "meme_nas") for module in imported(path)} - {None, own} <= allowed


def test_every_folder_has_its_wall():
    for package, rooms in (("meme", METHOD), ("meme_nas", SEARCH)):
        folders = {path.name for path in (ROOT / package).iterdir() if path.is_dir() and (path / "__init__.py").exists()}
        assert folders - {"cli"} <= rooms.keys()


def test_the_map_names_every_module():
    lines = (ROOT / "docs" / "architecture.md").read_text().splitlines()
    for package in ("meme", "meme_nas"):
        for path in files(package):
            parts = path.relative_to(ROOT / package).with_suffix("").parts
            if len(parts) == 2 and parts[1] != "__init__":
                assert any(f"`{parts[1]}`" in line for line in lines if line.startswith(f"| `{parts[0]}/` |")), path


@pytest.mark.parametrize("path", files("meme"), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_method_knows_nothing_of_the_search(path):
    assert not tops(path) & {"optuna", "ray", "meme_nas", "search_spaces"}


@pytest.mark.parametrize("path", files("search_spaces"), ids=lambda path: path.name)
def test_search_spaces_are_data(path):
    assert not tops(path) & {"torch", "optuna", "ray", "meme_nas"}
    assert {room(module, "meme") for module in imported(path)} <= {None, "config", "errors"}


def test_a_worker_knows_neither_optuna_nor_a_database():
    """Asked in a process of its own: what it imports may import more."""
    unwanted = "{'optuna', 'sqlalchemy', 'meme_nas.strategies', 'meme_nas.report'}"
    for module in ("meme_nas.worker.objective", "meme_nas.engines.local"):
        code = f"import sys, {module}; found = {unwanted} & set(sys.modules); assert not found, found"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_ray_stays_in_the_engines_files():
    users = [path for package in OURS for path in files(package) if "ray" in tops(path)]
    assert {path.relative_to(ROOT).as_posix() for path in users} == {
        f"meme_nas/engines/{name}.py" for name in ("ray", "ray_cluster", "ray_training")
    }


def test_optuna_stays_in_the_record_and_the_proposer():
    users = {path.relative_to(ROOT).as_posix() for package in OURS for path in files(package) if "optuna" in tops(path)}
    record = {f"meme_nas/record/{name}.py" for name in ("study", "trial_log", "storage")}
    assert users == record | {"meme_nas/strategies/optuna_proposer.py"}


def test_the_sampler_does_not_know_experts_nor_the_ensemble_sampling():
    assert "meme.diffusion.ensemble" not in imported(ROOT / "meme" / "diffusion" / "sampler.py")
    assert "expert" not in (ROOT / "meme" / "diffusion" / "sampler.py").read_text()
    assert "meme.diffusion.sampler" not in imported(ROOT / "meme" / "diffusion" / "ensemble.py")


@pytest.mark.parametrize(
    "modules, absent",
    [
        ("meme.config.presets, meme.cli.verbs, meme_nas.settings, run_search", {"torch"}),  # or --help would take seconds
        ("search_spaces.space", {"torch", "optuna", "ray"}),
        ("toys", {"torch", "optuna"}),  # which every worker imports that a test starts
    ],
)
def test_what_is_imported_often_imports_no_large_library(modules, absent):
    code = f"import sys, {modules}; found = {absent!r} & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_run_search_is_short():
    assert len((ROOT / "run_search.py").read_text().splitlines()) < 80
