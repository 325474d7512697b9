"""Memory that every chunk of logits uses in turn."""

import torch
from torch import Tensor

from fastgrpo.functional.linear.chunking import default_workspace_bytes, row_stride, rows_per_chunk
from fastgrpo.functional.linear.gemm import Head


def row_bytes(head: Head, with_gradient: bool) -> int:
    """Bytes that one row of a chunk takes, the half-precision copy of its gradient included."""
    vocabulary, wide = head.weight.shape[0], head.logits_dtype.itemsize
    narrow = head.dtype.itemsize if head.mode == "mixed" and with_gradient else 0
    return row_stride(vocabulary, wide) * wide + (
        row_stride(vocabulary, narrow) * narrow if narrow else 0
    )


class Workspace:
    """Logits of one chunk, turned into their gradient in place, and what the gradient products read."""

    def __init__(self, head: Head, budget: int | None, rows: int, with_gradient: bool) -> None:
        """Choose the rows of a chunk from a budget in bytes; allocate nothing for rows that will not come."""
        self.head = head
        budget = default_workspace_bytes(head.weight.device) if budget is None else budget
        self.limit = rows_per_chunk(row_bytes(head, with_gradient), budget)
        self._rows = min(rows, self.limit)
        self._logits = self._buffer(head.logits_dtype)
        self._operand = self._buffer(head.dtype) if head.mode == "mixed" and with_gradient else None

    def _buffer(self, dtype: torch.dtype) -> Tensor:
        vocabulary = self.head.weight.shape[0]
        stride = row_stride(vocabulary, dtype.itemsize)
        buffer = torch.empty(self._rows, stride, dtype=dtype, device=self.head.weight.device)
        return buffer[:, :vocabulary]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states [n, H]."""
        logits = self._logits[: hidden.shape[0]]
        self.head.logits(hidden, logits)
        return logits

    def operand(self, dlogits: Tensor) -> Tensor:
        """`dlogits` in the dtype that the gradient products read."""
        if self._operand is None:
            return dlogits
        return self._operand[: dlogits.shape[0]].copy_(dlogits)
