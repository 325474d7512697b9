"""The op tests on the backends that do not serve this process: the reference, and Triton's interpreter.

Which kernel serves an op is decided once, at import, so each backend gets a process of its own.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
CATALOGUE = [
    f"tests/ops/test_catalogue_{part}.py"
    for part in ("batch", "limits", "linear", "logits", "losses")
]
FORMULAS = [
    "tests/ops/test_gradcheck.py",
    "tests/test_losses.py",
    "tests/test_rollout_correction.py",
]


def run_tests(*arguments, timeout, **environment):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        *arguments,
    ]
    environment = {**os.environ, **environment}
    environment.pop("PYTEST_XDIST_WORKER", None)
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


@pytest.mark.skipif(
    os.environ.get("FASTGRPO_BACKEND") == "reference", reason="this is the run on the reference"
)
def test_reference():
    """The catalogue, every gradcheck and every printed formula on the specification itself, not on its copies."""
    run_tests(*CATALOGUE, *FORMULAS, timeout=280, FASTGRPO_BACKEND="reference")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("file", CATALOGUE)
def test_triton(file):
    """The catalogue on the source of the GPU kernels; rows of 150,000 columns take the interpreter too long."""
    few = ["-k", "not large_vocabulary and not N29"]
    run_tests(file, *few, timeout=3500, FASTGRPO_BACKEND="triton", TRITON_INTERPRET="1")


def test_python_without_asserts_gives_the_same_bits_and_the_same_refusals():
    """`python -O` drops `assert`: nothing that a caller relies on may be one."""
    commands = [[sys.executable, *flags, "-m", "tests.tools.digest"] for flags in ([], ["-O"])]
    runs = [
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
        for command in commands
    ]
    assert len(runs[0].stdout.strip()) == 64
    assert runs[0].stdout == runs[1].stdout
