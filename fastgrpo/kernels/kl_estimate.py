"""`kl_estimate`: elementwise, with the device code of the policy loss's KL term."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo.kernels.kl_terms import kl_terms
from fastgrpo.kernels.launch import COMPILE, on_device_of
from fastgrpo.kernels.numerics import exp

_BLOCK = 1024


@triton.jit(do_not_specialize=["n"])
def _kl_kernel(
    logprob_ptr, ref_ptr, old_ptr, params_ptr, value_ptr, derivative_ptr, n,
    HAS_OLD: tl.constexpr, ESTIMATOR: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n
    logprob = tl.load(logprob_ptr + offsets, mask=inside, other=0.0)
    target = tl.load(ref_ptr + offsets, mask=inside, other=0.0)
    ratio = tl.where(inside, 1.0, 1.0)
    if HAS_OLD:
        ratio = exp(logprob - tl.load(old_ptr + offsets, mask=inside, other=0.0))
    value, slope, through_ratio, _ = kl_terms(
        logprob, target, ratio, tl.load(params_ptr), tl.load(params_ptr + 1), tl.load(params_ptr + 2),
        ESTIMATOR, GRADIENT,
    )  # fmt: skip
    tl.store(value_ptr + offsets, value, mask=inside)
    tl.store(derivative_ptr + offsets, slope + through_ratio, mask=inside)


def kl_estimate(
    logprob: Tensor,  # [N]
    ref: Tensor,  # [N]
    old: Tensor,  # [N] or [0]
    params: Tensor,  # [3] clamp_in, clamp_out, ratio_cap
    estimator: int,
    gradient: int,
) -> tuple[Tensor, Tensor]:  # value [N], derivative [N]
    """Launch `fastgrpo::kl_estimate`."""
    value, derivative = torch.empty_like(logprob), torch.empty_like(logprob)
    n = logprob.numel()
    if n:
        with on_device_of(logprob):
            _kl_kernel[(triton.cdiv(n, _BLOCK),)](
                logprob, ref, old, params, value, derivative, n,
                HAS_OLD=old.numel() > 0, ESTIMATOR=estimator, GRADIENT=gradient, BLOCK=_BLOCK,
                num_warps=4, **COMPILE,
            )  # fmt: skip
    return value, derivative
