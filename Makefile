# `make demo` and `make test` set everything up by themselves, and only when needed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: demo test test-long test-ops lint torture bench-ingest bench-step bench-scale bench-convert clean help

help:
	@echo "make demo            train a tiny model on generated videos, end to end, with a restart in the middle"
	@echo "make test            lint, type check, and every test but those of the next two"
	@echo "make test-long       those: lost nodes, hanging ranks, full disks, a hundred epochs"
	@echo "make test-ops        cluster files and monitoring, with their own checkers (installs about 1 GB into build/)"
	@echo "make torture         kill a run KILLS=20 times at moments drawn from SEED=0, and compare it with an undisturbed one"
	@echo "make bench-ingest   video loaders side by side (ARGS='--clips 2000 --rounds 3 --json FILE')"
	@echo "make bench-step     the training step: the present script's, ours, ours compiled (ARGS='--precision fp32,bf16')"
	@echo "make bench-scale    1, 2 and 4 ranks side by side, against a prediction (ARGS='--paper': 1,000 GPUs, on paper)"
	@echo "make bench-convert  a real 1 GB shard of the earlier trainer: seconds, memory, bytes"
	@echo "make clean          remove what the targets made (the environment too)"

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,vae]'
	touch $(READY)

demo: $(READY)
	$(BIN)/python -m ray_jobs.demo

lint: $(READY)
	$(BIN)/ruff check fvlm ray_jobs tests
	$(BIN)/ruff format --check fvlm ray_jobs tests
	$(BIN)/mypy

# Two at a time: most of them wait for Ray most of the time.
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-long: $(READY)
	$(BIN)/python -m pytest -m long

test-ops: $(READY)
	$(BIN)/python -m tests.ops.tools
	$(BIN)/python -m pytest -m ops

KILLS ?= 20
SEED ?= 0
torture: $(READY)
	$(BIN)/python tests/torture --kills $(KILLS) --seed $(SEED) $(ARGS)

bench-ingest: $(READY)
	$(BIN)/python tests/benchmarks/ingest $(ARGS)

bench-step: $(READY)
	$(BIN)/python tests/benchmarks/step.py $(ARGS)

bench-scale: $(READY)
	$(BIN)/python tests/benchmarks/scale $(ARGS)

bench-convert: $(READY)
	$(BIN)/python tests/benchmarks/convert.py $(ARGS)

clean:
	rm -rf $(VENV) build demo-out *.egg-info .mypy_cache .ruff_cache
