# `make demo` and `make test` each do everything that a fresh machine with Python and make needs.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable

.PHONY: demo test test-all faults upstream release-check lint venv clean

demo: venv
	$(BIN)/hfgpt train demo --resume
	$(BIN)/hfgpt generate out/demo "The file object" --max-new-tokens 60 --seed 1

test: lint
	$(BIN)/pytest -n 2 --dist worksteal

test-all: test
	$(BIN)/pytest -n 2 --dist worksteal -m 'slow and not hub and not gpu'

# What a run survives, and what a push and a pull do, counted; about half an hour.
faults: .venv/tested
	$(BIN)/python tests/training/faults.py
	HF_HUB_VERBOSITY=error $(BIN)/python tests/hub/hub_faults.py

# transformers' own tests of a model, from its source distribution on PyPI, on its GPT-2 and on hfgpt.
upstream: .venv/tested
	$(BIN)/python tests/upstream/fetch.py .upstream
	PYTHONPATH=.upstream HF_HUB_OFFLINE=1 $(BIN)/pytest -n 2 -o addopts= -o filterwarnings=ignore tests/upstream/test_mixins.py

lint: .venv/tested
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# The package as it would be published: built, looked into, and tried in a new environment. Needs PyPI; ten minutes.
release-check:
	rm -rf dist
	$(PYTHON) tests/release_check.py dist $(FIRST)

# What a run needs; the checks need more, and add it to the same environment.
venv: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) .
	touch $@

.venv/tested: .venv/installed
	$(INSTALL) ".[test]"
	touch $@

clean:
	rm -rf .venv .upstream out build dist .mypy_cache .pytest_cache .ruff_cache
