# make search [BUDGET=50] [ARGS="--data PATH ..."], make test [PROCESSES=2], make test-slow, make check, make docs; each installs
# what it needs. make .venv is the installation for a search alone.

PYTHON ?= python3
BUDGET ?= 50
ARGS ?=
PROCESSES ?= 2
BIN := .venv/bin
# Modules are compiled when they are first imported: most never are.
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable

.PHONY: search test test-slow check docs .venv

search: .venv
	$(BIN)/python run_search.py --budget $(BUDGET) $(ARGS)

# Each process with files of its own, so that what the tests of one share is made once.
PYTEST = $(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist loadfile

test: .venv/developing
	$(PYTEST) -m 'not slow'

# Whole searches, killed processes, clusters: what CI runs after the others.
test-slow: .venv/developing
	$(PYTEST) -m slow

check: .venv/developing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Open docs/_build/index.html. A link that leads nowhere, or a name that is not there, is an error.
docs: .venv/documents
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs docs/_build

# Sphinx and its theme are for this target alone, and not installed before it.
.venv/documents: .venv/installed
	$(INSTALL) '.[docs]'
	touch $@

.venv/developing: .venv/installed
	$(INSTALL) '.[dev]'
	touch $@

.venv: .venv/installed

# What a search needs. The stamp is written last: an installation that broke off is repeated.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) .
	touch $@
