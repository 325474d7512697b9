"""Metric rows of tokens and their reduction in a fixed order: within a sequence, then over the sequences.

A sequence's numbers depend on its own tokens and their distance from its first one only, so they have the same bits
padded or packed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo.kernels.codes import METRIC_ROWS, NEG_HIGH, NEG_LOW, POS_HIGH
from fastgrpo.kernels.launch import COMPILE, on_device_of
from fastgrpo.spec import NUM_METRICS

_BLOCK = 256


@triton.jit
def finite(x):
    """Neither NaN nor infinite."""
    return tl.abs(x) < float("inf")


@triton.jit
def metric_rows(
    index, policy, kl, ratio, gain, raw, closed, clamped, clamped_kl, entropy, logprob, fault, active, advantage,
    params_ptr,
):  # fmt: skip
    """Stack the metrics, in the order of `fastgrpo.spec.METRICS`, along the axis that `index` counts."""
    clip_low = (advantage < 0) & (ratio < tl.load(params_ptr + NEG_LOW))
    clip_high = (advantage > 0) & (ratio > tl.load(params_ptr + POS_HIGH))
    clip_dual = (advantage < 0) & (ratio > tl.load(params_ptr + NEG_HIGH))
    rows = tl.where(index == 0, policy, logprob)
    rows = tl.where(index == 1, kl, rows)
    rows = tl.where(index == 2, ratio, rows)
    rows = tl.where(index == 3, gain, rows)
    rows = tl.where(index == 4, raw, rows)
    rows = tl.where(index == 5, tl.where(clip_low, 1.0, 0.0), rows)
    rows = tl.where(index == 6, tl.where(clip_high, 1.0, 0.0), rows)
    rows = tl.where(index == 7, tl.where(clip_low | clip_high, 1.0, 0.0), rows)
    rows = tl.where(index == 8, tl.where(clip_dual, 1.0, 0.0), rows)
    rows = tl.where(index == 9, tl.where(closed, 1.0, 0.0), rows)
    rows = tl.where(index == 10, tl.where(clamped, 1.0, 0.0), rows)
    rows = tl.where(index == 11, tl.where(clamped_kl, 1.0, 0.0), rows)
    rows = tl.where(index == 12, entropy, rows)
    rows = tl.where(index == 14, tl.where(fault, 1.0, 0.0), rows)
    return tl.where(index == 15, tl.where(active, 1.0, 0.0), rows)


@triton.jit
def initial_totals():
    """Sum, minimum and maximum [METRIC_ROWS] before the first token."""
    total = tl.zeros([METRIC_ROWS], tl.float64)
    return total, total + float("inf"), total - float("inf")


@triton.jit
def add_totals(total, low, high, rows, live):
    """Fold metric rows [METRIC_ROWS, BLOCK] of a block of tokens into the totals; NaN stays visible."""
    live = live[None, :]
    rows = rows.to(tl.float64)
    total += tl.sum(tl.where(live, rows, 0.0), axis=1)
    faulty = (low != low) | (tl.sum((live & (rows != rows)).to(tl.int32), axis=1) > 0)
    low = tl.minimum(low, tl.min(tl.where(live, rows, float("inf")), axis=1))
    high = tl.maximum(high, tl.max(tl.where(live, rows, -float("inf")), axis=1))
    return total, tl.where(faulty, float("nan"), low), tl.where(faulty, float("nan"), high)


@triton.jit
def store_totals(partial_ptr, sequence, total, count, low, high):
    """Write the totals of one sequence into partial [B, METRIC_ROWS, 4]."""
    cell_ptr = partial_ptr + (sequence * METRIC_ROWS + tl.arange(0, METRIC_ROWS)) * 4
    tl.store(cell_ptr, total)
    tl.store(cell_ptr + 1, tl.zeros([METRIC_ROWS], tl.float64) + count)
    tl.store(cell_ptr + 2, low)
    tl.store(cell_ptr + 3, high)


@triton.jit
def _sequence_totals_kernel(
    rows_ptr, contribution_ptr, mask_ptr, cu_seqlens_ptr, partial_ptr, partial_loss_ptr, BLOCK: tl.constexpr
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    begin = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + sequence + 1)
    index = tl.arange(0, METRIC_ROWS)[:, None]
    total, low, high = initial_totals()
    loss = tl.zeros([BLOCK], tl.float64)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        live = tl.load(mask_ptr + token, mask=token < end, other=0) != 0
        rows = tl.load(
            rows_ptr + token[None, :] * METRIC_ROWS + index, mask=live[None, :], other=0.0
        )
        total, low, high = add_totals(total, low, high, rows, live)
        loss += tl.load(contribution_ptr + token, mask=live, other=0.0)
        count += live.to(tl.int32)
    store_totals(partial_ptr, sequence, total, tl.sum(count, axis=0).to(tl.float64), low, high)
    tl.store(partial_loss_ptr + sequence, tl.sum(loss, axis=0))


@triton.jit(do_not_specialize=["num_sequences"])
def _finish_kernel(
    partial_ptr, partial_loss_ptr, metrics_ptr, loss_ptr, num_sequences, BLOCK: tl.constexpr
):  # fmt: skip
    metric = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float64)
    count = tl.zeros([BLOCK], tl.float64)
    loss = tl.zeros([BLOCK], tl.float64)
    low = total + float("inf")
    high = total - float("inf")
    for start in range(0, num_sequences, BLOCK):
        sequence = start + tl.arange(0, BLOCK).to(tl.int64)
        there = sequence < num_sequences
        cell_ptr = partial_ptr + (sequence * METRIC_ROWS + metric) * 4
        total += tl.load(cell_ptr, mask=there, other=0.0)
        count += tl.load(cell_ptr + 1, mask=there, other=0.0)
        block_low = tl.load(cell_ptr + 2, mask=there, other=float("inf"))
        block_high = tl.load(cell_ptr + 3, mask=there, other=-float("inf"))
        low = tl.where(
            (low != low) | (block_low != block_low), float("nan"), tl.minimum(low, block_low)
        )
        high = tl.where(
            (high != high) | (block_high != block_high), float("nan"), tl.maximum(high, block_high)
        )
        loss += tl.load(partial_loss_ptr + sequence, mask=there, other=0.0)
    faulty = tl.sum((low != low).to(tl.int32), axis=0) > 0
    tl.store(metrics_ptr + metric * 4, tl.sum(total, axis=0))
    tl.store(metrics_ptr + metric * 4 + 1, tl.sum(count, axis=0))
    tl.store(metrics_ptr + metric * 4 + 2, tl.where(faulty, float("nan"), tl.min(low, axis=0)))
    tl.store(metrics_ptr + metric * 4 + 3, tl.where(faulty, float("nan"), tl.max(high, axis=0)))
    if metric == 0:
        tl.store(loss_ptr, tl.sum(loss, axis=0).to(loss_ptr.dtype.element_ty))


def new_partials(num_sequences: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Space for the totals and the loss of each sequence."""
    rows = METRIC_ROWS.value
    partial = torch.empty(num_sequences, rows, 4, dtype=torch.float64, device=device)
    return partial, torch.empty(num_sequences, dtype=torch.float64, device=device)


