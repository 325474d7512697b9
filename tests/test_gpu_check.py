"""The script for the first minutes on a GPU, rehearsed: it must not be debugged there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("about", "tests", "sanitize", "ceilings", "questions", "tune", "bench-advantage")


def _run(out, **environment):
    command = ["bash", str(ROOT / "benchmarks/gpu_check.sh"), str(out), "--dry-run"]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=280
    )


@pytest.mark.skipif(sys.platform != "linux", reason="a script for Linux machines with a GPU")
def test_dry_run_goes_through_every_stage(tmp_path):
    done = _run(tmp_path, PYTHON=sys.executable)
    logs = {name: (tmp_path / f"{name}.log").read_text()[-2000:] for name in STAGES}
    assert done.returncode == 0, (done.stdout[-3000:], logs)
    summary = (tmp_path / "summary.md").read_text()
    for name in STAGES:
        assert f"| {name} |" in summary
    assert "FAILED" not in summary
    assert "TIMED OUT" not in summary
    questions = [json.loads(x) for x in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert {q["question"] for q in questions} == {1, 2, 3, 4, 5, 6}
    for question in questions:
        assert {"what", "predicted", "measured", "why"} <= set(question), question
    ceilings = [
        json.loads(x)["name"] for x in (tmp_path / "ceilings.jsonl").read_text().splitlines()
    ]
    assert {"copy", "head logits H=16", "head dhidden H=16", "head dweight H=16"} <= set(ceilings)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {"eager", "fastgrpo"} <= {row["provider"] for row in rows}


def test_a_failing_stage_stops_no_other_but_is_told(tmp_path):
    """With an interpreter that fails, every stage fails, every stage was tried, and so says the exit code."""
    done = _run(tmp_path, PYTHON="false")
    assert done.returncode == 1
    for name in STAGES:
        assert f"== {name} " in done.stdout
        if name != "about":  # whose code is doctor's advice, ignored in a rehearsal
            assert f"-- {name}: exit code 1" in done.stdout
