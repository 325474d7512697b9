"""Memory that every chunk of logits uses in turn."""

import torch
from torch import Tensor

from fastgrpo.functional.linear.gemm import Head
from fastgrpo.functional.linear.room import Room, default_workspace_bytes, row_stride
from fastgrpo.ops import head_products


def row_bytes(head: Head, with_gradient: bool) -> int:
    """Bytes of a row of logits, the copy that its gradient products make included."""
    vocabulary = head.weight.shape[0]
    dtypes = [head.logits_dtype]
    if with_gradient and head.scratch_dtype is not None:
        dtypes.append(head.scratch_dtype)
    return sum(row_stride(vocabulary, dtype.itemsize) * dtype.itemsize for dtype in dtypes)


# The last CPU workspace, for the next call: touching fresh memory costs as much as a fifth of the products made in it.
# A list, because taking from it and giving back to it are atomic.
_spare: list[Tensor] = []


def take_memory(size: int, device: torch.device) -> Tensor:
    """Uninitialised bytes, from the spare workspace where that is large enough."""
    if device.type == "cpu" and _spare:
        try:
            spare = _spare.pop()
        except IndexError:  # another thread was faster
            spare = None
        if spare is not None and spare.numel() >= size:
            return spare
    with torch.inference_mode(
        False
    ):  # memory made in inference mode could not be written to outside of it
        return torch.empty(size, dtype=torch.uint8, device=device)


def give_back(memory: Tensor) -> None:
    """Keep a CPU workspace of at most the default size for the next call."""
    if (
        memory.device.type == "cpu"
        and not _spare
        and memory.numel() <= default_workspace_bytes(memory.device)
    ):
        _spare.append(memory)


def release_workspace() -> None:
    """Free the memory that the linear ops keep between calls on a CPU: at most 160 MiB."""
    _spare.clear()


class Workspace:
    """Logits of one chunk, turned into their gradient in place; in a narrowing one also gradients that wait."""

    def __init__(self, head: Head, budget: int | None, rows: int, with_gradient: bool) -> None:
        """Choose the rows of a chunk from a budget in bytes; allocate nothing for rows that will not come."""
        self.head, self._vocabulary = head, head.weight.shape[0]
        device = head.weight.device
        budget = default_workspace_bytes(device) if budget is None else budget
        self.narrows = with_gradient and head.narrows
        if self.narrows:
            unit = row_stride(self._vocabulary, head.dtype.itemsize) * head.dtype.itemsize
            self.room = Room.of(budget, rows, unit, 2)
        else:
            unit = (
                row_stride(self._vocabulary, head.logits_dtype.itemsize)
                * head.logits_dtype.itemsize
            )
            self.room = Room.of(budget, rows, row_bytes(head, with_gradient), 1)
        self._unit = unit
        self._bytes = take_memory(self.room.units * unit if rows else 0, device)

    def _rows(self, dtype: torch.dtype, first_unit: int, count: int, units: int) -> Tensor:
        size = units * self._unit
        start = first_unit * self._unit
        flat = self._bytes[start : start + count * size].view(dtype)
        return flat.view(count, size // dtype.itemsize)[:, : self._vocabulary]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states [n, H], behind the gradients that wait."""
        out = self._rows(self.head.logits_dtype, self.room.kept, hidden.shape[0], self.room.per_row)
        self.head.logits(hidden, out)
        return out

    def keep(self, dlogits: Tensor, index: Tensor) -> None:
        """Round the rows `index` (ascending) of the last logits' gradients and let them wait."""
        count = index.numel()
        narrow = self._rows(self.head.dtype, self.room.kept, count, 1)
        head_products.narrow_rows(dlogits, index, narrow)
        self.room.keep(count)

    def release(self) -> None:
        """Give the memory back; gradients are converted to their final dtype after that."""
        memory, self._bytes = self._bytes, self._bytes.new_empty(0)
        if memory.numel():
            give_back(memory)

    def kept(self) -> Tensor:
        """The gradients that wait."""
        return self._rows(self.head.dtype, 0, self.room.kept, 1)
