"""The other tests of this folder once more on every lower instruction set that this processor has.

A process runs its kernels on one instruction set, so each gets a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastgrpo.host import CPU_ISAS, cpu_capability
from tests.cpu.inputs import require_compiled

require_compiled("token_logprob_fwd")

FOLDER = Path(__file__).resolve().parent
LOWER = CPU_ISAS[: CPU_ISAS.index(cpu_capability())]
FILES = [
    path.name
    for path in FOLDER.glob("test_*.py")
    if path.name not in ("test_spec.py", Path(__file__).name)
]


@pytest.mark.parametrize("isa", LOWER)
def test_on(isa):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    ]
    result = subprocess.run(
        [*command, *(str(FOLDER / name) for name in FILES)],
        env=os.environ | {"FASTGRPO_CPU_ISA": isa},
        cwd=FOLDER.parents[1],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout


def test_an_unknown_or_missing_set_is_refused():
    for isa, message in (("mmx", "FASTGRPO_CPU_ISA must be"), ("avx512_bf16", "this CPU has only")):
        if isa in CPU_ISAS and cpu_capability() == isa:
            continue
        result = subprocess.run(
            [sys.executable, "-c", "import fastgrpo.ops"],
            env=os.environ | {"FASTGRPO_CPU_ISA": isa},
            capture_output=True,
            text=True,
        )
        assert result.returncode != 0
        assert message in result.stderr
