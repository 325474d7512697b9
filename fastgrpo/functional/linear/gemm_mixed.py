"""Half-precision products with float32 sums: by a GPU's BLAS, and by the compiled products of `ops.head_products`."""

import torch
from torch import Tensor

from fastgrpo.functional.linear.gemm import GradientTask, Head, mm_float32
from fastgrpo.ops import head_products as ops


def target_residual(dlogits: Tensor, column: Tensor, dtype: torch.dtype) -> Tensor:
    """What rounding to `dtype` takes [k] from the column of each row's token, as a rule its largest entry.

    Adding it back brings the error of the gradients from 1.44 of the floor to within some per cent.
    """
    exact = dlogits.gather(1, column[:, None])[:, 0]
    return exact - exact.to(dtype).float()


class MixedHead(Head):
    """cuBLAS, which takes half-precision operands and returns its float32 sums."""

    @property
    def scratch_dtype(self) -> torch.dtype | None:
        """Dtype of the rounded gradient of the logits."""
        return self.dtype

    def writes(self, dtype: torch.dtype) -> bool:
        """The correction of the tokens' rows needs the float32 sum."""
        return False

    def project(self, rows: Tensor, out: Tensor) -> None:
        """`out` = rows @ weight.T."""
        mm_float32(rows, self.weight.t(), out)

    def add_gradients(self, task: GradientTask) -> None:
        """Two products with the rounded gradient; then what rounding left, of every entry or of the tokens' entries."""
        dlogits, column = task.dlogits, task.column()
        operand = torch.empty_like(dlogits, dtype=self.dtype)
        wide = None
        if task.dhidden is not None:
            wide = torch.empty(task.dhidden.shape, dtype=torch.float32, device=dlogits.device)
        operand.copy_(dlogits)
        self._multiply(operand, task, wide, accumulate=False)
        if self.mode == "split":
            operand.copy_(dlogits.sub_(operand))
            self._multiply(operand, task, wide, accumulate=True)
        else:
            residual = target_residual(dlogits, column, self.dtype)[:, None]
            if wide is not None:
                wide.addcmul_(residual, self.weight[column].float())
            if task.dweight is not None:
                task.dweight.index_put_((column,), residual * task.hidden.float(), accumulate=True)
        if task.dhidden is not None and wide is not None:
            task.dhidden.copy_(wide)

    def _multiply(
        self, operand: Tensor, task: GradientTask, wide: Tensor | None, accumulate: bool
    ) -> None:
        if wide is not None:
            mm_float32(operand, self.weight, wide, accumulate)
        if task.dweight is not None:
            mm_float32(operand.t(), task.hidden, task.dweight, accumulate or not task.first)


class NativeHead(Head):
    """Compiled bfloat16 products with float32 sums, for CPUs with AVX512-BF16."""

    @property
    def narrows(self) -> bool:
        """Gradients wait in bfloat16, next to the float32 logits of the next rows, until the workspace is full."""
        return self.mode == "mixed"

    def writes(self, dtype: torch.dtype) -> bool:
        """Results are rounded once, from the float32 sums."""
        return dtype in (torch.bfloat16, torch.float32)

    def rows(self, hidden: Tensor) -> Tensor:
        """Rows that are contiguous by themselves."""
        hidden = hidden.to(self.dtype)
        return hidden if hidden.stride(1) == 1 else hidden.contiguous()

    def project(self, rows: Tensor, out: Tensor) -> None:
        """`out` = rows @ weight.T."""
        ops.head_logits(rows, self.weight, out)

    def add_gradients(self, task: GradientTask) -> None:
        """Two products, corrected where the tokens' entries were rounded."""
        residual = (
            task.hidden.new_empty(0, dtype=torch.float32)
            if task.residual is None
            else task.residual
        )
        corrected = (residual, task.target, self.mode == "split")
        out = task.dhidden
        if out is not None and self.writes(out.dtype) and out.stride(1) == 1:
            ops.head_hidden_gradient(task.dlogits, self.weight, *corrected, out)
        elif out is not None:
            wide = torch.empty(out.shape, dtype=torch.float32)
            ops.head_hidden_gradient(task.dlogits, self.weight, *corrected, wide)
            out.copy_(wide)
        if task.dweight is not None:
            ops.head_weight_gradient(
                task.dlogits, task.hidden, *corrected, not task.first, task.dweight
            )
