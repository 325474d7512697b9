"""The policy term and everything a token contributes, as device code shared by `policy_loss` and `grpo_loss`.

The formula is `fastgrpo.reference.policy_loss`; the functions take blocks of tokens and single tokens alike. A masked
token arrives as zeros and leaves as zeros.
"""

import triton
import triton.language as tl

from fastgrpo.kernels.codes import (
    BETA,
    D_CLAMP,
    ESTIMATOR,
    ESTIMATOR_NONE,
    KL_CLAMP_IN,
    KL_CLAMP_OUT,
    KL_GRAD,
    KL_RATIO_CAP,
    LEVEL,
    LEVEL_SEQ_MEAN,
    LEVEL_TOKEN,
    LOG_HIGH,
    LOG_LOW,
    NEG_HIGH,
    NEG_LOW,
    POOL_HIGH,
    POOL_LOW,
    POS_HIGH,
    POS_LOW,
    SHAPE,
    SHAPE_HARD,
    SHAPE_NEG_A,
    SHAPE_NEG_B,
    SHAPE_POS_A,
    SHAPE_POS_B,
    SHAPE_SIGMOID,
    SURROGATE,
    SURROGATE_CUSTOM,
    SURROGATE_RATIO,
    USER_0,
)
from fastgrpo.kernels.kl_terms import clip, kl_terms
from fastgrpo.kernels.numerics import exp


@triton.jit
def clamp_log_ratio(raw, advantage, params_ptr):
    """Return the clamped log-ratio, where its gradient stops, and where d_clamp acted."""
    limit = tl.load(params_ptr + D_CLAMP)
    low = tl.load(params_ptr + LOG_LOW)
    high = tl.load(params_ptr + LOG_HIGH)
    clamped = tl.abs(raw) > limit
    d = clip(raw, -limit, limit)
    over = (advantage > 0) & (d > high)
    under = (advantage < 0) & (d < low)
    d = tl.where(over, high, tl.where(under, low, d))
    return d, clamped | over | under, clamped


@triton.jit
def pooled_log_ratio(d, stopped, total, length, params_ptr, SPEC: tl.constexpr):
    """Return the log-ratio that each token uses and its derivative by the token's own log-prob.

    `d` carries the log weight already; `total` is its sum over the sequence and `length` the number of live tokens.
    """
    pooled = d
    share = tl.where(stopped, 0.0, 1.0)
    if SPEC[LEVEL] != LEVEL_TOKEN:
        if SPEC[LEVEL] == LEVEL_SEQ_MEAN:
            total = total * (1.0 / length)
            share = share * (1.0 / length)
        pooled = tl.where(stopped, total, total)
    low = tl.load(params_ptr + POOL_LOW)
    high = tl.load(params_ptr + POOL_HIGH)
    outside = (pooled < low) | (pooled > high)
    return clip(pooled, low, high), tl.where(outside, 0.0, share)


@triton.jit
def _by_sign(positive, params_ptr, POSITIVE: tl.constexpr, NEGATIVE: tl.constexpr):
    return tl.where(positive, tl.load(params_ptr + POSITIVE), tl.load(params_ptr + NEGATIVE))


