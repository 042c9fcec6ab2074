# Each target makes .venv with pip itself and installs what it needs; only python3.11+, git and make must be there.
# GPU machines: `make TORCH_CONSTRAINTS= ...` leaves torch's version to pip.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	if $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then echo $$p; break; fi; done)
VENV ?= .venv
BIN := $(VENV)/bin
TORCH_CONSTRAINTS ?= -c requirements/cpu.txt
PIP := $(BIN)/pip --disable-pip-version-check --quiet
OLD_OPENAI := $(VENV)/openai-2.8.0
TRL := $(VENV)/trl
SGLANG := .venv-sglang
PEERS := .venv-peers

# OpenMP threads that wait sleep soon instead of spinning for long (see backends/threads.py)
export GOMP_SPINCOUNT ?= 1000

.PHONY: demo demo-sglang test lint bench bench-rollouts bench-trainer format sglang-cpu clean
.DELETE_ON_ERROR:

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "gym-sdk needs Python 3.11, 3.12 or 3.13"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch goes first, so that no other package draws in a build with CUDA
$(VENV)/.demo: pyproject.toml requirements/cpu.txt | $(BIN)/python
	$(PIP) install $(TORCH_CONSTRAINTS) torch
	$(PIP) install $(TORCH_CONSTRAINTS) -e ".[demo]"
	@touch $@

# trl: its chat templates, losses and trainer are compared with ours. Without what they ask for, which the SDK has or
# their data types don't need
$(VENV)/.dev: $(VENV)/.demo
	$(PIP) install $(TORCH_CONSTRAINTS) -e ".[dev]"
	$(PIP) install --target $(OLD_OPENAI) --upgrade openai==2.8.0
	$(PIP) install --target $(TRL) --upgrade --no-deps trl==1.16.0 tinker==0.38.0
	@touch $@

# the whole chain on this machine: warm start, server, rollouts, GRPO, weight sync, learning curve
demo: $(VENV)/.demo
	$(BIN)/gym-sdk demo $(DEMO_ARGS)

# the same, with the real SGLang behind the server
demo-sglang: $(VENV)/.demo $(SGLANG)/.done
	$(BIN)/gym-sdk demo --backend sglang --sglang-python $(SGLANG)/bin/python $(DEMO_ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(TEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/engine.py

# peers that don't go with the SDK's own environment
$(PEERS)/.done: requirements/peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip --disable-pip-version-check --quiet install -r requirements/peers.txt
	@touch $@

bench-trainer: $(VENV)/.dev
	$(BIN)/python benchmarks/trainer.py $(BENCH_ARGS)

bench-rollouts: $(VENV)/.dev $(PEERS)/.done
	$(BIN)/python benchmarks/rollouts.py $(BENCH_ARGS)

# the real SGLang on a machine without a GPU, in an environment of its own: pinned, with stand-ins for its kernels
$(SGLANG)/.done: requirements/sglang-cpu.txt $(wildcard requirements/sglang-cpu/*)
	$(PYTHON) -m venv $(SGLANG)
	$(SGLANG)/bin/pip --disable-pip-version-check --quiet install --no-deps -r requirements/sglang-cpu.txt
	cp requirements/sglang-cpu/*.py requirements/sglang-cpu/*.pth \
		"$$($(SGLANG)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	$(SGLANG)/bin/python -c 'import torch; assert torch.version.cuda is None, "torch must be a build without CUDA"'
	@touch $@

sglang-cpu: $(SGLANG)/.done

clean:
	rm -rf $(VENV) $(SGLANG) $(PEERS) build dist runs *.egg-info