def sequence_totals(
    rows: Tensor,  # [N, METRIC_ROWS]
    contribution: Tensor,  # [N] float64, each token's share of the loss
    mask: Tensor,  # [N]
    cu_seqlens: Tensor,  # [B + 1]
) -> tuple[Tensor, Tensor]:  # [B, METRIC_ROWS, 4], [B]
    """Reduce metric rows that were written token by token to one record per sequence."""
    num_sequences = cu_seqlens.numel() - 1
    partial, partial_loss = new_partials(num_sequences, rows.device)
    with on_device_of(rows):
        _sequence_totals_kernel[(num_sequences,)](
            rows, contribution, mask, cu_seqlens, partial, partial_loss, BLOCK=_BLOCK, num_warps=4, **COMPILE
        )  # fmt: skip
    return partial, partial_loss


def finish(partial: Tensor, partial_loss: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Reduce over the sequences; return the loss (0-dim, `dtype`) and the metrics [NUM_METRICS, 4]."""
    metrics = torch.empty(NUM_METRICS, 4, dtype=torch.float64, device=partial.device)
    loss = torch.empty((), dtype=dtype, device=partial.device)
    with on_device_of(partial):
        _finish_kernel[(NUM_METRICS,)](
            partial, partial_loss, metrics, loss, partial.shape[0], BLOCK=_BLOCK, num_warps=4, **COMPILE
        )  # fmt: skip
    return loss, metrics


def nothing(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Loss and metrics of an empty batch."""
    row = torch.tensor([0.0, 0.0, torch.inf, -torch.inf], dtype=torch.float64, device=device)
    return torch.zeros((), dtype=dtype, device=device), row.repeat(NUM_METRICS, 1)
