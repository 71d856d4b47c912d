"""Broken and hostile files get a clear sentence or are passed over, whatever reads them; ``benchmarks/fuzz.py`` tries more."""

import json
import os
import sys

import pytest
from fuzz import NEVER_REFUSED, READERS, Tally, _try, fuzz, main

from meme.errors import UserError

INPUTS = int(os.environ.get("MEME_FUZZ_INPUTS", "150"))  # for each reader


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


def test_the_command_prints_one_object_of_figures(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "--inputs", "20", "--readers", "config", "images"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {reader: found["inputs"] for reader, found in figures.items()} == {"config": 20, "images": 20}
