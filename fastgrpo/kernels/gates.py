"""Gates of the policy loss as device code; the formula is `fastgrpo.reference.gates`."""

import triton
import triton.language as tl

from fastgrpo.kernels.codes import (
    BETWEEN_THETA_OLD,
    D_CLAMP,
    GATE_BOUNDS,
    GATE_SIZE,
    GATES,
    GATES_CAPACITY,
    NUM_GATES,
    POOL_SEQ_MAX,
    POOL_SEQ_MEAN,
    POOL_TOKEN,
    SCOPE_POLICY_AND_KL,
    STAT_ENTROPY,
    STAT_K1,
    STAT_K2,
    STAT_K3,
    STAT_RATIO,
    STAT_TV,
    WHEN_NEGATIVE,
    WHEN_POSITIVE,
)
from fastgrpo.kernels.kl_terms import clip
from fastgrpo.kernels.numerics import exp, exp_minus_1_minus_x, expm1


@triton.jit
def gate_statistic(
    logprob, old, rollout, entropy, params_ptr, STAT: tl.constexpr, BETWEEN: tl.constexpr
):
    """Statistic of the policy and the one it is compared with, per token."""
    other = old if BETWEEN == BETWEEN_THETA_OLD else rollout
    limit = tl.load(params_ptr + D_CLAMP)
    u = clip(logprob - other, -limit, limit)
    p = exp(logprob)
    q = exp(other)
    if STAT == STAT_RATIO:
        value = exp(u)
    elif STAT == STAT_K1:
        value = u
    elif STAT == STAT_K2:
        value = 0.5 * u * u
    elif STAT == STAT_K3:
        value = exp_minus_1_minus_x(u)
    elif STAT == STAT_ENTROPY:
        value = entropy
    elif STAT == STAT_TV:
        value = p - q
    else:
        not_p = -expm1(logprob)
        not_p = tl.where(not_p < 1e-7, 1e-7, not_p)
        not_q = -expm1(other)
        not_q = tl.where(not_q < 1e-7, 1e-7, not_q)
        divergence = -q * u + not_q * tl.log(not_q / not_p)
        value = tl.where(p > q, divergence, tl.where(p < q, -divergence, 0.0 * divergence))
    return value


@triton.jit
def _gate_closed(
    logprob, old, rollout, entropy, advantage, gate_totals, params_ptr, GATE: tl.constexpr, STAT: tl.constexpr,
    BETWEEN: tl.constexpr, POOL: tl.constexpr, WHEN: tl.constexpr,
):  # fmt: skip
    if POOL == POOL_TOKEN:
        value = gate_statistic(logprob, old, rollout, entropy, params_ptr, STAT, BETWEEN)
    else:
        value = tl.sum(tl.where(tl.arange(0, GATES_CAPACITY) == GATE, gate_totals, 0.0), axis=0)
        value = tl.where(advantage == 0, value, value)  # as many as there are tokens
    low = tl.load(params_ptr + GATE_BOUNDS + 2 * GATE)
    high = tl.load(params_ptr + GATE_BOUNDS + 2 * GATE + 1)
    shut = (value < low) | (value > high)
    if WHEN == WHEN_POSITIVE:
        shut = shut & (advantage > 0)
    elif WHEN == WHEN_NEGATIVE:
        shut = shut & (advantage < 0)
    return shut


@triton.jit
def gates_closed(
    logprob, old, rollout, entropy, advantage, live, gate_totals, params_ptr, SPEC: tl.constexpr
):  # fmt: skip
    """Where any gate removes the policy term, and where one removes the KL term too.

    `gate_totals` [GATES_CAPACITY] holds the pooled statistic of every gate that pools over the sequence.
    """
    closed = live != live  # nowhere
    closed_kl = closed
    COUNT: tl.constexpr = SPEC[NUM_GATES]
    for k in tl.static_range(COUNT):
        shut = live & _gate_closed(
            logprob, old, rollout, entropy, advantage, gate_totals, params_ptr, k,
            SPEC[GATES + GATE_SIZE * k], SPEC[GATES + GATE_SIZE * k + 1], SPEC[GATES + GATE_SIZE * k + 2],
            SPEC[GATES + GATE_SIZE * k + 3],
        )  # fmt: skip
        closed = closed | shut
        if SPEC[GATES + GATE_SIZE * k + 4] == SCOPE_POLICY_AND_KL:
            closed_kl = closed_kl | shut
    return closed, closed_kl


@triton.jit
def add_gate_statistics(
    totals, logprob, old, rollout, entropy, live, params_ptr, SPEC: tl.constexpr
):
    """Fold a block of tokens into the running sum (or maximum) of each gate that pools over the sequence."""
    index = tl.arange(0, GATES_CAPACITY)
    COUNT: tl.constexpr = SPEC[NUM_GATES]
    for k in tl.static_range(COUNT):
        if SPEC[GATES + GATE_SIZE * k + 2] != POOL_TOKEN:
            value = gate_statistic(
                logprob, old, rollout, entropy, params_ptr, SPEC[GATES + GATE_SIZE * k], SPEC[GATES + GATE_SIZE * k + 1]
            )  # fmt: skip
            if SPEC[GATES + GATE_SIZE * k + 2] == POOL_SEQ_MAX:
                block = tl.max(tl.where(live, value, -float("inf")), axis=0)
                faulty = tl.sum((live & (value != value)).to(tl.int32), axis=0) > 0
                block = tl.where(faulty, float("nan"), block)
                folded = tl.maximum(totals, block, propagate_nan=tl.PropagateNan.ALL)
            else:
                folded = totals + tl.sum(tl.where(live, value, 0.0), axis=0)
            totals = tl.where(index == k, folded, totals)
    return totals


@triton.jit
def initial_gate_totals(length, SPEC: tl.constexpr):
    """Neutral element of each gate's pooling, in the dtype of `length`."""
    index = tl.arange(0, GATES_CAPACITY)
    totals = tl.zeros([GATES_CAPACITY], length.dtype)
    COUNT: tl.constexpr = SPEC[NUM_GATES]
    for k in tl.static_range(COUNT):
        if SPEC[GATES + GATE_SIZE * k + 2] == POOL_SEQ_MAX:
            totals = tl.where(index == k, -float("inf"), totals)
    return totals


@triton.jit
def finish_gate_totals(totals, length, SPEC: tl.constexpr):
    """Divide the means by the number of live tokens."""
    index = tl.arange(0, GATES_CAPACITY)
    COUNT: tl.constexpr = SPEC[NUM_GATES]
    for k in tl.static_range(COUNT):
        if SPEC[GATES + GATE_SIZE * k + 2] == POOL_SEQ_MEAN:
            totals = tl.where(index == k, totals / length, totals)
    return totals
