"""Schema of the segment_scan op: the reference is the default kernel, csrc registers CPU and CUDA."""

import torch
from torch import Tensor

from fastgrpo import reference


@torch.library.custom_op("fastgrpo::segment_scan", mutates_args=())
def segment_scan(x: Tensor, decay: Tensor, cu_seqlens: Tensor, reverse: bool) -> Tensor:
    """Recurrence y_t = x_t + decay_t * y_{t+1} within each sequence, [N] (see the reference)."""
    return reference.segment_scan(x, decay, cu_seqlens, reverse)


@segment_scan.register_fake
def _(x: Tensor, decay: Tensor, cu_seqlens: Tensor, reverse: bool) -> Tensor:
    return torch.empty_like(x)
