"""`policy_loss`: one program per sequence, then a reduction over the sequences in a fixed order.

A program walks its tokens in blocks: once if every token stands alone; before that once to pool log-ratios and gates
over the sequence, and once to sum the gradient that flows back through the pooled log-ratio. Walks repeat the
arithmetic (about 28 bytes per token, found in the cache) instead of keeping intermediate tensors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo.kernels.codes import GATES_CAPACITY, KL_TARGET, KL_TARGET_REF, METRIC_ROWS
from fastgrpo.kernels.gates import (
    add_gate_statistics,
    finish_gate_totals,
    gates_closed,
    initial_gate_totals,
)
from fastgrpo.kernels.launch import COMPILE, on_device_of
from fastgrpo.kernels.policy_metrics import (
    add_totals,
    finish,
    finite,
    initial_totals,
    metric_rows,
    new_partials,
    nothing,
    store_totals,
)
from fastgrpo.kernels.policy_terms import (
    clamp_log_ratio,
    gradient_by_logprob,
    pooled_log_ratio,
    token_terms,
)
from fastgrpo.kernels.surrogates import lookup
from fastgrpo.spec import SPEC_GATE, SPEC_HEAD, Level, Pool, PoolGrad

_BLOCK = 512
_WARPS = 8


@triton.jit
def _optional(ptr, token, live, default, PRESENT: tl.constexpr):
    """Load a per-token input where it is given and the token lives."""
    value = default
    if PRESENT:
        value = tl.load(ptr + token, mask=live, other=0.0)
    return value


@triton.jit
def _policies(
    logprob_ptr,
    advantage_ptr,
    old_ptr,
    rollout_ptr,
    entropy_ptr,
    token,
    live,
    PRESENT: tl.constexpr,
):
    """Return logprob, advantage, old, rollout and entropy of a block, 0 where masked."""
    logprob = tl.load(logprob_ptr + token, mask=live, other=0.0)
    advantage = tl.load(advantage_ptr + token, mask=live, other=0.0)
    old = _optional(old_ptr, token, live, logprob, PRESENT[0])
    rollout = _optional(rollout_ptr, token, live, logprob, PRESENT[2])
    rollout = tl.where(rollout == rollout, rollout, logprob)
    entropy = _optional(entropy_ptr, token, live, tl.where(live, 0.0, 0.0), PRESENT[6])
    return logprob, advantage, old, rollout, entropy


@triton.jit
def _clamped(
    logprob, old, advantage, log_weight_ptr, token, live, params_ptr, PRESENT: tl.constexpr
):
    """Return raw log-ratio, the one that is pooled, where its gradient stops, and where d_clamp acted."""
    raw = logprob - old
    d, stopped, clamped = clamp_log_ratio(raw, advantage, params_ptr)
    if PRESENT[3]:
        d += tl.load(log_weight_ptr + token, mask=live, other=0.0)
    return raw, d, stopped, clamped


@triton.jit
def _pool(
    logprob_ptr, advantage_ptr, mask_ptr, old_ptr, rollout_ptr, log_weight_ptr, entropy_ptr, params_ptr, begin, end,
    SPEC: tl.constexpr, PRESENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of the log-ratios, number of live tokens (at least 1) and pooled gate statistics of a sequence."""
    dtype: tl.constexpr = params_ptr.dtype.element_ty
    total = tl.zeros([BLOCK], dtype)
    count = tl.zeros([BLOCK], dtype)
    gates = initial_gate_totals(tl.zeros([1], dtype), SPEC)
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        live = tl.load(mask_ptr + token, mask=token < end, other=0) != 0
        logprob, advantage, old, rollout, entropy = _policies(
            logprob_ptr, advantage_ptr, old_ptr, rollout_ptr, entropy_ptr, token, live, PRESENT
        )
        _, d, _, _ = _clamped(
            logprob, old, advantage, log_weight_ptr, token, live, params_ptr, PRESENT
        )
        total += tl.where(live, d, 0.0)
        count += tl.where(live, 1.0, 0.0)
        gates = add_gate_statistics(gates, logprob, old, rollout, entropy, live, params_ptr, SPEC)
    length = tl.maximum(tl.sum(count, axis=0), 1.0)
    return tl.sum(total, axis=0), length, finish_gate_totals(gates, length, SPEC)


