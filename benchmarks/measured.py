"""Committed results, read: every provider in its best allocator setting, and which ratios two runs agree on."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from fastgrpo.bench.rows import Row, compare, read_jsonl

AGREEMENT = 0.10  # two runs must give a ratio within this of each other for the README to quote it
Line = tuple[dict[str, Any], Row]


class Run(NamedTuple):
    """One measurement of all cases with one number of threads: rows in their best allocator setting."""

    threads: int
    environment: dict[str, Any]
    commits: list[str]
    rows: list[Row]


class Ratio(NamedTuple):
    """How many times longer than ours a provider takes, in the first run and in the second (None: not measured)."""

    first: float
    second: float | None

    @property
    def mean(self) -> float:
        """Geometric mean of the two."""
        return self.first if self.second is None else (self.first * self.second) ** 0.5

    @property
    def agrees(self) -> bool:
        """Whether it was measured twice with the same outcome."""
        if self.second is None:
            return False
        return max(self.first, self.second) / min(self.first, self.second) <= 1 + AGREEMENT


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
    """The ratio of a provider on a case in the first two runs; None where it has none."""
    values = [
        row.speedup_of_ours
        for run in of[:2]
        for row in run.rows
        if row.provider == name and row.case == case
    ]
    if not values or values[0] is None:
        return None
    return Ratio(values[0], values[1] if len(values) > 1 else None)
