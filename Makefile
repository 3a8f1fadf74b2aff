# Every verb makes its own virtual environment first and installs what is missing: nothing has to be done by hand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help audit test lint check bench clean

help:
	@echo "make audit   audit the embedded model: a real model with shallow alignment, a report in a few minutes"
	@echo "make test    run the tests"
	@echo "make check   lint, types and the tests"
	@echo "make bench   time the audit's parts against plain transformers, side by side"

$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (once; see $(VENV)/setup.log)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python scripts/setup_environment.py $(VENV)/setup.log
	@touch $@

audit: $(READY)
	@$(BIN)/deepalign audit testbed:shallow --base testbed:base --limit 40

# One process for each core, each on one thread: threads of several processes on the same cores wait for one another.
test: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

check: lint test

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(READY)
	@$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache
