# Everything happens in .venv, made here from python3; a C++ compiler and make are the only other needs.
#
#   make train      train the default job                 make build      recompile what changed in csrc/
#   make test       lint, static GPU checks, all tests    make test-full  the slow tests as well
#   make bench      every provider on this machine (BENCH="--quick" for a minute); results in runs/bench
#   make gpu-check  proof on a machine with an NVIDIA GPU, in 9 minutes (GPU_CHECK=--dry-run rehearses on a CPU)
#   make faults     400 kills, disk faults, damage, dead ranks    make soak   an hour of training under observation (SOAK_S)
#   make learning   every algorithm on the default job, three seeds each (an hour and a half); results in docs/learning.md
#   make fuzz       100,000 random cases against float64 (FUZZ_SEED)    make mutants   changes one token, 120 times: do tests notice?
#   make reliability  every test behind docs/reliability.md, slow ones too, and the page
#   make callgrind  instruction counts of the CPU kernels against the committed baseline
#
# TORCH_INDEX=<url>  takes torch from another index, for instance one with its smaller CPU build
# WORKERS=<n>        pytest processes (2)

PYTHON ?= python3
WORKERS ?= 2
SOAK_S ?= 3600
FUZZ_SEED ?= $(shell date +%Y%m%d)
MUTANTS := reference:25 host:25 linear:30 triton:20 cpu:20

BIN := .venv/bin
STAMP := .venv/fastgrpo.stamp
EXTRAS := train,integrations,bench,report,math,log,test
PIP := $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadgroup --durations=20

# One thread per process: the workers and their OpenMP pools would fight for the same cores, and idle threads would spin.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := env
.PHONY: env build train test test-full lint static pytest pytest-interpreter bench gpu-check callgrind learning faults soak fuzz mutants reliability clean

env: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv .venv

# torch comes first and alone, so that nothing that merely depends on it chooses another version or build.
$(STAMP): pyproject.toml setup.py constraints.txt | $(BIN)/python
	@echo 'fastgrpo: installing torch (TORCH_INDEX=<url> takes it from another index)'
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@echo 'fastgrpo: installing the libraries and compiling the kernels (a few minutes the first time)'
	@$(PIP) --quiet 'setuptools>=77' wheel ninja
	@$(PIP) --quiet --no-build-isolation --editable '.[$(EXTRAS)]'
	@touch $@

# Without a compiler: FASTGRPO_REQUIRE_EXT=0 make ...
build: $(STAMP)
	@FASTGRPO_REQUIRE_EXT=$${FASTGRPO_REQUIRE_EXT:-1} $(BIN)/python setup.py --quiet build_ext --inplace

train: $(STAMP)
	$(BIN)/fastgrpo train

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Compiles every kernel for GPUs that need not be here: registers, spills, instructions per element.
static: build
	$(if $(wildcard benchmarks/static_check.py),$(BIN)/python -m benchmarks.static_check)

pytest: build
	$(PYTEST) $(SELECT)

# A process of its own: whether Triton interprets is decided when its functions are decorated.
pytest-interpreter: build
	TRITON_INTERPRET=1 $(PYTEST) $(SELECT) tests/interpreter

test: lint static pytest pytest-interpreter

test-full: SELECT = -m "slow or not slow"
test-full: test

bench: build
	$(BIN)/fastgrpo bench --out runs/bench $(BENCH)

# The script takes the python of .venv if there is one, else python3: PYTHON=... says otherwise.
gpu-check:
	benchmarks/gpu_check.sh $(GPU_CHECK)

# Exit code 77: nothing to count with, said loudly.
callgrind: build
	$(BIN)/python -m benchmarks.callgrind_gate || [ $$? -eq 77 ]

learning: build
	$(BIN)/python -m benchmarks.learning
	$(BIN)/python -m benchmarks.readme_tables
	$(BIN)/python docs/generate_reliability.py

# One process: the kills are timed, and the tests fork.
faults: build
	FAULTS_JSON=benchmarks/results/faults.json $(BIN)/python -m pytest -m "slow or not slow" --durations=20 tests/trainer_faults
	$(BIN)/python -m benchmarks.readme_tables

soak: build
	$(BIN)/python -m tests.trainer_faults.soak --seconds $(SOAK_S) --out benchmarks/results/soak.json
	$(BIN)/python -m benchmarks.readme_tables
	$(BIN)/python docs/generate_reliability.py

fuzz: build
	$(BIN)/python -m tests.tools.fuzz --cases 100000 --seed $(FUZZ_SEED) --output benchmarks/results/fuzz.json
	$(BIN)/python docs/generate_reliability.py

# On a copy of the last commit; an hour or more.
mutants: build
	for group in $(MUTANTS); do $(BIN)/python -m tests.tools.mutants --group $${group%:*} --count $${group#*:} || exit 1; done
	$(BIN)/python -m tests.tools.mutants --summary benchmarks/results/mutants.json
	$(BIN)/python docs/generate_reliability.py

reliability: build
	$(BIN)/python docs/generate_reliability.py --run

clean:
	rm -rf build dist *.egg-info fastgrpo/*.so .mypy_cache .pytest_cache .ruff_cache
