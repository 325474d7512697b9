"""One measurement as a row, and the ratios between rows: to the floor, to ours, kernel apart from work skipped."""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fastgrpo.bench.problems import Case


@dataclass
class Row:
    """One provider on one case."""

    case: str
    what: str
    mode: str
    dtype: str
    tokens: int
    vocabulary: int
    hidden: int
    active: float
    skip_by: str
    frozen_head: bool
    entropy: bool
    provider: str
    ours: bool
    floor: bool
    has_entropy: bool
    skips: str
    note: str
    unavailable: str = ""
    wrong: bool = False
    ms: float = 0.0  # CPU: processor time, GPU: between events; medians
    ms_low: float = 0.0
    ms_high: float = 0.0
    wall_ms: float = 0.0  # the least elapsed time of a call: on a busy machine the most telling of its wall times
    cold_ms: float = 0.0
    repetitions_ms: list[float] = field(default_factory=list)
    extra_mib: float = 0.0
    to_floor: float | None = None  # time / time of the measured floor
    speedup_of_ours: float | None = None  # this provider's time / time of our best right one
    kernel_speedup: float | None = None  # the part of it that is there with all rows active
    skipped_speedup: float | None = (
        None  # the rest: work that ours leaves out and this provider does not
    )
    errors: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, case: Case, provider: Any) -> "Row":
        """An empty row; `provider` is a `providers.base.Provider`."""
        shape = asdict(case)
        dtype = str(shape.pop("dtype")).removeprefix("torch.")
        shape.pop("length")
        return cls(
            case=str(case), dtype=dtype, provider=provider.name, ours=provider.is_ours,
            floor=provider.is_floor, has_entropy=provider.has_entropy, skips=provider.skips,
            note=provider.note, **shape,
        )  # fmt: skip

    @property
    def dense_key(self) -> tuple[Any, ...]:
        """What a row shares with the same measurement with all rows active."""
        size = (self.tokens, self.vocabulary, self.hidden)
        return (self.what, self.mode, self.dtype, *size, self.frozen_head, self.entropy)


def compare(rows: Iterable[Row]) -> None:
    """Fill the ratios. A wrong provider has none; a share of active rows is set against the dense case if it is there.

    speed-up = kernel * skipped: with all rows active only the kernels differ. The objective of zero-advantage cases has
    no KL term, which costs nothing beside the vocabulary, so their dense twin is the same.
    """
    by_case: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.ms and not row.wrong:
            by_case[row.case].append(row)
    for group in by_case.values():
        floor = next((row.ms for row in group if row.floor), None)
        ours = min((row.ms for row in group if row.ours), default=None)
        for row in group:
            row.to_floor = row.ms / floor if floor else None
            if ours and not row.floor:
                row.speedup_of_ours = row.ms / ours
    measured = [row for group in by_case.values() for row in group]
    dense = {(row.dense_key, row.provider): row for row in measured if row.active == 1}
    for row in measured:
        twin = dense.get((row.dense_key, row.provider))
        if row.active < 1 and twin and twin.speedup_of_ours and row.speedup_of_ours:
            row.kernel_speedup = twin.speedup_of_ours
            row.skipped_speedup = row.speedup_of_ours / twin.speedup_of_ours


def write_jsonl(path: Path, env: dict[str, Any], rows: list[Row]) -> None:
    """One JSON object per row, each with the environment it was measured in."""
    with path.open("w") as file:
        for row in rows:
            file.write(json.dumps(env | asdict(row)) + "\n")


def read_jsonl(path: Path) -> list[tuple[dict[str, Any], Row]]:
    """What `write_jsonl` wrote: each row with its environment."""
    known = {f.name for f in fields(Row)}
    found = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        row = Row(**{name: value for name, value in record.items() if name in known})
        found.append(({name: value for name, value in record.items() if name not in known}, row))
    return found
