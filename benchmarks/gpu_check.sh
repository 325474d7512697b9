#!/usr/bin/env bash
# Proof on a machine with one NVIDIA GPU, in under 9 minutes and without a network.
#
#   benchmarks/gpu_check.sh [OUT]             build, tests, sanitizers, ceilings, open questions, benchmarks in order of value
#   benchmarks/gpu_check.sh [OUT] --dry-run   the same flow on a CPU: Triton's interpreter, tiny sizes, under a minute
#
# OUT (benchmarks/results/gpu_check) gets a log per stage, results.jsonl and summary.md. Each stage has a time budget of
# its own and may fail without stopping the next; the exit code is 1 if any failed. Environment:
#   PYTHON            the interpreter that has torch (.venv/bin/python if it is there, else python3)
#   FASTGRPO_WHEELS   a folder of wheels (trl, liger-kernel, pytest, ...) to install first, without their dependencies
#   ONLY              the stages to run, for instance ONLY="build tests"
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=benchmarks/results/gpu_check dry=0
for argument in "$@"; do
  if [[ $argument == --dry-run ]]; then dry=1; else out=$argument; fi
done
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; fi
fi
mkdir -p "$out"
TOTAL=530
started=$SECONDS
ran=() failed=0

# stage NAME SECONDS COMMAND...: output to a log and, its end, to the terminal.
stage() {
  local name=$1 budget=$2 left=$((TOTAL - (SECONDS - started))) begin=$SECONDS code
  shift 2
  if [[ -n ${ONLY:-} && " $ONLY " != *" $name "* ]]; then return; fi
  if ((budget > left)); then budget=$left; fi
  echo "== $name (at most ${budget} s)"
  if ((budget < 5)); then
    code=124
    echo "no time left" >"$out/$name.log"
  else
    timeout --kill-after=5 "$budget" "$@" >"$out/$name.log" 2>&1
    code=$?
  fi
  tail -n 6 "$out/$name.log"
  if ((code != 0 && code != 77)); then
    failed=1
    echo "-- $name: exit code $code"
  fi
  ran+=("$name=$((SECONDS - begin))=$code")
}

build() {
  if [[ -n ${FASTGRPO_WHEELS:-} ]]; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps "$FASTGRPO_WHEELS"/*.whl || return 1
  fi
  export FASTGRPO_CUDA=1 FASTGRPO_REQUIRE_EXT=1
  # In place where pip or setuptools are too old for an editable install: everything here runs from this folder.
  "$PYTHON" -m pip install --no-index --no-build-isolation --no-deps --editable . || "$PYTHON" setup.py build_ext --inplace
}

about() {
  if command -v nvidia-smi >/dev/null; then nvidia-smi; fi
  git log -1 --format='commit %H %cI' 2>/dev/null
  "$PYTHON" -m fastgrpo doctor || ((dry)) # it complains where an op has no native kernel
}

# Four tools beside each other: what they watch takes seconds, starting Python under them takes longer.
sanitize() {
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not installed"; return 1; }
  "$PYTHON" -m tests.gpu.driver || return 1 # compiles the kernels
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  local tool pids=() code=0
  for tool in memcheck initcheck racecheck synccheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" -m tests.gpu.driver >"$out/sanitizer-$tool.log" 2>&1 &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || code=1; done
  for tool in memcheck initcheck racecheck synccheck; do
    echo "$tool: $(grep -hE 'ERROR SUMMARY|RACECHECK SUMMARY' "$out/sanitizer-$tool.log" || echo 'no summary line')"
  done
  return $code
}

# The measured copy bandwidth, for the questions whose floor depends on it.
bandwidth() { grep -m1 '"copy"' "$out/ceilings.jsonl" 2>/dev/null | sed -n 's/.*"tb_per_s": \([0-9.e+-]*\).*/\1/p'; }

questions() { "$PYTHON" -m benchmarks.gpu.questions "$out/questions.jsonl" $(bandwidth); }

export -f build about sanitize bandwidth questions
export PYTHON out dry PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

# bench NAME SECONDS OPTIONS...
bench() {
  local name=$1 budget=$2
  shift 2
  stage "bench-$name" "$budget" "$PYTHON" -m fastgrpo bench --out "$out/bench-$name" "$@"
}

if ((dry)); then
  export FASTGRPO_DRY_RUN=1 FASTGRPO_REHEARSE=1 FASTGRPO_BACKEND=triton TRITON_INTERPRET=1 OMP_NUM_THREADS=1
  stage about 150 bash -c about
  # Every test once; `FASTGRPO_REHEARSE=1 ... pytest tests/gpu` runs all their values.
  stage tests 200 "$PYTHON" -m pytest -q -p no:cacheprovider -p no:warnings tests/gpu -k "linear or advantages or faults or grpo-0.04 or 31-dtype1 or True-None or repeats or garbage"
  stage sanitize 150 "$PYTHON" -m tests.gpu.driver cpu
  stage ceilings 150 "$PYTHON" -m benchmarks.gpu.ceilings "$out/ceilings.jsonl"
  stage questions 150 bash -c questions
  stage tune 150 "$PYTHON" -m benchmarks.gpu.tune "$out/tune.jsonl"
  unset FASTGRPO_BACKEND TRITON_INTERPRET # the C++ kernels: a benchmark of the interpreter says nothing
  bench advantage 150 --quick --device cpu --what advantage --rounds 3
else
  stage build 150 bash -c build
  stage about 40 bash -c about
  stage tests 120 "$PYTHON" -m pytest -q -p no:cacheprovider tests/gpu
  stage sanitize 110 bash -c sanitize
  stage ceilings 40 "$PYTHON" -m benchmarks.gpu.ceilings "$out/ceilings.jsonl"
  bench logits 90 --what loss,logprob --mode forward,backward,train --dtype bfloat16 --entropy on --budget 2
  bench linear-2048 90 --what linear --preset 2048x151936 --dtype bfloat16 --budget 2
  stage questions 60 bash -c questions
  bench linear-896 50 --what linear --dtype bfloat16 --budget 2
  stage tune 60 "$PYTHON" -m benchmarks.gpu.tune "$out/tune.jsonl"
  bench linear-4096 60 --what linear --preset 4096x151936 --dtype bfloat16 --budget 2
  bench logits-32000 40 --what loss,logprob --preset llama-2-7b --budget 1
  bench advantage 20 --what advantage --budget 1
  bench logits-float32 40 --what loss,logprob --dtype float32 --tokens 4096 --entropy on --budget 1
fi

"$PYTHON" -m benchmarks.gpu.summary "$out" ${ran[@]+"${ran[@]}"}
exit "$failed"
