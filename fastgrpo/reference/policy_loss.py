"""The policy loss of every GRPO-family objective with its derivative: eager specification.

Per live token t, with d = logprob - old (clamped), s = d or its mean or sum over the sequence, r = exp(s):

    token_loss = token_weight * gate * policy(r, A) + kl_weight * beta * kl
    loss       = sum_t weight_t * token_loss_t - entropy_weight_t * entropy_t

Masking is selection, never multiplication: whatever a masked slot holds has no influence on any output bit.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo.reference.gates import Tokens, gate_closed
from fastgrpo.reference.kl_estimate import kl_terms
from fastgrpo.reference.log_ratio import log_ratio_of
from fastgrpo.spec import (
    METRICS,
    PARAMS,
    SPEC_GATE,
    SPEC_HEAD,
    Estimator,
    KLTarget,
    Level,
    PoolGrad,
    Scope,
    Shape,
    Surrogate,
)

# name -> torch expression (log_ratio, advantage, user parameters [8]) -> (value, d value / d log_ratio)
SURROGATES: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {}


class PolicyTerm(NamedTuple):
    """Policy term of each token before weights and gates, with derivatives by log-ratio and by log-prob."""

    value: Tensor
    through_ratio: Tensor
    direct: Tensor
    gain: Tensor


def _policy_term(
    log_ratio: Tensor, tokens: Tokens, p: dict[str, Tensor], spec: list[int], surrogate: str
) -> PolicyTerm:
    """-A r bounded by the sign of A (gradient stops outside), or -A sg(bounded r) logprob (gradient kept)."""
    advantage, ratio = tokens.advantage, torch.exp(log_ratio)
    positive, idle = advantage > 0, advantage == 0
    zero = torch.zeros_like(ratio)

    def by_sign(name: str) -> Tensor:
        return torch.where(positive, p["pos_" + name], p["neg_" + name])

    if spec[2] == Surrogate.CUSTOM:
        user = torch.stack([p[f"user_{k}"] for k in range(8)])
        value, slope = SURROGATES[surrogate](log_ratio, advantage, user)
        gain = torch.where(idle, 0.0, -slope / torch.where(idle, 1.0, advantage))
        return PolicyTerm(value, slope, zero, gain)
    a, b = (torch.where(positive, p[f"shape_pos_{k}"], p[f"shape_neg_{k}"]) for k in "ab")
    if spec[3] == Shape.HARD:
        low, high = by_sign("low"), by_sign("high")
        weight = torch.where(ratio < low, low, torch.where(ratio > high, high, ratio))
        slope = torch.where((ratio < low) | (ratio > high), 0.0, ratio)
    elif spec[3] == Shape.SIGMOID:
        sigmoid, rest = torch.sigmoid(a * (ratio - 1)), torch.sigmoid(a * (1 - ratio))
        weight, slope = 4 / a * sigmoid, 4 * sigmoid * rest * ratio
    else:
        weight = torch.exp(b + a * log_ratio - b * ratio)
        slope = weight * (a - b * ratio)
    if spec[2] == Surrogate.RATIO:
        gain = torch.where(idle, 0.0, slope)
        return PolicyTerm(
            torch.where(idle, 0.0, -advantage * weight), -advantage * gain, zero, gain
        )
    gain = torch.where(idle, 0.0, weight)
    value = torch.where(idle, 0.0, -advantage * weight * tokens.logprob)
    return PolicyTerm(value, zero, -advantage * gain, gain)


def _pooled_log_ratio(
    raw: Tensor, log_weight: Tensor, tokens: Tokens, p: dict[str, Tensor], level: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log-ratio each token uses, its derivative by the token's own log-prob, and where d_clamp acted."""
    clamped = raw.abs() > p["d_clamp"]
    d = torch.clamp(raw, -p["d_clamp"], p["d_clamp"])
    over = (tokens.advantage > 0) & (d > p["log_high"])
    under = (tokens.advantage < 0) & (d < p["log_low"])
    d = torch.where(over, p["log_high"], torch.where(under, p["log_low"], d))
    passes = ~(clamped | over | under)
    if log_weight.numel():
        d = d + torch.where(tokens.live, log_weight, 0.0)
    pooled, share = d, torch.ones_like(d)
    if level != Level.TOKEN:
        pooled = tokens.sequence_sum(d)
        if level == Level.SEQ_MEAN:
            share = 1.0 / tokens.sequence_length()
            pooled = pooled * share
    bounded = torch.clamp(pooled, p["pool_low"], p["pool_high"])
    passes = passes & ~((pooled < p["pool_low"]) | (pooled > p["pool_high"]))
    return bounded, torch.where(passes, share, 0.0), clamped


def _gates(tokens: Tokens, params: Tensor, spec: list[int]) -> tuple[Tensor, Tensor]:
    """Where any gate removes the policy term, and where one removes the KL term too."""
    closed = torch.zeros_like(tokens.live)
    closed_kl = closed
    for k in range(spec[SPEC_HEAD - 1]):
        code = spec[SPEC_HEAD + SPEC_GATE * k : SPEC_HEAD + SPEC_GATE * (k + 1)]
        low, high = params[len(PARAMS) + 2 * k : len(PARAMS) + 2 * k + 2]
        shut = gate_closed(tokens, code, low, high, params[PARAMS.index("d_clamp")])
        closed = closed | shut
        if code[4] == Scope.POLICY_AND_KL:
            closed_kl = closed_kl | shut
    return closed, closed_kl