@triton.jit
def policy_term(
    log_ratio, ratio, logprob, advantage, params_ptr, SPEC: tl.constexpr, CUSTOM: tl.constexpr
):
    """Return value, derivative by the log-ratio, direct derivative by the log-prob, and gain."""
    idle = advantage == 0
    positive = advantage > 0
    zero = tl.where(idle, 0.0, 0.0)
    if SPEC[SURROGATE] == SURROGATE_CUSTOM:
        value, through_ratio = CUSTOM(log_ratio, advantage, params_ptr + USER_0)
        gain = tl.where(idle, 0.0, -through_ratio / tl.where(idle, 1.0, advantage))
        direct = zero
    else:
        if SPEC[SHAPE] == SHAPE_HARD:
            low = _by_sign(positive, params_ptr, POS_LOW, NEG_LOW)
            high = _by_sign(positive, params_ptr, POS_HIGH, NEG_HIGH)
            weight = clip(ratio, low, high)
            slope = tl.where((ratio < low) | (ratio > high), 0.0, ratio)
        elif SPEC[SHAPE] == SHAPE_SIGMOID:
            tau = _by_sign(positive, params_ptr, SHAPE_POS_A, SHAPE_NEG_A)
            x = tau * (ratio - 1.0)
            decay = exp(-tl.abs(x))
            inverse = 1.0 / (1.0 + decay)
            weight = 4.0 / tau * tl.where(x < 0, decay * inverse, inverse)
            slope = 4.0 * decay * inverse * inverse * ratio
        else:
            k = _by_sign(positive, params_ptr, SHAPE_POS_A, SHAPE_NEG_A)
            lam = _by_sign(positive, params_ptr, SHAPE_POS_B, SHAPE_NEG_B)
            weight = exp(lam + k * log_ratio - lam * ratio)
            slope = weight * (k - lam * ratio)
        if SPEC[SURROGATE] == SURROGATE_RATIO:
            gain = tl.where(idle, 0.0, slope)
            value = tl.where(idle, 0.0, -advantage * weight)
            through_ratio = -advantage * gain
            direct = zero
        else:
            gain = tl.where(idle, 0.0, weight)
            value = tl.where(idle, 0.0, -advantage * weight * logprob)
            through_ratio = zero
            direct = -advantage * gain
    return value, through_ratio, direct, gain


@triton.jit
def weigh(value, factor, shut):
    """value * factor, exactly 0 where the factor is 0 or a gate is shut."""
    return tl.where(shut | (factor == 0), 0.0, value * factor)


@triton.jit
def token_terms(
    logprob, advantage, target, token_weight, kl_weight, log_ratio, closed, closed_kl, params_ptr,
    SPEC: tl.constexpr, CUSTOM: tl.constexpr, HAS_TARGET: tl.constexpr,
):  # fmt: skip
    """Return token loss, policy term, KL, ratio, gain, derivatives by log-ratio and log-prob, and where KL was clamped.

    Weights and gates of the single token are included, the reduction weight is not.
    """
    ratio = exp(log_ratio)
    policy, through_ratio, direct, gain = policy_term(
        log_ratio, ratio, logprob, advantage, params_ptr, SPEC, CUSTOM
    )
    policy = weigh(policy, token_weight, closed)
    through_ratio = weigh(through_ratio, token_weight, closed)
    direct = weigh(direct, token_weight, closed)
    token_loss = policy
    kl = tl.where(closed, 0.0, 0.0)
    clamped = closed != closed  # nowhere
    if SPEC[ESTIMATOR] != ESTIMATOR_NONE and HAS_TARGET:
        kl, slope, kl_ratio, clamped = kl_terms(
            logprob, target, ratio, tl.load(params_ptr + KL_CLAMP_IN), tl.load(params_ptr + KL_CLAMP_OUT),
            tl.load(params_ptr + KL_RATIO_CAP), SPEC[ESTIMATOR], SPEC[KL_GRAD],
        )  # fmt: skip
        beta = tl.load(params_ptr + BETA)
        kl_weight = tl.where(beta == 0, 0.0, kl_weight)  # beta = 0 removes an infinite KL too
        token_loss = policy + weigh(beta * kl, kl_weight, closed_kl)
        direct = direct + weigh(beta * slope, kl_weight, closed_kl)
        through_ratio = through_ratio + weigh(beta * kl_ratio, kl_weight, closed_kl)
    return (
        token_loss,
        policy,
        kl,
        ratio,
        tl.where(closed, 0.0, gain),
        through_ratio,
        direct,
        clamped,
    )


@triton.jit
def gradient_by_logprob(weight, through, direct, share, SPEC: tl.constexpr, SHARED: tl.constexpr):
    """d loss / d logprob; `through` is the sequence's sum of weighted through_ratio where SHARED, else the token's."""
    if not SHARED and SPEC[LEVEL] == LEVEL_SEQ_MEAN:
        share = tl.where(
            share == 0, 0.0, 1.0
        )  # the token's own log-ratio stands for the pooled one
    return tl.where(weight == 0, 0.0, weight * direct) + tl.where(share == 0, 0.0, through * share)
