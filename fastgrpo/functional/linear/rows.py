"""Which rows of a batch are worked on, and how results find their way back."""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Chunk(NamedTuple):
    """Rows [start, stop) of the selected rows, which are the sequences [first, last) if sequences matter."""

    start: int
    stop: int
    first: int = 0
    last: int = 0

    @property
    def size(self) -> int:
        """Number of rows."""
        return self.stop - self.start


@dataclass(frozen=True)
class Selection:
    """Rows of a batch of `total` tokens: those of an index in its order, or a range."""

    total: int
    index: Tensor | None  # [n] int64
    start: int  # the range where there is no index
    stop: int

    @classmethod
    def every(cls, total: int) -> "Selection":
        """All rows."""
        return cls(total, None, 0, total)

    @classmethod
    def of(cls, total: int, index: Tensor) -> "Selection":
        """The rows of an index."""
        return cls(total, index, 0, 0)

    @property
    def count(self) -> int:
        """Number of selected rows."""
        return self.stop - self.start if self.index is None else self.index.numel()

    def take(self, value: Tensor) -> Tensor:
        """Selected entries of a tensor [total, ...]; an absent one, with 0 entries, stays absent."""
        if value.numel() == 0:
            return value
        return (
            value[self.start : self.stop]
            if self.index is None
            else value.index_select(0, self.index)
        )

    def put(self, value: Tensor) -> Tensor:
        """A tensor [total] with the selected rows' values; the others are 0."""
        if self.index is None and self.count == self.total:
            return value
        return self.put_into(value.new_zeros(self.total), value)

    def put_into(self, full: Tensor, value: Tensor) -> Tensor:
        """Write the selected rows' values into `full` [total]."""
        if self.index is not None:
            return full.index_copy_(0, self.index, value)
        full[self.start : self.stop] = value
        return full

    def piece(self, chunk: Chunk) -> "Selection":
        """The chunk's part of the selected rows."""
        if self.index is not None:
            return Selection.of(self.total, self.index[chunk.start : chunk.stop])
        return Selection(self.total, None, self.start + chunk.start, self.start + chunk.stop)

    def then(self, active: Tensor) -> "Selection":
        """The selected rows where `active` [n] holds (one sync on a GPU)."""
        chosen = active.nonzero().flatten()
        if chosen.numel() == self.count:
            return self
        return self.reorder(chosen)

    def reorder(self, position: Tensor) -> "Selection":
        """The selected rows at `position` [k], in its order."""
        return Selection.of(
            self.total, position + self.start if self.index is None else self.index[position]
        )

    @classmethod
    def join(cls, parts: "list[Selection]") -> "Selection":
        """The rows of all parts, one after the other."""
        total = parts[0].total
        adjacent = all(
            a.index is None and b.index is None and a.stop == b.start for a, b in pairwise(parts)
        )
        if adjacent:
            return cls(total, None, parts[0].start, parts[-1].stop)
        return cls.of(total, torch.cat([part.as_index() for part in parts]))

    def as_index(self) -> Tensor:
        """The rows as an index; a range only becomes one on the CPU, where rows are compacted."""
        return torch.arange(self.start, self.stop) if self.index is None else self.index
