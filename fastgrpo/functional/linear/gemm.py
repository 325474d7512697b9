"""The three matrix products of a language-model head, by device, dtype and wanted precision of the logits.

direct   operands, logits and products in one dtype: every peer's way; half-precision logits are rounded
mixed    half-precision operands, float32 logits and float32 sums: the products run at half-precision speed (CUDA)
upcast   half-precision operands copied to float32 block by block: exact, at the speed of float32 products (CPU)
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["auto", "float32", "input"]
Mode = Literal["direct", "mixed", "upcast"]
HALF = (torch.float16, torch.bfloat16)
BLOCK_BYTES = (
    32 << 20
)  # of float32 copies of the weight, or of rounded products on their way into a float32 sum


def choose_mode(precision: Precision, dtype: torch.dtype, device: torch.device) -> Mode:
    """How to multiply operands of `dtype`."""
    if dtype not in HALF or precision == "input":
        return "direct"
    if device.type == "cuda":
        return "mixed"
    # torch multiplies float16 on a CPU at a hundredth of the speed of float32.
    return "upcast" if precision == "float32" or dtype == torch.float16 else "direct"


def mm_float32(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """`out` (float32) = or += a @ b for half-precision a, b, whose product is never rounded to their dtype."""
    if out.device.type != "cuda":
        a, b = a.float(), b.float()
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif accumulate:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


@dataclass(frozen=True)
class Head:
    """Weight and bias of a head in the dtype they are multiplied in."""

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

    def describe(self) -> str:
        """One line for the log and the report."""
        operands, logits = (str(d).removeprefix("torch.") for d in (self.dtype, self.logits_dtype))
        return f"{self.weight.device.type}, {operands} products ({self.mode}), {logits} logits"

    def _blocks(self) -> list[tuple[int, int]]:
        vocabulary, hidden = self.weight.shape
        size = max(BLOCK_BYTES // (4 * max(hidden, 1)), 1)
        return [(a, min(a + size, vocabulary)) for a in range(0, vocabulary, size)]

    def logits(self, rows: Tensor, out: Tensor) -> None:
        """`out` [n, V] = rows [n, H] @ weight.T + bias."""
        if self.mode == "direct":
            if self.bias is None:
                torch.mm(rows, self.weight.t(), out=out)
            else:
                torch.addmm(self.bias.to(rows.dtype), rows, self.weight.t(), out=out)
            return
        if self.mode == "mixed":
            mm_float32(rows, self.weight.t(), out)
        else:
            wide = rows.float()
            for a, b in self._blocks():
                torch.mm(wide, self.weight[a:b].float().t(), out=out[:, a:b])
        if self.bias is not None:
            out.add_(self.bias)

    def hidden_gradient(self, dlogits: Tensor, out: Tensor) -> None:
        """`out` [n, H] = dlogits [n, V] @ weight, rounded once."""
        if self.mode == "upcast":
            total = dlogits.new_zeros(out.shape)
            for a, b in self._blocks():
                total.addmm_(dlogits[:, a:b], self.weight[a:b].float())
            out.copy_(total)
        elif out.dtype == dlogits.dtype:
            torch.mm(dlogits, self.weight, out=out)
        elif self.mode == "mixed" and out.dtype == torch.float32:
            mm_float32(dlogits, self.weight, out)
        else:
            out.copy_(torch.mm(dlogits, self.weight))

    def add_weight_gradient(
        self, dlogits: Tensor, rows: Tensor, total: Tensor, first: bool
    ) -> None:
        """`total` [V, H] = (for the first chunk) or += dlogits.T @ rows [n, H]."""
        if self.mode == "upcast":
            rows = rows.float()
        by_token = dlogits.t()
        if total.dtype == rows.dtype:
            torch.mm(by_token, rows, out=total) if first else torch.addmm(
                total, by_token, rows, out=total
            )
        elif total.dtype == torch.float32 and (self.mode == "mixed" or total.device.type == "cuda"):
            mm_float32(by_token, rows, total, accumulate=not first)
        else:
            for a, b in self._blocks():
                product = torch.mm(by_token[a:b], rows)
                total[a:b].copy_(product) if first else total[a:b].add_(product)
