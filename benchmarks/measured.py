"""Committed results, read: every provider in its best allocator setting, and which ratios all runs agree on."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean
from typing import Any, NamedTuple

from fastgrpo.bench.rows import Row, compare, read_jsonl

AGREEMENT = 0.10  # all runs must give a ratio within this of each other, and there must be two, for it to be quoted
Line = tuple[dict[str, Any], Row]


class Run(NamedTuple):
    """One measurement of all cases with one number of threads: rows in their best allocator setting."""

    threads: int
    environment: dict[str, Any]
    commits: list[str]
    rows: list[Row]


class Ratio(NamedTuple):
    """How many times longer than ours a provider takes, in each run that measured it."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Geometric mean over the runs."""
        return geometric_mean(self.values)

    @property
    def agrees(self) -> bool:
        """Whether it was measured more than once, always with the same outcome."""
        return len(self.values) > 1 and max(self.values) / min(self.values) <= 1 + AGREEMENT


def runs(paths: Iterable[Path]) -> list[Run]:
    """Group lines into runs: the n-th time that a case was measured with the same threads and allocator is run n."""
    counts: dict[tuple[object, ...], int] = defaultdict(int)
    grouped: dict[tuple[int, int], list[Line]] = defaultdict(list)
    lines = [line for path in paths for line in read_jsonl(path)]
    for environment, row in sorted(lines, key=lambda line: line[0]["date"]):
        key = (environment["threads"], environment["thp"], row.case, row.provider)
        counts[key] += 1
        grouped[environment["threads"], counts[key]].append((environment, row))
    found = []
    for (threads, _), members in sorted(grouped.items()):
        rows = best_allocator(members)
        compare(rows)
        commits = list(dict.fromkeys(environment["git"] for environment, _ in members))
        found.append(Run(threads, members[0][0], commits, rows))
    return found


def best_allocator(lines: Iterable[Line]) -> list[Row]:
    """Of each provider on each case the faster of its rows with and without huge pages, without ratios."""
    best: dict[tuple[str, str], Row] = {}
    for _, row in lines:
        key = (row.case, row.provider)
        if key not in best or (row.ms and row.ms < best[key].ms):
            best[key] = row
    blank = dict.fromkeys(("to_floor", "speedup_of_ours", "kernel_speedup", "skipped_speedup"))
    return [replace(row, **blank) for row in best.values()]


def ratio(name: str, case: str, of: list[Run]) -> Ratio | None:
    """The ratio of a provider on a case in every run; None where it has none."""
    values = tuple(
        row.speedup_of_ours
        for run in of
        for row in run.rows
        if row.provider == name and row.case == case and row.speedup_of_ours
    )
    return Ratio(values) if values else None


def middle(of: list[Run]) -> list[Row]:
    """Of each row that of the run with the median time (of two the faster)."""
    found: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for run in of:
        for row in run.rows:
            found[row.case, row.provider].append(row)
    return [sorted(rows, key=lambda row: row.ms)[(len(rows) - 1) // 2] for rows in found.values()]
