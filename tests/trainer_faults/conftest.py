"""Counts faults that were planted, and the tests that found a difference: benchmarks/results/faults.json.

`make faults` names the file in FAULTS_JSON; without it nothing is written.
"""

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

KINDS: Counter[str] = Counter()
FAILED: list[str] = []
PASSED: list[str] = []
MARK = "trials: "


@pytest.fixture
def trials(record_property) -> Callable[[str, int], None]:
    """Books a number of trials of a kind."""
    return lambda kind, number: record_property(MARK + kind, number)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        FAILED.append(report.nodeid)
    elif report.when == "call" and report.passed:
        PASSED.append(report.nodeid)
    if report.when == "call":
        for name, number in report.user_properties:
            if name.startswith(MARK):
                KINDS[name.removeprefix(MARK)] += int(str(number))


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = os.environ.get("FAULTS_JSON")
    if path and not hasattr(session.config, "workerinput"):
        content = {"trials": dict(sorted(KINDS.items())), "passed": len(PASSED), "failed": FAILED}
        Path(path).write_text(json.dumps(content, indent=1) + "\n")
