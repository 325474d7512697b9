"""How many rows of logits exist at a time: the arithmetic of one byte budget, without any memory.

A plain workspace holds so many rows, multiplied chunk by chunk. A narrowing one is counted in units of a half-precision
row: logits take two units while they are float32 and one after they have become gradients, which then wait at the
front. The next logits take what is left behind them, until that is too little and the waiting rows are multiplied.
"""

from dataclasses import dataclass

import torch

MIB = 1 << 20
ALIGN_BYTES = 64  # rows of a workspace start at cache lines, whatever V is
ROW_MULTIPLE = 16  # chunk sizes that matrix units like
TILE_ROWS = 6  # of the compiled products; rows of logits that are no multiple of it are multiplied for nothing
WORTHWHILE = 8  # logits are made for at least an eighth of the rows that fit: each time the whole weight is read


def default_workspace_bytes(device: torch.device) -> int:
    """Logits that may exist at a time: 160 MiB on a CPU; a 32nd of a GPU's memory, within 1 to 2.5 GiB.

    Every chunk streams the weight and its gradient once, so fewer chunks are faster; beyond this size it hardly shows.
    """
    if device.type != "cuda":
        return 160 * MIB
    total = torch.cuda.get_device_properties(device).total_memory
    return min(max(total // 32, 1024 * MIB), 2560 * MIB)


def row_stride(vocabulary: int, itemsize: int) -> int:
    """Elements from one workspace row to the next."""
    unit = ALIGN_BYTES // itemsize
    return -(-vocabulary // unit) * unit


@dataclass
class Room:
    """State of a workspace."""

    units: int
    per_row: int  # units of a row of logits: 1, or 2 in a narrowing workspace
    kept: int = 0  # rows that wait for their gradient products
    products: int = 0  # how often gradients were multiplied

    @classmethod
    def of(cls, budget: int, rows: int, unit_bytes: int, per_row: int) -> "Room":
        """As many units as the budget and the rows to come ask for, at least one row."""
        return cls(max(min(budget // max(unit_bytes, 1), rows * per_row), per_row), per_row)

    @property
    def limit(self) -> int:
        """Rows of logits that fit at most."""
        return self.units // self.per_row

    @property
    def rows(self) -> int:
        """Rows of logits that fit now."""
        return (self.units - self.kept) // self.per_row

    def is_full(self, remaining: int, need: int = 1) -> bool:
        """Whether waiting rows have to be multiplied before the next logits: `need` rows, better all that remain."""
        worthwhile = min(remaining, max(self.limit // WORTHWHILE, 1))
        return self.kept > 0 and self.rows < max(need, worthwhile)

    def next_size(self, remaining: int) -> int:
        """Rows to take next out of those that remain: chunks of nearly equal size, or all that fits."""
        if remaining <= self.rows:
            return remaining
        if self.per_row > 1:
            return max(self.rows // TILE_ROWS * TILE_ROWS, min(self.rows, TILE_ROWS))
        size = -(-remaining // -(-remaining // self.rows))
        rounded = -(-size // ROW_MULTIPLE) * ROW_MULTIPLE
        return rounded if rounded <= self.rows else size

    def keep(self, rows: int) -> None:
        """Take note of rows that became gradients."""
        if self.per_row > 1:
            self.kept += rows
        else:
            self.products += 1

    def clear(self) -> None:
        """Take note that the waiting rows were multiplied."""
        self.products += self.kept > 0
        self.kept = 0
