"""segment_scan: rewards to go, GAE and other first-order recurrences along the tokens of each sequence."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgrpo.functional.checks import (
    data_check,
    describe,
    is_readable,
    needs_grad,
    require_detached,
    require_device,
    require_float,
    require_shape,
    require_tensor,
)
from fastgrpo.ops import segment_scan as ops
from fastgrpo.reference.token_logprob import accumulate_dtype


class Sequences(NamedTuple):
    """Where the sequences of a padded or packed batch lie in its flat tokens."""

    cu_seqlens: Tensor  # [B + 1] int32
    shape: torch.Size  # of the tensors that go with it


def check_ends(cu_seqlens: Tensor, tokens: int) -> None:
    """Raise unless the ends rise from 0 to at most the number of tokens, where they can be read for nothing."""
    if is_readable(cu_seqlens):
        inside = (cu_seqlens[0] == 0) & (cu_seqlens[-1] <= tokens)
        data_check(
            (cu_seqlens[1:] >= cu_seqlens[:-1]).all() & inside,
            f"cu_seqlens must rise from 0 to at most {tokens}, got {cu_seqlens}",
        )


def sequences(name: str, tokens: Tensor, cu_seqlens: Tensor | None) -> Sequences:
    """Sequences of a padded [B, T] tensor, or of a packed [N] one with the ends of its sequences."""
    if cu_seqlens is None:
        if tokens.dim() != 2:
            raise ValueError(
                f"{name} must have shape [B, T], or [N] with cu_seqlens, got {describe(tokens)}"
            )
        rows, length = tokens.shape
        steps = torch.arange(rows + 1, dtype=torch.int32, device=tokens.device)
        return Sequences(steps * length, tokens.shape)
    require_tensor("cu_seqlens", cu_seqlens, (torch.int32, torch.int64), "int32")
    require_device("cu_seqlens", cu_seqlens, tokens, name)
    if tokens.dim() != 1 or cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        raise ValueError(
            f"packed input needs {name} of shape [N] and cu_seqlens of shape [B + 1], "
            f"got {describe(tokens)} and {describe(cu_seqlens)}"
        )
    check_ends(cu_seqlens, tokens.numel())
    return Sequences(cu_seqlens.to(torch.int32), tokens.shape)


class SegmentScanFunction(torch.autograd.Function):
    """The adjoint of a scan is the scan in the other direction with the decays moved by one token."""

    @staticmethod
    def forward(x: Tensor, decay: Tensor, cu_seqlens: Tensor, reverse: bool) -> Tensor:
        """Run the op."""
        result: Tensor = ops.segment_scan(x, decay, cu_seqlens, reverse)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the decays."""
        _, decay, cu_seqlens, ctx.reverse = inputs
        ctx.save_for_backward(decay, cu_seqlens)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        """Gradient of x; what a roll carries over a sequence's end is never read.

        It is a scan of dy, so any further derivative is one more scan.
        """
        decay, cu_seqlens = ctx.saved_tensors
        moved = torch.roll(decay, 1 if ctx.reverse else -1)
        return _scan(dy.contiguous(), moved, cu_seqlens, not ctx.reverse), None, None, None


def _scan(x: Tensor, decay: Tensor, cu_seqlens: Tensor, reverse: bool) -> Tensor:
    if needs_grad(x):
        result: Tensor = SegmentScanFunction.apply(x, decay, cu_seqlens, reverse)
        return result
    return ops.segment_scan(x, decay, cu_seqlens, reverse)


def segment_scan(
    x: Tensor,  # [B, T], or [N] with cu_seqlens
    decay: float | Tensor = 1.0,  # a number, or one value per token
    *,
    cu_seqlens: Tensor | None = None,  # [B + 1] int32
    reverse: bool = True,
) -> Tensor:
    """Running sum from the right: y_t = x_t + decay_t * y_{t+1} within each sequence (from the left if not reverse).

    With decay = gamma and rewards x these are the discounted rewards to go. A decay of exactly 0 cuts the sequence.
    Sums are kept in float64; the bits are the same padded at the end or packed. Differentiable in x.

    Returns:
        The shape of x, float32 (float64 for float64 x).

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: shapes or devices disagree, or decay requires grad.
    """
    require_float("x", x)
    layout = sequences("x", x, cu_seqlens)
    if isinstance(decay, Tensor):
        require_float("decay", decay)
        require_detached("decay", decay)
        require_shape("decay", decay, x.shape, "one value per token of x")
        require_device("decay", decay, x, "x")
    else:
        decay = torch.full_like(x, decay, requires_grad=False)
    dtype = accumulate_dtype(x.dtype)
    flat = x.to(dtype).reshape(-1).contiguous()
    factors = decay.to(dtype).reshape(-1).contiguous()
    return _scan(flat, factors, layout.cu_seqlens, reverse).view(layout.shape)