def policy_loss(
    logprob: Tensor,  # [N]; every per-token tensor is flat, float32 or float64
    advantage: Tensor,  # [N]
    mask: Tensor,  # [N] bool
    weight: Tensor,  # [N] reduction weight, 0 where masked
    old: Tensor,  # [N], or [0]: the ratio is exactly 1
    ref: Tensor,  # [N] or [0]
    rollout: Tensor,  # [N] or [0], used by gates
    log_weight: Tensor,  # [N] or [0], added to the clamped log-ratio before pooling
    token_weight: Tensor,  # [N] or [0]
    kl_weight: Tensor,  # [N] or [0]
    entropy: Tensor,  # [N] or [0]
    entropy_weight: Tensor,  # [N] or [0]
    cu_seqlens: Tensor,  # [B + 1] int32
    params: Tensor,  # [NUM_PARAMS]
    spec: list[int],
    surrogate: str,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor
]:  # loss [], token_loss [N], dlogprob [N], metrics [NUM_METRICS, 4]
    """Loss, d loss / d logprob (pooling and weights included) and metric sums, in one call."""
    p = dict(zip(PARAMS, params, strict=False))
    tokens = Tokens.select(logprob, advantage, mask, old, rollout, entropy, cu_seqlens)
    live, zero = tokens.live, torch.zeros_like(tokens.logprob)
    raw = log_ratio_of(tokens.logprob, tokens.old)
    pooled, share, clamped = _pooled_log_ratio(raw, log_weight, tokens, p, spec[0])
    term = _policy_term(pooled, tokens, p, spec, surrogate)

    closed, closed_kl = _gates(tokens, params, spec)

    def weigh(value: Tensor, factor: Tensor, shut: Tensor) -> Tensor:
        if factor.numel():
            factor = torch.where(live, factor, 0.0)
            value = torch.where(factor == 0, 0.0, value * factor)
        return torch.where(shut, 0.0, value)

    policy, through_ratio, direct = (weigh(x, token_weight, closed) for x in term[:3])

    target = ref if spec[6] == KLTarget.REF else old
    kl, clamped_kl = zero, torch.zeros_like(live)
    token_loss = policy
    if spec[4] != Estimator.NONE and target.numel():
        kl, slope, kl_ratio, clamped_kl = kl_terms(
            tokens.logprob, torch.where(live, target, 0.0), torch.exp(pooled),
            p["kl_clamp_in"], p["kl_clamp_out"], p["kl_ratio_cap"], spec[4], spec[5],
        )  # fmt: skip
        off = closed_kl | (p["beta"] == 0)  # selected, so that beta = 0 removes an infinite KL too
        pull, slope, kl_ratio = (
            weigh(p["beta"] * x, kl_weight, off) for x in (kl, slope, kl_ratio)
        )
        token_loss, direct, through_ratio = policy + pull, direct + slope, through_ratio + kl_ratio

    weight = torch.where(live, weight, 0.0)
    counted = weight != 0
    flow = torch.where(counted, weight * through_ratio, 0.0)
    if spec[0] != Level.TOKEN and spec[1] == PoolGrad.SHARED:
        flow = tokens.sequence_sum(flow)
    elif spec[0] == Level.SEQ_MEAN:  # local: the token's own log-ratio stands for the pooled one
        share = torch.where(share == 0, 0.0, 1.0)
    through = torch.where(share == 0, 0.0, flow * share)
    dlogprob = torch.where(live, torch.where(counted, weight * direct, 0.0) + through, 0.0)
    token_loss = torch.where(live, token_loss, 0.0)

    loss = tokens.total(torch.where(counted, weight * token_loss, 0.0).double())
    bonus = torch.zeros_like(live)
    if entropy_weight.numel():
        bonus_weight = torch.where(live, entropy_weight, 0.0)
        bonus = bonus_weight != 0
        loss = loss - tokens.total(torch.where(bonus, bonus_weight * tokens.entropy, 0.0).double())

    finite = tokens.logprob.isfinite() & tokens.old.isfinite() & token_loss.isfinite()
    if target.numel():
        finite = finite & torch.where(live, target, 0.0).isfinite()
    rows = _clip_rows(torch.exp(pooled), tokens.advantage, p) | {
        "policy_loss": policy,
        "kl": kl,
        "coefficient": torch.where(closed, 0.0, term.gain),
        "log_ratio": raw,
        "gate_closed": closed,
        "clamp_log_ratio": clamped,
        "clamp_kl": clamped_kl,
        "entropy": tokens.entropy,
        "logprob": tokens.logprob,
        "fault": ~finite,
        "active": (dlogprob != 0) | bonus,
    }
    metrics = reduce_metrics(torch.stack([rows[name].double() for name in METRICS]), tokens)
    return loss.to(logprob.dtype), token_loss, dlogprob, metrics


def _clip_rows(ratio: Tensor, advantage: Tensor, p: dict[str, Tensor]) -> dict[str, Tensor]:
    """The ratio and where it lies outside the bounds, by TRL's definition of low and high."""
    low, high = (advantage < 0) & (ratio < p["neg_low"]), (advantage > 0) & (ratio > p["pos_high"])
    dual = (advantage < 0) & (ratio > p["neg_high"])
    return {
        "ratio": ratio,
        "clip_low": low,
        "clip_high": high,
        "clip_region": low | high,
        "clip_dual": dual,
    }


def reduce_metrics(rows: Tensor, tokens: Tokens) -> Tensor:
    """Reduce [K, N] per-token values to (sum, count, min, max) over live tokens."""
    live = tokens.live
    total = tokens.total(rows)
    count = live.sum().expand_as(total).double()
    if rows.shape[1] == 0:
        return torch.stack([total, count, total + torch.inf, total - torch.inf], dim=1)
    low = torch.where(live, rows, torch.inf).amin(dim=1)
    high = torch.where(live, rows, -torch.inf).amax(dim=1)
    return torch.stack([total, count, low, high], dim=1)
