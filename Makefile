# `make demo` and `make test` each do everything that a fresh machine with Python and make needs.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable
PYTEST := pytest -n 2 --dist worksteal

# The oldest transformers that pyproject.toml allows, and the tests that depend on its version most.
FLOOR := $(shell sed -n 's/.*"transformers>=\([0-9.]*\).*/\1/p' pyproject.toml)
CORE := tests/test_modeling.py tests/test_registration.py tests/generation tests/citizen \
	tests/compat tests/training/test_loop.py tests/training/test_checkpoint.py

.PHONY: demo test test-all test-floor test-newest test-oldest faults gpu upstream release-check lint venv clean

demo: venv
	$(BIN)/hfgpt train demo --resume
	$(BIN)/hfgpt generate out/demo "The file object" --max-new-tokens 60 --seed 1

test: lint
	$(BIN)/$(PYTEST)

test-all: test test-floor
	$(BIN)/$(PYTEST) -m 'slow and not hub and not gpu'

# transformers alone at its oldest.
test-floor: .venv-floor/tested
	.venv-floor/bin/python -m $(PYTEST) $(CORE)

# All direct dependencies at the newest and at the oldest that pyproject.toml allows; versions.md says what came.
test-newest:
	$(PYTHON) tests/ranges.py newest .venv-newest
	.venv-newest/bin/pytest -n 2 --dist worksteal

test-oldest:
	$(PYTHON) tests/ranges.py oldest .venv-oldest
	.venv-oldest/bin/pytest -n 2 --dist worksteal -W ignore::DeprecationWarning

# What a run survives, and what a push and a pull do, counted; about half an hour.
faults: .venv/tested
	$(BIN)/python tests/training/faults.py
	HF_HUB_VERBOSITY=error $(BIN)/python tests/hub/hub_faults.py

# What needs a GPU, tests and benchmark; ten minutes, no network. `NANOGPT` is a checkout to measure beside. Takes the
# environment of `make test`, or, where there is none, whatever PYTHON has.
NANOGPT ?=
# Not all at once: each process keeps its memory while the others work.
AGAINST ?= $(if $(NANOGPT),nanogpt=$(NANOGPT),transformers),hfgpt-train,trainer

gpu:
	tests/gpu.sh $(firstword $(wildcard $(BIN)/python) $(PYTHON)) $(AGAINST) $(REHEARSE)

# transformers' own tests of a model, from its source distribution on PyPI, on its GPT-2 and on hfgpt: those of the
# version that we develop on, and those of the oldest.
upstream: upstream-.venv upstream-.venv-floor

upstream-%: %/tested
	$*/bin/python tests/upstream/fetch.py .upstream/$*
	PYTHONPATH=.upstream/$* HF_HUB_OFFLINE=1 $*/bin/python -m $(PYTEST) -o addopts= -o filterwarnings=default --disable-warnings \
		tests/upstream/test_mixins.py

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

# Beside .venv's packages, all of which it sees, an older transformers of its own.
.venv-floor/tested: .venv/tested
	$(PYTHON) -m venv --clear .venv-floor
	packages=$$(ls -d $(CURDIR)/.venv/lib/python*/site-packages) && \
	echo "import site; site.addsitedir('$$packages')" > $$(ls -d .venv-floor/lib/python*/site-packages)/beside.pth
	.venv-floor/bin/python -m pip install --quiet transformers==$(FLOOR)
	touch $@

clean:
	rm -rf .venv .venv-* .upstream out build dist .mypy_cache .pytest_cache .ruff_cache
