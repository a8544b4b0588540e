# From nothing but python3 (3.10 to 3.12):
#   make demo    train a small model on this machine and see what comes out
#   make demo-align  SFT, reward model, DPO, GRPO on a small task, before and after
#   make test    ruff, mypy, pytest
#   make test-full  the same with every layout, schedule and signal
#   make test-cluster  jobs on a real Slurm of three nodes on this machine, mpirun, torchrun; installs Slurm (root, apt)
#   make bench   every benchmark in full; writes docs/benchmarks.md
#   make lint    ruff and mypy alone
#   make clean   remove the environment and the caches; runs/ is kept
#   make help    this text
# Another interpreter: make PYTHON=python3.11 test. torch's CUDA or CPU build by choice: make MSLM_TORCH=cuda test.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CLUSTER ?= tests/cluster

export PYTHON
.DELETE_ON_ERROR:
.PHONY: demo demo-align test test-full test-cluster bench lint clean environment help

demo: $(STAMP)
	$(BIN)/python examples/kjv/demo.py

demo-align: $(STAMP)
	$(BIN)/python -m examples.sorting.demo

# One compute thread in each process: the tests of dist and cluster run several ranks on one machine, one test at a time.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit -n 2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/dist tests/gpu $(CLUSTER)

# Part of `make test` too where Slurm is installed; `make test CLUSTER=` leaves it out.
test-cluster: $(STAMP)
	@if command -v slurmctld > /dev/null && command -v munged > /dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge; \
	else echo "Slurm is not installed, and installing it needs root and apt: its tests are skipped."; fi
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/cluster -rs

bench: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench/run_all.py

test-full: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --full

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy -p megatron_slm

environment: $(STAMP)

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' $(firstword $(MAKEFILE_LIST))

$(STAMP): setup.py constraints.txt tools/setup_environment.sh
	tools/setup_environment.sh $(VENV)
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
