# Every target does the set-up that it needs; `make help` lists them.
# make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu   takes PyTorch's CPU wheels
PYTHON ?= python3
TORCH_INDEX ?=

BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test check fix results clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' Makefile

setup: $(STAMP)  ## create .venv with the pinned dependencies

$(STAMP): pyproject.toml constraints.txt scripts/setup.sh
	@PYTHON="$(PYTHON)" TORCH_INDEX="$(TORCH_INDEX)" scripts/setup.sh .venv
	@touch $@

demo: $(STAMP)  ## the main job on CPU: distil a tiny teacher into a tiny student
	$(BIN)/python launch.py

test: $(STAMP)  ## all tests
	$(BIN)/python -m pytest

check: $(STAMP)  ## lint, format and types; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

fix: $(STAMP)  ## repair what lint and format can repair
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

results: $(STAMP)  ## three seeds and the control runs into docs/results (about an hour on two cores)
	$(BIN)/python benchmarks/results.py

clean:  ## remove the environment and caches; runs and checkpoints stay
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis *.egg-info
