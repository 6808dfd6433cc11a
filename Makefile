# Every step of CI is one of these targets. PYTHON must be 3.11 for the CPU build of torch.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export DS_ACCELERATOR := cpu

.PHONY: setup demo test test-long faults lint format bench gpu-check gpu-step clean

$(VENV)/.ready: constraints/cpu.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "make: $(PYTHON) is not Python 3.11, which constraints/cpu.txt is for: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints/cpu.txt \
	  -e '.[deepspeed,dali,dev]'
	touch $@

setup: $(VENV)/.ready

demo: setup
	$(VENV)/bin/deepspeed --num_gpus 2 train.py --config configs/demo.yaml

test: setup lint
	$(PY) -m pytest

test-long: setup
	$(PY) -m pytest -m 'long and not gpu'

# Kills, hangs, damage, bad numbers, elastic resumes: at most 60 minutes on 2 cores; then the table.
faults: setup
	$(PY) benchmarks/bench_reliability.py --run

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# One NVIDIA GPU with torch, triton, numpy and pytest in the python3 at hand; no .venv.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py

# The same for the whole training step; needs what docs/performance.md lists.
gpu-step:
	$(PYTHON) benchmarks/gpu_check.py --part step

bench: setup
	$(PY) benchmarks/bench_kernels.py

clean:
	rm -rf $(VENV) build dist *.egg-info runs
