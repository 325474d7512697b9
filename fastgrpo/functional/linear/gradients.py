"""Gradients of hidden states, weight and bias, summed over chunks of rows."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo.functional.linear.gemm import HALF, GradientTask
from fastgrpo.functional.linear.gemm_mixed import target_residual
from fastgrpo.functional.linear.rows import Selection
from fastgrpo.functional.linear.weight_sum import WeightSum
from fastgrpo.functional.linear.workspace import Workspace


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


class Originals(NamedTuple):
    """The tensors to differentiate, in the caller's dtypes."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]

    def needs(self, needs_input_grad: tuple[bool, ...]) -> Needs:
        """Which of them want a gradient, from the first three entries of an autograd context's list."""
        hidden, weight, bias = needs_input_grad[:3]
        return Needs(hidden, weight, self.bias is not None and bias)


class Rows(NamedTuple):
    """Hidden states of a chunk, their tokens, and where they come from."""

    hidden: Tensor  # [n, H] in the dtype of the products
    target: Tensor  # [n] token ids
    selection: Selection

    def take(self, position: Tensor) -> "Rows":
        """The rows at `position` [k], in its order."""
        return Rows(self.hidden[position], self.target[position], self.selection.reorder(position))


def join(parts: list[Rows]) -> Rows:
    """All rows of several chunks."""
    if len(parts) == 1:
        return parts[0]
    return Rows(
        torch.cat([part.hidden for part in parts]),
        torch.cat([part.target for part in parts]),
        Selection.join([part.selection for part in parts]),
    )


def fill_holes(dlogits: Tensor, active: Tensor) -> Tensor:
    """Move active rows to the front of `dlogits` in place and return their old positions [k].

    Only rows behind the first k move, each into a hole before k, so at most min(k, n - k) rows are copied.
    """
    order = active.nonzero().flatten()
    count = order.numel()
    holes = (~active[:count]).nonzero().flatten()
    movers = order[order >= count]
    for hole, mover in zip(holes.tolist(), movers.tolist(), strict=True):
        dlogits[hole].copy_(dlogits[mover])
    position = torch.arange(count, device=active.device)
    position[holes] = movers
    return position


class HeadGradients:
    """The sums. Half-precision weights are summed in float32 unless there is only one product to add."""

    def __init__(
        self, workspace: Workspace, needs: Needs, like: Originals, products: int, *, keep_wide: bool = False,
        weight_buffer: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Allocate for (at most) so many products.

        `keep_wide` leaves weight and bias gradients in float32 at the end; a `weight_buffer` is added to, not returned.
        """
        head = workspace.head
        self.workspace, self.head, self.like, self.keep_wide = workspace, head, like, keep_wide
        self._wide = torch.float32 if head.dtype in HALF else head.dtype
        self._pending: list[Rows] = []
        self._residuals: list[Tensor] = []
        self._buffered = weight_buffer is not None
        self._weight: WeightSum | None = None
        self.hidden = self._bias = None
        if needs.hidden:
            self.hidden = torch.zeros_like(like.hidden, memory_format=torch.contiguous_format)
        if weight_buffer is not None:
            self._weight = WeightSum([weight_buffer], first=False)
        elif needs.weight:
            dtype = like.weight.dtype
            direct = products == 1 and not keep_wide and head.writes(dtype)
            final = self._wide if keep_wide else dtype
            self._weight = WeightSum.like(like.weight, dtype if direct else self._wide, final)
        if needs.bias:
            self._bias = like.weight.new_zeros(head.weight.shape[0], dtype=self._wide)

    def add(self, dlogits: Tensor, rows: Rows, active: Tensor) -> None:
        """Add a chunk whose rows outside `active` [n] bool have gradient 0; their hidden states are not used.

        On a CPU inactive rows are left out of the products (`dlogits` is permuted); elsewhere that would need a sync.
        """
        if active.device.type != "cpu":  # 0 * NaN: select, never multiply
            rows = rows._replace(hidden=torch.where(active[:, None], rows.hidden, 0.0))
            self._add_bias(dlogits)
            self._multiply(dlogits, rows)
            return
        count = int(active.sum())
        if count == 0:
            return
        self._add_bias(dlogits)
        if self.workspace.narrows:
            self._keep(dlogits, rows, active.nonzero().flatten())
            return
        if count < active.numel():
            rows = rows.take(fill_holes(dlogits, active))
        self._multiply(dlogits[:count], rows)
        self.workspace.room.keep(count)

    def _keep(self, dlogits: Tensor, rows: Rows, index: Tensor) -> None:
        column = rows.target.clamp(0, dlogits.shape[1] - 1)
        residual = target_residual(dlogits, column, self.head.dtype)
        everything = index.numel() == dlogits.shape[0]
        self._pending.append(rows if everything else rows.take(index))
        self._residuals.append(residual if everything else residual[index])
        self.workspace.keep(dlogits, index)

    def flush(self) -> None:
        """Multiply the rows that wait."""
        if self._pending:
            self._multiply(self.workspace.kept(), join(self._pending), torch.cat(self._residuals))
            self._pending.clear()
            self._residuals.clear()
        self.workspace.room.clear()

    def _add_bias(self, dlogits: Tensor) -> None:
        if self._bias is not None:
            self._bias += dlogits.sum(0, dtype=self._bias.dtype)

    def _multiply(self, dlogits: Tensor, rows: Rows, residual: Tensor | None = None) -> None:
        selection, out, weight = rows.selection, None, self._weight
        if self.hidden is not None:
            in_place = selection.index is None
            out = (
                selection.take(self.hidden)
                if in_place
                else torch.empty_like(rows.hidden, dtype=self.hidden.dtype)
            )
        if weight is not None and not weight.first and not self._buffered:
            weight.widen(self._wide)
        whole = weight.slabs[0] if weight is not None and len(weight.slabs) == 1 else None
        first = weight is not None and weight.first
        task = GradientTask(dlogits, residual, rows.hidden, rows.target, out, whole, first)
        if out is not None or whole is not None:
            self.head.add_gradients(task)
        if weight is not None:
            if whole is None:
                for slab, (start, stop) in zip(weight.slabs, weight.bounds(), strict=True):
                    self.head.add_gradients(task.columns(start, stop, slab))
            weight.first = False
        if self.hidden is not None and out is not None and selection.index is not None:
            self.hidden.index_copy_(0, selection.index, out)

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden states, weight and bias; None where not wanted or added to a caller's buffer."""
        self.workspace.release()
        weight, bias = None, self._bias
        if self._weight is not None and not self._buffered:
            weight = self._weight.finish(self._wide if self.keep_wide else self.like.weight.dtype)
        if bias is not None and self.like.bias is not None and not self.keep_wide:
            bias = bias.to(self.like.bias.dtype)
        return self.hidden, weight, bias
