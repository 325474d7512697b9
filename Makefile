# Everything runs in .venv, made here from python3; needs a C++ compiler and make.
#   make train      train the default job        make test       lint, static GPU checks, all tests
#   make build      recompile csrc/ in place     make test-full  the slow tests as well
# TORCH_INDEX=<url> takes torch from another index, for instance one with its smaller CPU build.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/fastgrpo.stamp
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
EXTRAS := train,integrations,bench,report,math,log,test
WORKERS ?= 2

# One thread per process: two pytest workers and their OpenMP pools would otherwise fight for the same cores.
export OMP_NUM_THREADS ?= 1

.PHONY: env build train test test-full lint static clean
.DEFAULT_GOAL := env

env: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv .venv

# torch comes first and alone, so that nothing that merely depends on it chooses another version or build.
$(STAMP): pyproject.toml setup.py constraints.txt Makefile | $(BIN)/python
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) 'setuptools>=77' wheel ninja
	$(PIP) --no-build-isolation --editable '.[$(EXTRAS)]'
	@touch $@

# Compiles only what has changed. A machine without a compiler: FASTGRPO_REQUIRE_EXT=0.
build: $(STAMP)
	@FASTGRPO_REQUIRE_EXT=$${FASTGRPO_REQUIRE_EXT:-1} $(BIN)/python setup.py --quiet build_ext --inplace

train: $(STAMP)
	$(BIN)/fastgrpo train

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build dist *.egg-info fastgrpo/*.so .pytest_cache .mypy_cache .ruff_cache
