"""Our columns of docs/side_by_side.md: every bad-input row right, refused by name or flagged."""

from pathlib import Path

import pytest

from benchmarks.side_by_side.__main__ import CHECKS, ROOT, cells, document, run_system
from benchmarks.side_by_side.systems import SYSTEMS, FastGRPO
from benchmarks.side_by_side.table import ROWS, is_right

PAGE = Path(ROOT, "docs", "side_by_side.md")


@pytest.mark.parametrize(("row", "check"), CHECKS, ids=lambda part: getattr(part, "__name__", ""))
def test_our_column(row, check):
    verdict = check(FastGRPO())
    assert is_right(row, verdict, promised=True), f"{row.title}: {verdict}"


def test_the_page_has_every_row_and_says_that_ours_are_right():
    text = PAGE.read_text(encoding="utf-8")
    missing = [row.title for row in ROWS if f"| {row.title} |" not in text]
    assert not missing, f"run `python -m benchmarks.side_by_side`: {missing} are new"
    total = f"{len(ROWS)} of {len(ROWS)}"
    assert f"fastgrpo: {total}; fastgrpo Triton: {total}." in text


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_page_is_what_the_script_writes_today():
    """A peer that changes, or is upgraded, shows here; the versions stand in the page."""
    pytest.importorskip("trl")
    pytest.importorskip("liger_kernel")
    assert document({name: cells(run_system(name)) for name in SYSTEMS}) == PAGE.read_text("utf-8")
