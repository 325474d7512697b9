"""The gate on instruction counts: it fails on a regression of more than 3 %, and the kernels pass it."""

import pytest

from benchmarks.callgrind_gate import SKIPPED, main, regressions


def test_a_planted_regression_fails():
    before = {"stats": 1000, "grad": 1000, "gone": 5}
    worse = regressions({"stats": 1029, "grad": 1031, "new": 7}, before)
    assert worse == ["gone is not measured any more", "grad: 1,031 instructions, +3.1% of 1,000"]
    assert regressions({"stats": 500, "grad": 1030, "gone": 5}, before) == []


def test_kernels_take_no_more_instructions_than_the_baseline(capsys):
    code = main([])
    printed = capsys.readouterr().out
    if code == SKIPPED:
        pytest.skip(printed.strip().splitlines()[-1])
    assert code == 0, printed
    assert "stats_float32" in printed
