"""Broken and hostile files get a clear sentence or are passed over, whatever reads them; ``benchmarks/fuzz.py`` tries more."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from fuzz import NEVER_REFUSED, READERS, Tally, _try, fuzz

from meme.errors import UserError

INPUTS = int(os.environ.get("MEME_FUZZ_INPUTS", "300"))  # for each reader


@pytest.mark.parametrize("reader", READERS)
def test_only_clear_errors_come_out(reader):
    tally = fuzz(reader, INPUTS)
    assert tally.errors == {}
    assert tally.inputs == INPUTS
    if reader in NEVER_REFUSED:
        assert tally.refused == 0
    else:
        assert 0 < tally.refused < INPUTS  # some files are damaged, some are not


def read_badly(content):
    if content:
        raise KeyError(content)
    raise UserError("empty")


def test_anything_but_a_user_error_is_counted():
    tally = Tally()
    _try(read_badly, "x", tally)
    _try(read_badly, "", tally)
    assert tally.as_json() | {"slowest_seconds": 0} == {"inputs": 2, "refused": 1, "errors": 1, "slowest_seconds": 0}
    assert next(iter(tally.errors)).startswith("KeyError")


def test_the_command_prints_one_object_of_figures():
    command = [sys.executable, str(ROOT / "benchmarks" / "fuzz.py"), "--inputs", "20", "--readers", "config", "images"]
    surroundings = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=surroundings, check=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    assert {reader: found["inputs"] for reader, found in figures.items()} == {"config": 20, "images": 20}
