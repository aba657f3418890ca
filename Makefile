# Needs Python 3.11 or newer and make, nothing else. `make` lists the targets.

# The first interpreter that is new enough; or say `make demo PYTHON=/path/to/python3.12`.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
VENV ?= .venv
PIP_FLAGS ?=
DEMO ?= demo
RECIPE ?= simulations/recipes/digits-dirichlet.toml
# Two processes, each with whole files; PYTEST_FLAGS= for one process.
PYTEST_FLAGS ?= -n 2 --dist loadfile

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# What Flower and Ray would otherwise send out or look up.
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1
export RAY_USAGE_STATS_ENABLED := 0

.DEFAULT_GOAL := help
.PHONY: help install demo demo-network test check lint types imports test-all recipes compiled format docs clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(INSTALLED)  ## the environment in .venv, with Umbel and what develops it

$(INSTALLED): pyproject.toml
	@if [ -z "$(PYTHON)" ] || ! "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
		echo "Umbel needs Python 3.11 or newer; '$(PYTHON)' is not." >&2; \
		echo "Next: install one, then make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; fi
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot make virtual environments: its venv module is missing." >&2; \
		echo "Next: on Debian or Ubuntu, apt install python3-venv" >&2; exit 1; }
	@echo "Installing into $(VENV): a few minutes the first time, most of it PyTorch"
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) -e '.[dev]'
	@touch $@

demo: $(INSTALLED)  ## a federation of 20 clients learns to read digits, here, in seconds
	@mkdir -p $(DEMO)
	$(BIN)/umbel plot --split $(RECIPE) $(DEMO)/split.png
	$(BIN)/umbel simulate $(RECIPE) --store $(DEMO)/runs
	$(BIN)/umbel plot --store $(DEMO)/runs latest $(DEMO)/accuracy.png
	@echo
	@echo "who holds what:  $(DEMO)/split.png"
	@echo "accuracy:        $(DEMO)/accuracy.png"

demo-network: $(INSTALLED)  ## a server and three sites, as they are deployed, on this machine
	$(BIN)/umbel demo-network --folder $(DEMO)/network

test: $(INSTALLED)  ## the tests that take some ten minutes together
	$(BIN)/pytest $(PYTEST_FLAGS) -m "not slow and not flower and not gpu"

check: lint types imports test-all  ## everything that CI runs

lint: $(INSTALLED)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)  ## mypy, strict
	$(BIN)/mypy

imports: $(INSTALLED)  ## import-linter: imports go down only
	$(BIN)/lint-imports

test-all: $(INSTALLED)  ## every test that can run here
	$(BIN)/pytest $(PYTEST_FLAGS)

recipes: $(INSTALLED)  ## every recipe whole, held to the figure that it states; ten minutes
	$(BIN)/pytest $(PYTEST_FLAGS) -m "recipes or slow" tests/simulations/test_recipes.py

compiled: $(INSTALLED)  ## every kernel with its steps compiled against the plain engine; three minutes
	$(BIN)/pytest $(PYTEST_FLAGS) -m compiled tests/simulations

format: $(INSTALLED)  ## rewrites the code in the one format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)  ## rewrites the reference pages from the code
	$(BIN)/python -m umbel.simulations.soundness
	$(BIN)/python docs/generate.py

clean:  ## removes the environment and all that was built
	rm -rf $(VENV) $(DEMO) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
