"""The matrix products of a language-model head, by device, dtype and wanted precision of the logits.

direct   operands, logits and products in one dtype: every peer's way; half-precision logits are rounded
mixed    half-precision operands, float32 logits and sums, at the speed of half precision (GPUs, CPUs with AVX512-BF16)
split    as mixed, the gradient of the logits as two half-precision numbers: nothing is rounded but the results
upcast   half-precision operands copied to float32 block by block: as exact, at the speed of float32 products (CPU)
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastgrpo.ops import head_products

Precision = Literal["auto", "float32", "input"]
Mode = Literal["direct", "mixed", "split", "upcast"]
HALF = (torch.float16, torch.bfloat16)
BLOCK_BYTES = (
    32 << 20
)  # of float32 copies of the weight, or of rounded products on their way into a float32 sum


def choose_mode(precision: Precision, dtype: torch.dtype, device: torch.device) -> Mode:
    """How to multiply operands of `dtype`."""
    if dtype not in HALF or (
        precision == "input" and (dtype, device.type) != (torch.float16, "cpu")
    ):
        return "direct"
    if device.type == "cuda" or (dtype == torch.bfloat16 and head_products.is_native(device)):
        return "split" if precision == "float32" else "mixed"
    # torch multiplies float16 on a CPU at a hundredth of the speed of float32.
    return "upcast" if precision == "float32" or dtype == torch.float16 else "direct"


class GradientTask(NamedTuple):
    """Gradients of some rows' logits, and where the gradients of hidden states and weight go."""

    dlogits: Tensor  # [k, V]
    residual: (
        Tensor | None
    )  # [k] float32: what `dlogits` has lost by rounding in the column of the row's token
    hidden: Tensor  # [k, H]
    target: Tensor  # [k]
    dhidden: Tensor | None  # [k, H], written
    dweight: Tensor | None  # [V, H], written or added to
    first: bool  # written

    def columns(self, start: int, stop: int, dweight: Tensor) -> "GradientTask":
        """The weight's part of the task for the columns [start, stop)."""
        residual, target = self.residual, self.target - start
        if residual is not None:
            residual = residual.where((target >= 0) & (target < stop - start), 0.0)
        return self._replace(
            dlogits=self.dlogits[:, start:stop], residual=residual, target=target, dhidden=None, dweight=dweight
        )  # fmt: skip

    def column(self) -> Tensor:
        """A valid column for each row's token."""
        return self.target.clamp(0, self.dlogits.shape[1] - 1)


@dataclass(frozen=True)
class Head:
    """Weight and bias of a head, multiplied in the dtype of the weight."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    mode: Mode

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of hidden states and weight in the products."""
        return self.weight.dtype

    @property
    def logits_dtype(self) -> torch.dtype:
        """Dtype of the logits between the products."""
        return self.dtype if self.mode == "direct" else torch.float32

    @property
    def narrows(self) -> bool:
        """Whether rows of gradients are kept in half precision, many of them, for one pair of products."""
        return False

    @property
    def scratch_dtype(self) -> torch.dtype | None:
        """Dtype of a copy that the gradient products make of a chunk."""
        return None

    def writes(self, dtype: torch.dtype) -> bool:
        """Whether one gradient product may write a weight gradient of this dtype itself, without a float32 sum."""
        return True

    def describe(self) -> str:
        """One line for the log and the report."""
        operands, logits = (str(d).removeprefix("torch.") for d in (self.dtype, self.logits_dtype))
        text = f"{self.weight.device.type}, {operands} products ({self.mode}), {logits} logits"
        if self.logits_dtype in HALF:
            text += f" (log-probs off by up to {torch.finfo(self.logits_dtype).eps / 4:.0e} of the largest logit)"
        return text

    def rows(self, hidden: Tensor) -> Tensor:
        """Hidden states as the products take them."""
        return hidden.to(self.dtype)

    def logits(self, rows: Tensor, out: Tensor) -> None:
        """`out` [n, V] = rows [n, H] @ weight.T + bias."""
        self.project(rows, out)
        if self.bias is not None and self.mode != "direct":
            out.add_(self.bias)

    def add_gradients(self, task: GradientTask) -> None:
        """Gradients of hidden states, dlogits @ weight, and of the weight, dlogits.T @ hidden; the latter add up."""
        raise NotImplementedError

    def project(self, rows: Tensor, out: Tensor) -> None:
        """`out` = rows @ weight.T."""
        raise NotImplementedError

    def blocks(self) -> list[tuple[int, int]]:
        """Ranges of the vocabulary whose float32 copy is of moderate size."""
        vocabulary, hidden = self.weight.shape
        size = min(max(BLOCK_BYTES // (4 * hidden), 1), vocabulary)
        return [(a, min(a + size, vocabulary)) for a in range(0, vocabulary, size)]


class DirectHead(Head):
    """Everything in one dtype; a half-precision weight gradient of several chunks is summed in float32."""

    def project(self, rows: Tensor, out: Tensor) -> None:
        """`out` = rows @ weight.T + bias, rounded once."""
        if self.bias is None:
            torch.mm(rows, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias.to(rows.dtype), rows, self.weight.t(), out=out)

    def add_gradients(self, task: GradientTask) -> None:
        """Two products."""
        dlogits, out, total = task.dlogits, task.dhidden, task.dweight
        if out is not None:
            if out.dtype == dlogits.dtype:
                torch.mm(dlogits, self.weight, out=out)
            else:
                out.copy_(torch.mm(dlogits, self.weight))
        if total is None:
            return
        by_token, rows = dlogits.t(), task.hidden
        if total.dtype == rows.dtype:
            torch.mm(by_token, rows, out=total) if task.first else torch.addmm(
                total, by_token, rows, out=total
            )
        elif total.is_cuda and total.dtype == torch.float32:
            mm_float32(by_token, rows, total, accumulate=not task.first)
        else:
            blocks = self.blocks()
            buffer = rows.new_empty(blocks[0][1], rows.shape[1])
            for a, b in blocks:
                product = torch.mm(by_token[a:b], rows, out=buffer[: b - a])
                total[a:b].copy_(product) if task.first else total[a:b].add_(product)


class UpcastHead(Head):
    """float32 products of half-precision operands."""

    def project(self, rows: Tensor, out: Tensor) -> None:
        """`out` = rows @ weight.T."""
        wide = rows.float()
        for a, b in self.blocks():
            torch.mm(wide, self.weight[a:b].float().t(), out=out[:, a:b])

    def add_gradients(self, task: GradientTask) -> None:
        """Two products."""
        dlogits, out, total = task.dlogits, task.dhidden, task.dweight
        if out is not None:
            wide = dlogits.new_zeros(out.shape)
            for a, b in self.blocks():
                wide.addmm_(dlogits[:, a:b], self.weight[a:b].float())
            out.copy_(wide)
        if total is None:
            return
        rows, by_token = task.hidden.float(), dlogits.t()
        if total.dtype == torch.float32:
            torch.mm(by_token, rows, out=total) if task.first else torch.addmm(
                total, by_token, rows, out=total
            )
        else:
            for a, b in self.blocks():
                total[a:b].copy_(torch.mm(by_token[a:b], rows))


def mm_float32(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """`out` (float32) = or += a @ b for half-precision a, b, whose product is never rounded to their dtype."""
    if not out.is_cuda:
        a, b = a.float(), b.float()
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif accumulate:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
