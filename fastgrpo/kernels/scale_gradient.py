"""`scale_gradient_`: multiplies a stored gradient by the upstream gradient, which is read on the device.

The usual factor is exactly 1: then a program reads one number and returns. Programs walk the tensor with a fixed
stride, so that this case costs the launch of a few thousand programs, not one per block.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastgrpo.kernels.launch import COMPILE, on_device_of

_BLOCK = 4096
_PROGRAMS = 2048


@triton.jit(do_not_specialize=["n", "num_programs"])
def _scale_kernel(grad_ptr, scale_ptr, n, num_programs, BLOCK: tl.constexpr):
    scale = tl.load(scale_ptr)
    if scale == 1.0:
        return
    for block in range(tl.program_id(0), tl.cdiv(n, BLOCK), num_programs):
        offsets = (tl.zeros([BLOCK], tl.int64) + block) * BLOCK + tl.arange(0, BLOCK)
        if block < n // BLOCK:
            grad = tl.load(grad_ptr + offsets).to(scale.dtype)
            tl.store(grad_ptr + offsets, (grad * scale).to(grad_ptr.dtype.element_ty))
        else:
            inside = offsets < n
            grad = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(scale.dtype)
            tl.store(grad_ptr + offsets, (grad * scale).to(grad_ptr.dtype.element_ty), mask=inside)


def scale_gradient_(
    grad: Tensor,  # any shape
    scale: Tensor,  # [1]
) -> None:
    """Launch `fastgrpo::scale_gradient_`."""
    n = grad.numel()
    if n == 0:
        return
    if not grad.is_contiguous():
        grad.mul_(scale)  # rows of a wider buffer
        return
    programs = min(triton.cdiv(n, _BLOCK), _PROGRAMS)
    with on_device_of(grad):
        _scale_kernel[(programs,)](grad, scale, n, programs, BLOCK=_BLOCK, num_warps=8, **COMPILE)
