# Every target does the set-up that it needs; `make help` lists them.
# make results JOBS=2                                           two runs at a time, of one thread each
# make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu   takes PyTorch's CPU wheels
PYTHON ?= python3
TORCH_INDEX ?=
JOBS ?= 1

BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-ray test-sglang test-slurm check fix results performance clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile

setup: $(STAMP)  ## create .venv with the pinned dependencies

$(STAMP): pyproject.toml constraints.txt scripts/setup.sh
	@PYTHON="$(PYTHON)" TORCH_INDEX="$(TORCH_INDEX)" scripts/setup.sh .venv
	@touch $@

demo: $(STAMP)  ## the main job on CPU: distil a tiny teacher into a tiny student
	$(BIN)/python launch.py

test: $(STAMP)  ## all tests but those below, three files at a time
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test-ray: $(STAMP)  ## tests that start clusters of Ray: layouts, deaths and replacements, jobs, nodes
	$(BIN)/python -m pytest -m ray tests/cluster tests/megatron tests/runs

test-sglang: $(STAMP)  ## tests against a real SGLang server on CPU; builds its environment once (3 GB)
	OPD_SGLANG_PYTHON="$$(PYTHON="$(PYTHON)" TORCH_INDEX="$(TORCH_INDEX)" scripts/sglang_cpu/build.sh)" \
		$(BIN)/python -m pytest -m sglang -s tests/sglang

test-slurm: $(STAMP)  ## tests of jobs on a SLURM cluster of their own; needs the packages slurm-wlm and munge
	$(BIN)/python -m pytest -m slurm tests/slurm

check: $(STAMP)  ## lint, format and types; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

fix: $(STAMP)  ## repair what lint and format can repair
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

results: $(STAMP)  ## the runs of docs/results that need nothing but a CPU (about an hour on two cores, JOBS=2 the faster)
	$(BIN)/python -m benchmarks.results --jobs $(JOBS)
	$(BIN)/python -m benchmarks.estimators --jobs $(JOBS)
	$(BIN)/python -m benchmarks.divergences --jobs $(JOBS)
	$(BIN)/python -m benchmarks.sweep

performance: $(STAMP)  ## what a step costs against its floors, into docs/performance.md (ten minutes on two calm cores)
	$(BIN)/python -m benchmarks.performance --measure

clean:  ## remove the environment and caches; runs and checkpoints stay
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis *.egg-info
