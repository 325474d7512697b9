"""docs/reliability.md: every test that it names exists, every promise has one or says why not, the page is current."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "docs"))
generate = pytest.importorskip("generate_reliability")
RESULTS = ROOT / "benchmarks" / "results"


def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_named_test_exists():
    everywhere = [
        *generate.named_tests(),
        *(test for tests in generate.ELSEWHERE.values() for test in tests.values()),
    ]
    missing = []
    for test in everywhere:
        file, _, name = test.partition("::")
        if not (ROOT / file).is_file() or name not in functions(ROOT / file):
            missing.append(test)
    assert not missing


def test_all_promises_are_there_and_none_is_without_a_measurement_or_a_reason():
    assert [p.number for p in generate.PROMISES] == list(range(1, 42))
    assert not [p.number for p in generate.PROMISES if not p.tests and not p.short]


def test_every_case_of_the_catalogue_has_a_test():
    found = generate.numbered_tests()
    assert list(found) == [f"N{i}" for i in range(1, 41)]
    assert not [case for case, columns in found.items() if not columns]


def test_the_page_is_current():
    command = [sys.executable, str(ROOT / "docs" / "generate_reliability.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0, (
        "stale: run python docs/generate_reliability.py"
    )


def test_no_failure_is_on_the_page():
    """A promise that is not kept has to say so in `short`, not by a failing test."""
    record = json.loads((RESULTS / "reliability.json").read_text(encoding="utf-8"))
    assert not [test for test, counts in record["tests"].items() if counts.get("failed")]
    assert set(record["tests"]) == set(generate.named_tests()), "run generate_reliability.py --run"
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^\*\*\d+\. ", text, re.MULTILINE)) == 41


def test_the_fuzz_campaign_reached_its_bar():
    record = json.loads((RESULTS / "fuzz.json").read_text(encoding="utf-8"))
    assert record["cases"] >= 100_000
    assert record["failures"] == 0
    assert sum(c["compared"] for c in record["by_dtype"].values()) >= 0.99 * record["cases"]


def test_the_mutation_campaign_reached_its_bar():
    record = json.loads((RESULTS / "mutants.json").read_text(encoding="utf-8"))
    assert record["mutants"] >= 100
    assert record["killed"] >= 0.9 * record["mutants"]
    assert len(record["survivors"]) == record["mutants"] - record["killed"]
