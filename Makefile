# From nothing but python3 (3.10 to 3.12):
#   make demo    train a small model on this machine and see what comes out
#   make demo-align  SFT, reward model, DPO, GRPO on a small task, before and after
#   make test    ruff, mypy, pytest
#   make test-full  the same with every layout, schedule and signal
#   make bench   every benchmark in full; writes docs/benchmarks.md
#   make lint    ruff and mypy alone
#   make clean   remove the environment and the caches; runs/ is kept
#   make help    this text
# Another interpreter: make PYTHON=python3.11 test. torch's CUDA or CPU build by choice: make MSLM_TORCH=cuda test.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export PYTHON
.DELETE_ON_ERROR:
.PHONY: demo demo-align test test-full bench lint clean environment help

demo: $(STAMP)
	$(BIN)/python examples/kjv/demo.py

demo-align: $(STAMP)
	$(BIN)/python -m examples.sorting.demo

# One compute thread in each process: the tests run several ranks on one machine.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

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
