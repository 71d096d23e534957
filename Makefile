# `make quickstart` trains a small model on this machine; `make test` runs the tests. Both install what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

export OMP_NUM_THREADS ?= 1

.PHONY: install quickstart test test-all test-engine lint docs

install: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: $(INSTALLED)
	$(BIN)/python examples/quickstart.py

test: $(INSTALLED)
	$(BIN)/pytest -m "not slow and not gpu" -n 2 tests/unit
	$(BIN)/pytest -m "not slow and not gpu" --ignore tests/unit

test-all: $(INSTALLED)
	$(BIN)/pytest -n 2 tests/unit
	$(BIN)/pytest --ignore tests/unit

# The same tests on another Python, and so on the megatron-core that it gets: `make test-engine PYTHON=python3.12`.
test-engine:
	$(MAKE) test PYTHON=$(PYTHON) VENV=.venv-$(notdir $(PYTHON))

# The pages as a site, in site/; a dead link is an error.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tests.any_count
