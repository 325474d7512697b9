"""The examples run as users run them, and do what they say."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_plain_grpo_learns_and_both_loops_agree():
    module = runpy.run_path(str(EXAMPLES / "plain_grpo.py"))
    eager, fused = module["train"](module["before"]), module["train"](module["after"])
    assert fused == pytest.approx(eager, abs=2e-2), (
        "the same steps, up to float32 and a sample that tips over"
    )
    assert fused[:20] == pytest.approx(eager[:20], abs=1e-6)
    assert fused[0] < 0.2
    assert fused[-1] > 0.9


def test_plain_grpo_as_a_script():
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / "plain_grpo.py")],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert run.stdout.startswith("before")
    assert "after" in run.stdout
