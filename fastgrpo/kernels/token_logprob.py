"""`token_logprob`: one program per row on grid axis 0.

Forward reads a live row once (V * itemsize bytes) and writes three numbers; backward reads and writes it once. Masked
rows and rows without upstream gradient are not read at all.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo.kernels.launch import on_device_of, row_config, row_shape, same_shift
from fastgrpo.kernels.numerics import LN2, LOG2E, exp, expm1
from fastgrpo.kernels.row import row_pointer, row_statistics
from fastgrpo.kernels.row_gradient import row_gradient, zero_row


@triton.jit
def load_units(
    row, temperature_ptr, temperature_stride, logit_params_ptr, NUM_LOGIT_PARAMS: tl.constexpr
):
    """Return c = log2(e) * dx/du, dx/du as the sum of two numbers, scale / softcap, softcap, and dx/dz.

    dx/du is scale / temperature, or 1 / temperature under a softcap, where dx/dz lacks the tanh's slope.
    """
    temperature = tl.load(temperature_ptr + row * temperature_stride)
    scale = temperature * 0.0 + 1.0
    inner = scale
    softcap = scale
    numerator = scale
    if NUM_LOGIT_PARAMS >= 1:
        scale = tl.load(logit_params_ptr)
        numerator = scale
    if NUM_LOGIT_PARAMS >= 2:
        softcap = tl.load(logit_params_ptr + 1)
        inner = scale / softcap
        numerator = temperature * 0.0 + 1.0
    slope = numerator / temperature
    slope_low = tl.fma(-slope, temperature, numerator) / temperature
    return slope * LOG2E, slope, slope_low, inner, softcap, scale / temperature


@triton.jit
def _forward_kernel(
    logits_ptr, token_ids_ptr, mask_ptr, temperature_ptr, logit_params_ptr, logprob_ptr, entropy_ptr, lse_ptr,
    stride_n, temperature_stride, n_cols,
    HAS_MASK: tl.constexpr, NUM_LOGIT_PARAMS: tl.constexpr, ENTROPY: tl.constexpr,
    ROWS: tl.constexpr, VEC: tl.constexpr, LOADS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if HAS_MASK and not tl.load(mask_ptr + row):
        tl.store(logprob_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
        if ENTROPY:
            tl.store(entropy_ptr + row, 0.0)
        return
    token_id = tl.load(token_ids_ptr + row)
    target = tl.minimum(tl.maximum(token_id, 0), n_cols - 1).to(tl.int32)
    c, slope, slope_low, inner, softcap, _ = load_units(
        row, temperature_ptr, temperature_stride, logit_params_ptr, NUM_LOGIT_PARAMS
    )
    logprob, entropy, lse = row_statistics(
        row_pointer(logits_ptr, row, stride_n, ALIGNED, VEC), target, n_cols, c,
        slope, slope_low, inner, softcap,
        ALIGNED, NUM_LOGIT_PARAMS >= 2, ENTROPY, ROWS, VEC, LOADS, "",
    )  # fmt: skip
    bad_id = token_id != target
    tl.store(logprob_ptr + row, tl.where(bad_id, float("nan"), logprob))
    tl.store(lse_ptr + row, tl.where(bad_id, float("nan"), lse))
    if ENTROPY:
        tl.store(entropy_ptr + row, tl.where(bad_id, float("nan"), entropy))


@triton.jit
def gradient_coefficients(logprob, entropy, dlogprob, dentropy, slope):
    """Return a, b and d_target of `row_gradient`; a target of probability 0 passes nothing through its log-prob."""
    dlogprob = tl.where(logprob == -float("inf"), 0.0, dlogprob)
    a = -slope * (dlogprob + dentropy * entropy)
    b = -slope * dentropy * LN2
    p = exp(logprob)
    through_entropy = tl.where(p == 0, 0.0, dentropy * p * (logprob + entropy))
    d_target = slope * (-dlogprob * expm1(logprob) - through_entropy)
    return tl.where(logprob == logprob, a, logprob), b, d_target


@triton.jit
def _backward_kernel(
    logits_ptr, token_ids_ptr, temperature_ptr, logit_params_ptr, logprob_ptr, entropy_ptr, lse_ptr,
    dlogprob_ptr, dentropy_ptr, dlogits_ptr,
    stride_n, stride_out_n, temperature_stride, n_cols,
    HAS_DLOGPROB: tl.constexpr, HAS_DENTROPY: tl.constexpr, NUM_LOGIT_PARAMS: tl.constexpr,
    ROWS: tl.constexpr, VEC: tl.constexpr, LOADS: tl.constexpr, ALIGNED: tl.constexpr, SAME_SHIFT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    out_ptr = row_pointer(dlogits_ptr, row, stride_out_n, ALIGNED and SAME_SHIFT, VEC)
    logprob = tl.load(logprob_ptr + row)
    dlogprob = logprob * 0.0
    dentropy = dlogprob
    entropy = dlogprob
    if HAS_DLOGPROB:
        dlogprob = tl.load(dlogprob_ptr + row)
        dlogprob = tl.where(logprob == -float("inf"), 0.0, dlogprob)
    if HAS_DENTROPY:
        dentropy = tl.load(dentropy_ptr + row)
        entropy = tl.load(entropy_ptr + row)
    if (dlogprob == 0) & (dentropy == 0):
        zero_row(out_ptr, n_cols, ALIGNED, SAME_SHIFT, ROWS, VEC)
        return
    target = tl.load(token_ids_ptr + row)
    target = tl.minimum(tl.maximum(target, 0), n_cols - 1).to(tl.int32)
    c, _, _, inner, softcap, slope = load_units(
        row, temperature_ptr, temperature_stride, logit_params_ptr, NUM_LOGIT_PARAMS
    )
    a, b, d_target = gradient_coefficients(logprob, entropy, dlogprob, dentropy, slope)
    row_gradient(
        row_pointer(logits_ptr, row, stride_n, ALIGNED, VEC), out_ptr, target, n_cols, c, inner, softcap,
        logprob, tl.load(lse_ptr + row), a, b, d_target,
        ALIGNED, SAME_SHIFT, NUM_LOGIT_PARAMS >= 2, HAS_DENTROPY, ROWS, VEC, LOADS, "evict_first",
    )  # fmt: skip


def forward(
    logits: Tensor,  # [N, V]
    token_ids: Tensor,  # [N]
    mask: Tensor,  # [N] or [0]
    temperature: Tensor,  # [1] or [N]
    logit_params: Tensor,  # [0], [1] or [2]
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # logprob [N], entropy [N] or [0], lse [N]
    """Launch the forward of `fastgrpo::token_logprob_fwd`."""
    n, n_cols = logits.shape
    logprob = torch.empty(n, dtype=temperature.dtype, device=logits.device)
    lse = torch.empty_like(logprob)
    entropy = torch.empty_like(logprob) if with_entropy else logprob.new_empty(0)
    if n == 0:
        return logprob, entropy, lse
    softcap = logit_params.numel() == 2
    config = row_config(logits, softcap)
    with on_device_of(logits):
        _forward_kernel[(n,)](
            logits, token_ids, mask, temperature, logit_params, logprob, entropy, lse,
            logits.stride(0), int(temperature.numel() > 1), n_cols,
            HAS_MASK=mask.numel() > 0, NUM_LOGIT_PARAMS=logit_params.numel(), ENTROPY=with_entropy,
            **row_shape(logits, config)._asdict(), **config.options(),
        )  # fmt: skip
    return logprob, entropy, lse


def backward(
    logits: Tensor,  # [N, V]
    token_ids: Tensor,  # [N]
    temperature: Tensor,  # [1] or [N]
    logit_params: Tensor,  # [0], [1] or [2]
    logprob: Tensor,  # [N]
    entropy: Tensor,  # [N] or [0]
    lse: Tensor,  # [N]
    dlogprob: Tensor,  # [N] or [0]
    dentropy: Tensor,  # [N] or [0]
    dlogits: Tensor,  # [N, V], may be the memory of logits
) -> None:
    """Launch the backward of `fastgrpo::token_logprob_bwd`."""
    n, n_cols = logits.shape
    if n == 0:
        return
    softcap = logit_params.numel() == 2
    config = row_config(logits, softcap)
    with on_device_of(logits):
        _backward_kernel[(n,)](
            logits, token_ids, temperature, logit_params, logprob, entropy, lse, dlogprob, dentropy, dlogits,
            logits.stride(0), dlogits.stride(0), int(temperature.numel() > 1), n_cols,
            HAS_DLOGPROB=dlogprob.numel() > 0, HAS_DENTROPY=dentropy.numel() > 0,
            NUM_LOGIT_PARAMS=logit_params.numel(),
            **row_shape(logits, config)._asdict(), SAME_SHIFT=same_shift(logits, dlogits),
            **config.options(),
        )  # fmt: skip
