"""What an installation from a wheel has: an editable one hides a folder that was forgotten."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", reason="setuptools, which builds wheels, is not installed")

ROOT = Path(__file__).parent.parent
NAMES = ("meme", "meme_nas", "search_spaces")


def test_a_wheel_has_every_module_and_what_the_report_is_made_of(tmp_path):
    source = tmp_path / "source"  # a build leaves files beside what it builds
    for name in NAMES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "run_search.py"):
        shutil.copy(ROOT / name, source)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(source),
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(tmp_path),
    ]
    subprocess.run(command, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        held = set(packed.namelist())
        packed.extractall(tmp_path / "installed")
    wanted = {
        path for name in NAMES for path in (ROOT / name).rglob("*") if path.suffix in (".py", ".j2", ".css", ".js", ".typed")
    }
    assert {path.relative_to(ROOT).as_posix() for path in wanted} | {"run_search.py"} <= held
    code = "import meme.pipeline, meme_nas.run, run_search; print(meme.__file__, meme_nas.__file__, run_search.__file__)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    said = subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert all(str(tmp_path / "installed") in path for path in said.stdout.split())