@triton.jit
def _block(
    logprob_ptr, advantage_ptr, mask_ptr, weight_ptr, old_ptr, ref_ptr, rollout_ptr, log_weight_ptr, token_weight_ptr,
    kl_weight_ptr, entropy_ptr, params_ptr, start, end, total, length, gates,
    SPEC: tl.constexpr, CUSTOM: tl.constexpr, PRESENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Everything about a block of tokens that depends on the sequence's pooled numbers alone."""
    token = start + tl.arange(0, BLOCK)
    live = tl.load(mask_ptr + token, mask=token < end, other=0) != 0
    logprob, advantage, old, rollout, entropy = _policies(
        logprob_ptr, advantage_ptr, old_ptr, rollout_ptr, entropy_ptr, token, live, PRESENT
    )
    one = tl.where(live, 1.0, 1.0)
    weight = tl.load(weight_ptr + token, mask=live, other=0.0)
    target = old
    if SPEC[KL_TARGET] == KL_TARGET_REF:
        target = _optional(ref_ptr, token, live, logprob, PRESENT[1])
    token_weight = _optional(token_weight_ptr, token, live, one, PRESENT[4])
    kl_weight = _optional(kl_weight_ptr, token, live, one, PRESENT[5])
    raw, d, stopped, clamped = _clamped(
        logprob, old, advantage, log_weight_ptr, token, live, params_ptr, PRESENT
    )
    log_ratio, share = pooled_log_ratio(d, stopped, total, length, params_ptr, SPEC)
    closed, closed_kl = gates_closed(
        logprob, old, rollout, entropy, advantage, live, gates, params_ptr, SPEC
    )
    terms = token_terms(
        logprob, advantage, target, token_weight, kl_weight, log_ratio, closed, closed_kl, params_ptr,
        SPEC, CUSTOM, PRESENT[1] if SPEC[KL_TARGET] == KL_TARGET_REF else PRESENT[0],
    )  # fmt: skip
    return (
        token,
        live,
        logprob,
        advantage,
        entropy,
        weight,
        old,
        target,
        raw,
        share,
        closed,
        clamped,
        terms,
    )


@triton.jit
def _sequence_kernel(
    logprob_ptr, advantage_ptr, mask_ptr, weight_ptr, old_ptr, ref_ptr, rollout_ptr, log_weight_ptr, token_weight_ptr,
    kl_weight_ptr, entropy_ptr, entropy_weight_ptr, cu_seqlens_ptr, params_ptr,
    token_loss_ptr, dlogprob_ptr, partial_ptr, partial_loss_ptr,
    SPEC: tl.constexpr, CUSTOM: tl.constexpr, PRESENT: tl.constexpr, POOLED: tl.constexpr, SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = params_ptr.dtype.element_ty
    sequence = tl.program_id(0).to(tl.int64)
    begin = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64)
    total = tl.sum(tl.zeros([1], dtype), axis=0)
    length = total + 1.0
    gates = tl.zeros([GATES_CAPACITY], dtype)
    if POOLED:
        total, length, gates = _pool(
            logprob_ptr, advantage_ptr, mask_ptr, old_ptr, rollout_ptr, log_weight_ptr, entropy_ptr, params_ptr,
            begin, end, SPEC, PRESENT, BLOCK,
        )  # fmt: skip
    flow = tl.zeros([BLOCK], dtype)
    if SHARED:
        for start in range(begin, end, BLOCK):
            _, _, _, _, _, weight, _, _, _, _, _, _, terms = _block(
                logprob_ptr, advantage_ptr, mask_ptr, weight_ptr, old_ptr, ref_ptr, rollout_ptr, log_weight_ptr,
                token_weight_ptr, kl_weight_ptr, entropy_ptr, params_ptr, start, end, total, length, gates,
                SPEC, CUSTOM, PRESENT, BLOCK,
            )  # fmt: skip
            flow += tl.where(weight == 0, 0.0, weight * terms[5])
    shared_flow = tl.sum(flow, axis=0)

    index = tl.arange(0, METRIC_ROWS)[:, None]
    metric_sum, metric_low, metric_high = initial_totals()
    loss = tl.zeros([BLOCK], tl.float64)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(begin, end, BLOCK):
        token, live, logprob, advantage, entropy, weight, old, target, raw, share, closed, clamped, terms = _block(
            logprob_ptr, advantage_ptr, mask_ptr, weight_ptr, old_ptr, ref_ptr, rollout_ptr, log_weight_ptr,
            token_weight_ptr, kl_weight_ptr, entropy_ptr, params_ptr, start, end, total, length, gates,
            SPEC, CUSTOM, PRESENT, BLOCK,
        )  # fmt: skip
        token_loss, policy, kl, ratio, gain, through_ratio, direct, clamped_kl = terms
        through = shared_flow if SHARED else weight * through_ratio
        if not SHARED:
            through = tl.where(weight == 0, 0.0, through)
        dlogprob = gradient_by_logprob(weight, through, direct, share, SPEC, SHARED)
        dlogprob = tl.where(live, dlogprob, 0.0)
        token_loss = tl.where(live, token_loss, 0.0)
        bonus = _optional(entropy_weight_ptr, token, live, tl.where(live, 0.0, 0.0), PRESENT[7])
        loss += tl.where(weight == 0, 0.0, weight * token_loss).to(tl.float64)
        loss -= tl.where(bonus == 0, 0.0, bonus * entropy).to(tl.float64)
        count += live.to(tl.int32)
        there = token < end
        tl.store(token_loss_ptr + token, token_loss, mask=there)
        tl.store(dlogprob_ptr + token, dlogprob, mask=there)
        good = finite(logprob) & finite(old) & finite(target) & finite(token_loss)
        active = (dlogprob != 0) | (bonus != 0)
        rows = metric_rows(
            index, policy[None, :], kl[None, :], ratio[None, :], gain[None, :], raw[None, :], closed[None, :],
            clamped[None, :], clamped_kl[None, :], entropy[None, :], logprob[None, :], (good == 0)[None, :],
            active[None, :], advantage[None, :], params_ptr,
        )  # fmt: skip
        metric_sum, metric_low, metric_high = add_totals(
            metric_sum, metric_low, metric_high, rows, live
        )
    metric_count = tl.sum(count, axis=0).to(tl.float64)
    store_totals(partial_ptr, sequence, metric_sum, metric_count, metric_low, metric_high)
    tl.store(partial_loss_ptr + sequence, tl.sum(loss, axis=0))


def is_pooled(spec: list[int]) -> bool:
    """Whether a token needs to know its sequence: a pooled log-ratio or a gate on a pooled statistic."""
    pools = spec[SPEC_HEAD + 2 :: SPEC_GATE][: spec[SPEC_HEAD - 1]]
    return spec[0] != Level.TOKEN or any(pool != Pool.TOKEN for pool in pools)


def policy_loss(
    logprob: Tensor,  # [N], float32 or float64 like every per-token tensor; all are contiguous
    advantage: Tensor,  # [N]
    mask: Tensor,  # [N] bool
    weight: Tensor,  # [N]
    old: Tensor,  # [N] or [0], like all that follow up to entropy_weight
    ref: Tensor,
    rollout: Tensor,
    log_weight: Tensor,
    token_weight: Tensor,
    kl_weight: Tensor,
    entropy: Tensor,
    entropy_weight: Tensor,
    cu_seqlens: Tensor,  # [B + 1] int32
    params: Tensor,  # [NUM_PARAMS]
    spec: list[int],
    surrogate: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch `fastgrpo::policy_loss`: loss [], token_loss [N], dlogprob [N], metrics [NUM_METRICS, 4] float64."""
    token_loss, dlogprob = torch.empty_like(logprob), torch.empty_like(logprob)
    num_sequences = cu_seqlens.numel() - 1
    if logprob.numel() == 0 or num_sequences == 0:
        loss, metrics = nothing(logprob.dtype, logprob.device)
        return loss, token_loss, dlogprob, metrics
    optional = (old, ref, rollout, log_weight, token_weight, kl_weight, entropy, entropy_weight)
    partial, partial_loss = new_partials(num_sequences, logprob.device)
    with on_device_of(logprob):
        _sequence_kernel[(num_sequences,)](
            logprob, advantage, mask, weight, *optional, cu_seqlens, params, token_loss, dlogprob,
            partial, partial_loss,
            SPEC=tuple(spec), CUSTOM=lookup(surrogate), PRESENT=tuple(x.numel() > 0 for x in optional),
            POOLED=is_pooled(spec), SHARED=spec[0] != Level.TOKEN and spec[1] == PoolGrad.SHARED,
            BLOCK=_BLOCK, num_warps=_WARPS, **COMPILE,
        )  # fmt: skip
    loss, metrics = finish(partial, partial_loss, logprob.dtype)
    return loss, token_loss, dlogprob, metrics
