# Everything a newcomer or a developer needs. Each target makes .venv and installs what it needs, once.
#   make quickstart          make test PYTHON=python3.12          make lint

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
ARGS ?=
# One process per core, one thread each: threads of several test processes would wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $$(getconf _NPROCESSORS_ONLN)

.PHONY: help quickstart test test-all test-versions lint docs
.DEFAULT_GOAL := help

help:  ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: $(VENV)/.graft-run  ## see adapters learn on the small base that ships with Graft (no download of models)
	$(BIN)/graft quickstart $(ARGS)

test: $(VENV)/.graft-dev  ## run the test suite (ARGS="-k name" to choose)
	$(PYTEST) $(ARGS)

test-all: $(VENV)/.graft-dev  ## run the slow tests too, and the GPU tests where there is a GPU
	$(PYTEST) -m "slow or not slow" $(ARGS)

# With TRANSFORMERS or TORCH: that pair alone, the other as pinned. Needs no .venv: each has an environment of its own.
pinned = $(shell sed -n 's/^$(1)==//p' constraints.txt)
test-versions:  ## test the oldest and newest releases allowed, or one pair: TRANSFORMERS=5.24.0 TORCH=2.13.0
ifneq ($(TRANSFORMERS)$(TORCH),)
	PYTHON=$(PYTHON) ARGS="$(ARGS)" tests/versions/try.sh pair $(or $(TRANSFORMERS),$(call pinned,transformers)) $(or $(TORCH),$(call pinned,torch))
else
	PYTHON=$(PYTHON) ARGS="$(ARGS)" tests/versions/try.sh floors
	PYTHON=$(PYTHON) ARGS="$(ARGS)" tests/versions/try.sh newest
endif

lint: $(VENV)/.graft-dev  ## style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.graft-docs  ## build the documentation into site/; a broken link is an error
	$(BIN)/zensical build --clean --strict

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Graft needs Python 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
	       "Name another one, for example: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "'$(PYTHON)' cannot make virtual environments. On Debian or Ubuntu: apt install python3-venv" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# The pinned torch comes first, so that nothing else can choose its version.
$(VENV)/.graft-run: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing Graft into $(VENV) (once; some minutes on a slow network)"
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) --editable '.[report]'
	@touch $@

$(VENV)/.graft-dev: $(VENV)/.graft-run
	$(PIP) --editable '.[dev,report,eval,search,serve]'
	@touch $@

# The reference is read from the source, so the site needs neither torch nor Graft.
$(VENV)/.graft-docs: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) 'zensical>=0.0.73' 'mkdocstrings-python>=2' 'ruff>=0.13'
	@touch $@
