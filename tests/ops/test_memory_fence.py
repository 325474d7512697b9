"""No kernel touches a byte outside its tensors: every input ends at, or begins behind, a protected page.

A violation kills the process, so the cases run in child processes that share one interpreter start each; the last line
a child prints names the case that killed it.
"""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastgrpo import backend_report

ROOT = Path(__file__).resolve().parent.parent.parent
NATIVE = backend_report().ops["token_logprob_fwd"]["cpu"].name == "C++"


def run_fence(*options, **environment):
    command = [sys.executable, "-m", "tests.tools.fence", *options]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=250
    )  # fmt: skip


def assert_untouched(child, least):
    last = child.stdout.splitlines()[-1] if child.stdout else ""
    assert child.returncode == 0, f"died with {child.returncode} in: {last}\n{child.stderr[-2000:]}"
    done, count = last.split()
    assert done == "done"
    assert int(count) >= least


def test_the_fence_kills_a_read_of_one_byte_too_many():
    assert run_fence("--control").returncode == -signal.SIGSEGV


@pytest.mark.skipif(not NATIVE, reason="the C++ kernels are not built (or FASTGRPO_BACKEND is set)")
def test_compiled_kernels_stay_inside_their_tensors():
    """300 and more calls, those with short or mistyped tensors included, which the kernels must refuse."""
    assert_untouched(run_fence(), least=900)


# The interpreter runs the source of the GPU kernels on these very addresses.
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_kernels_stay_inside_their_tensors():
    child = run_fence(
        "--unchecked", "--every", "19", FASTGRPO_BACKEND="triton", TRITON_INTERPRET="1"
    )
    assert_untouched(child, least=30)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_kernels_stay_inside_their_tensors_in_all_cases():
    child = run_fence("--unchecked", FASTGRPO_BACKEND="triton", TRITON_INTERPRET="1")
    assert_untouched(child, least=600)
