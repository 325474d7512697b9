"""KL estimators with their derivatives, as device code; the formula is `fastgrpo.reference.kl_terms`."""

import triton
import triton.language as tl

from fastgrpo.kernels.codes import (
    ESTIMATOR_K1,
    ESTIMATOR_K2,
    ESTIMATOR_K3,
    KL_GRAD_K2,
    KL_GRAD_RATIO,
    KL_GRAD_RATIO_DETACHED,
)
from fastgrpo.kernels.numerics import exp_minus_1_minus_x, expm1


@triton.jit
def clip(x, low, high):
    """x within [low, high]; NaN stays NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def kl_terms(
    logprob, target, ratio, clamp_in, clamp_out, ratio_cap, ESTIMATOR: tl.constexpr, GRADIENT: tl.constexpr
):  # fmt: skip
    """Return value, d value / d logprob, d value / d log ratio, and where a clamp acted."""
    raw = target - logprob
    clamped = tl.abs(raw) > clamp_in
    delta = clip(raw, -clamp_in, clamp_in)
    if ESTIMATOR == ESTIMATOR_K1:
        value = -delta
        slope = tl.where(clamped, 0.0, 1.0)
    elif ESTIMATOR == ESTIMATOR_K2:
        value = 0.5 * delta * delta
        slope = -delta
    elif ESTIMATOR == ESTIMATOR_K3:
        value = exp_minus_1_minus_x(delta)
        slope = -expm1(delta)
    else:
        value = tl.abs(delta)
        slope = tl.where(delta > 0, -1.0, tl.where(delta < 0, 1.0, 0.0))
    outside = tl.abs(value) > clamp_out
    value = clip(value, -clamp_out, clamp_out)
    if GRADIENT == KL_GRAD_K2:
        slope = tl.where(clamped, 0.0, -delta)
    else:
        slope = tl.where(clamped | outside, 0.0, slope)
    through_ratio = tl.where(clamped, 0.0, 0.0)
    if GRADIENT == KL_GRAD_RATIO:
        value = ratio * value
        slope = ratio * slope
        through_ratio = value
    elif GRADIENT == KL_GRAD_RATIO_DETACHED:
        weight = tl.where(ratio > ratio_cap, ratio_cap, ratio)
        value = weight * value
        slope = weight * slope
    return value, slope, through_ratio, clamped | outside
