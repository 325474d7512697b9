"""First-order recurrence along each sequence of a flat batch: eager specification."""

import torch
from torch import Tensor


def segment_scan(
    x: Tensor,  # [N] float32 or float64
    decay: Tensor,  # [N]
    cu_seqlens: Tensor,  # [B + 1] int32
    reverse: bool,
) -> Tensor:  # [N]
    """Return y_t = x_t + decay_t * y_{t+1} within each sequence (y_{t-1} if not reverse), y = x at its first step.

    Computed in float64. A decay of exactly 0 cuts: nothing behind it, not even NaN, is seen. Tokens outside all
    sequences give 0. After k rounds each y holds the sum over 2^k steps and `reach` the product of their decays.
    """
    if not reverse:
        ends = x.numel() - cu_seqlens.flip(0)
        return segment_scan(x.flip(0), decay.flip(0), ends, True).flip(0)
    position = torch.arange(x.numel(), device=x.device)
    segment = torch.searchsorted(cu_seqlens.to(position.dtype), position, right=True)
    outside = (segment == 0) | (segment == cu_seqlens.numel())
    is_last = segment != torch.cat([segment[1:], segment.new_full((min(1, x.numel()),), -1)])
    y = torch.where(outside, 0.0, x.double())
    reach = torch.where(is_last | outside, 0.0, decay.double())
    step = 1
    while step < x.numel():
        nothing = y.new_zeros(step)
        y = torch.where(reach == 0, y, y + reach * torch.cat([y[step:], nothing]))
        reach = torch.where(reach == 0, 0.0, reach * torch.cat([reach[step:], nothing]))
        step *= 2
    return y.to(x.dtype)
