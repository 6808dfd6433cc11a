# Every step of CI is one of these targets.
# SET names the tested versions in constraints/: cpu, for Python 3.11, whose torch is the CPU build, or
# gpu, for Python 3.12 and CUDA 13 (make setup SET=gpu PYTHON=python3.12); a .venv keeps its set.
VENV := .venv
SET ?= $(if $(wildcard $(VENV)/.ready-gpu),gpu,cpu)
OF_cpu := 3.11
OF_gpu := 3.12
EXTRAS_cpu := deepspeed,dali,onnx,dev,docs
EXTRAS_gpu := gpu,onnx,dev,docs
PYTHON ?= python3
READY := $(VENV)/.ready-$(SET)
PY := $(VENV)/bin/python
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export DS_ACCELERATOR := cpu

.PHONY: setup demo test test-long faults lint format bench gpu-check gpu-step site image clean

$(READY): constraints/$(SET).txt constraints/common.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] != "$(OF_$(SET))")' || \
	  { echo "make: constraints/$(SET).txt is for Python $(OF_$(SET)): make $(MAKECMDGOALS) SET=$(SET) PYTHON=python$(OF_$(SET))"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints/$(SET).txt \
	  -e '.[$(EXTRAS_$(SET))]'
	rm -f $(VENV)/.ready-* && touch $@

setup: $(READY)

demo: setup
	$(VENV)/bin/deepspeed --num_gpus 2 train.py --config configs/demo.yaml

# As many processes as there are cores; "python -m pytest FILE" is one.
test: setup lint
	$(PY) -m pytest -n auto --dist worksteal

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

# The pages with search and an API reference, in build/site; a warning is an error. Neither building nor
# reading them needs a network.
site: setup
	$(PY) -m sphinx -q -W --keep-going -c docs/site -d build/site-pages . build/site
	@echo "build/site/index.html"

# docs/container.md; BUILDER is any command that takes docker's "build" (make image BUILDER=podman).
BUILDER ?= docker
image:
	$(BUILDER) build --build-arg SET=$(SET) --build-arg PYTHON=$(OF_$(SET)) \
	  --build-arg COMMIT=$(shell git describe --always --exclude '*' --abbrev=12 --dirty=+) \
	  --tag mlip:$(SET) .

clean:
	rm -rf $(VENV) build dist *.egg-info docs/api
