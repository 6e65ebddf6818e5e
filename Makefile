# Everything a developer types. The environment lies in .venv; PYTHON chooses the interpreter that makes it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
seed ?= 0
out ?= runs/demo
scale ?=
# Test processes, of one thread each: the models are tiny.
workers ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast lint format types wheel clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(BIN)/depthkit: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("depthkit needs Python 3.11 or newer, this is %d.%d; try make PYTHON=python3.12 ..." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e '.[dev]'
	@touch $(BIN)/depthkit

setup: $(BIN)/depthkit  ## Make .venv with depthkit and the development tools

demo: setup  ## Run the whole recipe on a small procedural world (about 5 minutes on two cores)
	$(BIN)/depthkit demo seed=$(seed) out=$(out)$(if $(scale), scale=$(scale))

test: setup  ## Run all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(workers) -m 'not slurm'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slurm

test-fast: setup  ## Run the tests that take no more than a few seconds
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(workers) -m 'not slow'

lint: setup  ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup  ## Rewrite the code in the project's style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: setup  ## Check types
	$(BIN)/mypy

wheel: setup  ## Build the wheel into dist/
	$(BIN)/python -m build --wheel

clean:  ## Remove what was built; runs/ and data/ stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
