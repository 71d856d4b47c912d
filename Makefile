# make search [BUDGET=50] [ARGS="--data PATH ..."], make test, make check; make .venv is the installation alone.

PYTHON ?= python3
BUDGET ?= 50
ARGS ?=
BIN := .venv/bin

.PHONY: search test check .venv

search: .venv
	$(BIN)/python run_search.py --budget $(BUDGET) $(ARGS)

test: .venv
	$(BIN)/python -m pytest

check: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv: .venv/installed

# The stamp is written last: an installation that broke off is repeated.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@
