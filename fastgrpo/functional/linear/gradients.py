"""Gradients of hidden states, weight and bias, summed over chunks of rows."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo.functional.linear.gemm import HALF, Head
from fastgrpo.functional.linear.rows import Selection
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
        self, head: Head, needs: Needs, like: Originals, chunks: int, *, keep_wide: bool = False,
        weight_buffer: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Allocate for `chunks` calls of `add`.

        `keep_wide` leaves weight and bias gradients in float32 at the end; a `weight_buffer` is added to, not returned.
        """
        self.head, self.like, self.keep_wide = head, like, keep_wide
        device, wide = head.weight.device, torch.float32 if head.dtype in HALF else head.dtype
        one_product = chunks == 1 and head.mode != "mixed" and not keep_wide
        self.hidden = (
            torch.zeros_like(like.hidden, memory_format=torch.contiguous_format)
            if needs.hidden
            else None
        )
        self._buffer = self._weight = weight_buffer
        self._first = weight_buffer is None
        if needs.weight and weight_buffer is None:
            dtype = like.weight.dtype if one_product else wide
            self._weight = torch.empty(head.weight.shape, dtype=dtype, device=device)
        self._bias = (
            torch.zeros(head.weight.shape[0], dtype=wide, device=device) if needs.bias else None
        )

    def add(self, dlogits: Tensor, rows: Rows, active: Tensor, workspace: Workspace) -> None:
        """Add a chunk whose rows outside `active` [n] bool have gradient 0; their hidden states are not used.

        On a CPU the active rows are moved together first (`dlogits` is permuted); elsewhere that would need a sync.
        """
        if active.device.type == "cpu":
            count = int(active.sum())
            if count == 0:
                return
            if count < active.numel():
                moved = fill_holes(dlogits, active)
                dlogits = dlogits[:count]
                rows = Rows(rows.hidden[moved], rows.target[moved], rows.selection.reorder(moved))
        elif self._weight is not None:  # 0 * NaN: select, never multiply
            rows = rows._replace(hidden=torch.where(active[:, None], rows.hidden, 0.0))
        operand = workspace.operand(dlogits)
        residual = self._target_residual(dlogits, operand, rows.target)
        if self.hidden is not None:
            self._add_hidden(operand, rows, residual)
        if self._weight is not None:
            self.head.add_weight_gradient(operand, rows.hidden, self._weight, self._first)
            self._first = False
            if residual is not None:
                correction = residual * rows.hidden.float()
                self._weight.index_put_((self._columns(rows.target),), correction, accumulate=True)
        if self._bias is not None:
            self._bias += dlogits.sum(0, dtype=self._bias.dtype)

    def _columns(self, target: Tensor) -> Tensor:
        return target.clamp(0, self.head.weight.shape[0] - 1)

    def _target_residual(self, dlogits: Tensor, operand: Tensor, target: Tensor) -> Tensor | None:
        """What rounding loses [n, 1] of a row's largest entry, the gradient of the sampled token's logit."""
        if operand is dlogits:
            return None
        column = self._columns(target)[:, None]
        return dlogits.gather(1, column) - operand.gather(1, column).float()

    def _add_hidden(self, operand: Tensor, rows: Rows, residual: Tensor | None) -> None:
        assert self.hidden is not None
        selection = rows.selection
        out = (
            selection.take(self.hidden)
            if selection.index is None
            else torch.empty_like(rows.hidden, dtype=self.hidden.dtype)
        )
        if residual is None:
            self.head.hidden_gradient(operand, out)
        else:
            wide = torch.empty(out.shape, dtype=torch.float32, device=out.device)
            self.head.hidden_gradient(operand, wide)
            wide.addcmul_(residual, self.head.weight[self._columns(rows.target)].float())
            out.copy_(wide)
        if selection.index is not None:
            self.hidden.index_copy_(0, selection.index, out)

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden states, weight and bias; None where not wanted or added to a caller's buffer."""
        weight = None if self._buffer is not None else self._weight
        if weight is not None and self._first:
            weight.zero_()
        bias = self._bias
        if not self.keep_wide:
            weight = weight if weight is None else weight.to(self.like.weight.dtype)
            bias = bias if bias is None or self.like.bias is None else bias.to(self.like.bias.dtype)
        return self.hidden, weight, bias
