"""Elementary functions that keep their digits near zero, for any float dtype.

The GPU's fast exp2 and log2 are good to about 2^-22 *absolutely* near their zeros. Log-probs of confident tokens, k3 of
close policies and 1 - p need relative accuracy there, which these short series give. libdevice is not used: the
interpreter that tests the kernels does not have it.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exp(x):
    """e^x through the exp2 unit."""
    return tl.exp2(x * LOG2E)


@triton.jit
def exp_minus_1_minus_x(x):
    """e^x - 1 - x: the k3 estimator, by its Taylor series where the plain form cancels."""
    TERMS: tl.constexpr = 18 if x.dtype == tl.float64 else 10
    nested = x * 0.0 + 1.0
    for k in tl.static_range(TERMS, 2, -1):
        nested = 1.0 + nested * x * (1.0 / k)
    return tl.where(tl.abs(x) < 0.5, 0.5 * x * x * nested, exp(x) - 1.0 - x)


@triton.jit
def expm1(x):
    """e^x - 1."""
    return tl.where(tl.abs(x) < 0.5, x + exp_minus_1_minus_x(x), exp(x) - 1.0)


@triton.jit
def log1p_unit(x):
    """log(1 + x) for 0 <= x <= 1, by 2 artanh(x / (2 + x))."""
    TERMS: tl.constexpr = 17 if x.dtype == tl.float64 else 8
    s = x / (2.0 + x)
    square = s * s
    series = x * 0.0
    for k in tl.static_range(TERMS, -1, -1):
        series = series * square + 1.0 / (2 * k + 1)
    return 2.0 * s * series


@triton.jit
def tanh_and_slope(x):
    """tanh(x) and its derivative, with relative accuracy near 0."""
    decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    inverse = 1.0 / (1.0 + decay)
    magnitude = (1.0 - decay) * inverse
    tanh = tl.where(x < 0, -magnitude, magnitude)
    if (
        x.dtype != tl.float64
    ):  # there the cancellation in 1 - decay is far below what a logit resolves
        square = x * x
        series = tl.fma(tl.fma(square, 62.0 / 2835, -17.0 / 315), square, 2.0 / 15)
        near = tl.fma(tl.fma(series, square, -1.0 / 3) * square, x, x)
        tanh = tl.where(tl.abs(x) < 0.25, near, tanh)
    return tanh, 4.0 * decay * inverse * inverse
