"""Committed results and the tables made of them: nothing typed, nothing stale, nothing that two runs disagree on."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from benchmarks import readme_tables, scaling
from benchmarks.measured import Ratio, runs
from fastgrpo.bench.problems import Case
from fastgrpo.bench.providers.base import Provider
from fastgrpo.bench.rows import Row

ENVIRONMENT = {
    "date": "2026-01-01T00:00:00+00:00", "device": "CPU", "cpu_isa": "avx512", "threads": 1, "thp": False,
    "versions": {"torch": "2.13.0"}, "git": "abc",
}  # fmt: skip


def test_pages_hold_what_the_results_say(capsys):
    assert readme_tables.main(["--check"]) == 0, capsys.readouterr().out


def _lines(day, thp, **ms):
    case = Case("loss", "train", 256, 32_000, 0, torch.bfloat16, entropy=False)
    for name, value in ms.items():
        row = Row.of(case, Provider(name, None, name == "fastgrpo", False, True, "", ""))
        environment = ENVIRONMENT | {"date": f"2026-01-{day:02}", "thp": thp}
        yield json.dumps(environment | asdict(replace(row, ms=value))) + "\n"


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder of results of which eager is measured alike twice, TRL is not, and each has its better allocator."""
    lines = [
        *_lines(1, False, fastgrpo=12.0, eager=90.0, TRL=30.0),
        *_lines(1, True, fastgrpo=10.0, eager=50.0, TRL=40.0),
        *_lines(2, False, fastgrpo=12.0, eager=95.0, TRL=8.0),
        *_lines(2, True, fastgrpo=10.0, eager=52.0, TRL=41.0),
    ]
    (tmp_path / "cpu-test.jsonl").write_text("".join(lines))
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    return tmp_path


def test_providers_are_compared_in_their_better_allocator_setting(results):
    first, second = runs(results.glob("*.jsonl"))
    speed = {row.provider: row.speedup_of_ours for row in first.rows}
    assert speed == {"fastgrpo": 1.0, "eager": 5.0, "TRL": 3.0}
    assert {row.provider: row.ms for row in second.rows}["TRL"] == 8.0


def test_a_ratio_that_two_runs_disagree_on_is_left_out(results):
    text = readme_tables.BLOCKS["cpu"]()
    assert "| 5.1x |" in text  # 5.0 and 5.2
    assert "†: left out" in text
    assert "3.0x" not in text


def test_one_run_alone_is_not_quoted_and_all_runs_must_agree():
    assert not Ratio((2.0,)).agrees
    assert Ratio((2.0, 2.19)).agrees
    assert not Ratio((2.0, 2.1, 2.21)).agrees


def test_goals_say_pass_and_fail(results):
    lines = [*_lines(1, True, **{"fastgrpo": 10.0, "torch.compile": 40.0})]
    (results / "cpu-test.jsonl").write_text("".join(lines))
    assert (
        "| times faster than torch.compile | >= 4.5 | 4.00 | **FAIL** |"
        in readme_tables.BLOCKS["cpu-goals"]()
    )


def test_a_block_without_results_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    page = "a\n<!-- results:gpu -->\nold\n<!-- /results:gpu -->\nb\n"
    assert readme_tables.filled(page) == page.replace("old\n", "*Not measured yet.*\n")
    with pytest.raises(SystemExit, match="no results called 'speed'"):
        readme_tables.filled(page.replace("gpu", "speed"))


def test_scaling_study_fits_and_plots(tmp_path):
    assert scaling.main(["--small", "--out", str(tmp_path)]) == 0
    study = json.loads((tmp_path / "scaling.json").read_text())
    assert {fit["op"] for fit in study["fits"]} == set(scaling.OPS)
    assert all(cost >= 0 for fit in study["fits"] for cost in fit["costs_ms"])
    assert (tmp_path / "scaling.png").stat().st_size > 5000


def test_fit_finds_planted_costs():
    terms = (("call", lambda p: 1.0), ("x", lambda p: p["x"]), ("useless", lambda p: 1.0 / p["x"]))
    points = [{"x": x, "ms": 2.0 + 0.5 * x} for x in (1.0, 4.0, 16.0, 64.0)]
    costs, fitted = scaling.fit(points, terms)
    assert costs == pytest.approx([2.0, 0.5, 0.0], abs=1e-9)
    assert fitted == pytest.approx([p["ms"] for p in points])
