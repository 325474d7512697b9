"""What depends only on stored log-probs (old policy against sampler): importance weights, gates, mismatch metrics.

These never depend on the policy being trained, so they enter the kernels as token weights and a mask.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo.choices import Gate
from fastgrpo.functional.numbers import number_tensor
from fastgrpo.objective import Objective
from fastgrpo.reference.gates import Tokens, gate_closed
from fastgrpo.reference.log_ratio import log_ratio_of
from fastgrpo.reference.policy_loss import reduce_metrics
from fastgrpo.spec import Between, Pool, Stat, When

# Rows that the correction adds to the metrics; `fastgrpo.metrics.DEFINITIONS` says what they hold.
ROLLOUT_METRICS = (
    "rollout_weight",
    "rollout_weight_squared",
    "rollout_abs_log_ratio",
    "rollout_k1",
    "rollout_k3",
    "rollout_chi2",
    "rollout_outside",
)


class Corrected(NamedTuple):
    """Inputs of the loss after the correction."""

    mask: Tensor
    old: Tensor
    log_weight: Tensor
    token_weight: Tensor
    kl_weight: Tensor
    metrics: tuple[tuple[str, ...], Tensor] | None


def _times(factor: Tensor, weight: Tensor) -> Tensor:
    """Multiply an optional weight ([0] = 1)."""
    return weight * factor if weight.numel() else factor


def _importance_weight(
    log_ratio: Tensor, tokens: Tokens, objective: Objective
) -> tuple[Tensor, Tensor]:
    """exp(old - rollout) per token or sequence, truncated or masked, and where it lay outside the limits, per token."""
    correction = objective.correction
    assert correction is not None
    if correction.level != "token":
        log_ratio = tokens.sequence_sum(log_ratio)
        if correction.level == "seq_mean":
            log_ratio = log_ratio / tokens.sequence_length()
    limit = correction.log_clamp
    weight = torch.exp(log_ratio if limit is None else log_ratio.clamp(-limit, limit))
    outside = (weight < correction.low) | (weight > correction.high)
    if correction.mode == "truncate":
        weight = weight.clamp(correction.low, correction.high)
    else:
        weight = torch.where(outside, 0.0, weight)
    if correction.normalize:
        # Every token counts once, or every sequence does, whatever its length.
        share = (
            torch.ones_like(weight) if correction.level == "token" else 1 / tokens.sequence_length()
        )
        total = tokens.total(weight * share)
        weight = weight * tokens.total(share) / torch.where(total > 0, total, 1.0)
    return weight, outside


def _stored_gate_closed(gate: Gate, tokens: Tokens) -> Tensor:
    """Where a gate between old policy and sampler removes the token."""
    code = (
        Stat[gate.stat.upper()],
        Between.THETA_ROLLOUT,
        Pool[gate.pool.upper()],
        When[gate.when.upper()],
        0,
    )
    like = tokens.logprob
    limits = number_tensor([gate.low, gate.high, 20.0], like.dtype, like.device)
    return gate_closed(tokens, [int(x) for x in code], *limits.unbind())


def apply_correction(
    objective: Objective,
    *,
    advantage: Tensor,  # [N]
    mask: Tensor,  # [N] bool
    old: Tensor,  # [N] or [0]
    rollout: Tensor,  # [N] or [0]
    token_weight: Tensor,  # [N] or [0]
    kl_weight: Tensor,  # [N] or [0]
    cu_seqlens: Tensor,
) -> Corrected:
    """Apply `objective.correction` and the gates between old and rollout.

    A NaN rollout log-prob (a token the sampler could not score) has ratio 1 and closes no gate. VESPO folds the weight
    into the sequence ratio instead of multiplying.
    """
    if not rollout.numel():
        return Corrected(mask, old, old.new_empty(0), token_weight, kl_weight, None)
    correction = objective.correction
    bypass = correction is not None and correction.bypass
    gates = [gate for gate in objective.gates if gate.between == "old_rollout"]
    if not old.numel() and not bypass:
        if correction is not None or gates:
            raise ValueError(
                "old_logprob is required by the objective's correction or gates, got None"
            )
        return Corrected(mask, old, old.new_empty(0), token_weight, kl_weight, None)
    behaviour = torch.where(rollout.isnan(), old, rollout) if old.numel() else rollout
    if bypass:
        return Corrected(mask, behaviour, old.new_empty(0), token_weight, kl_weight, None)

    absent = old.new_empty(0)
    tokens = Tokens.select(old, advantage, mask, absent, behaviour, absent, cu_seqlens)
    difference = log_ratio_of(tokens.logprob, tokens.rollout)
    log_weight, weight, outside = absent, torch.ones_like(old), torch.zeros_like(mask)
    if correction is not None:
        weight, outside = _importance_weight(difference, tokens, objective)
        if objective.folds_correction:
            log_weight = torch.log(weight).clamp(objective.pool_bounds[0], objective.pool_bounds[1])
            if (
                correction.level != "token"
            ):  # the sequence's log-weight once, spread over its tokens
                log_weight = log_weight / tokens.sequence_length()
        else:
            token_weight = _times(weight, token_weight)
            if correction.applies_to == "policy_and_kl":
                kl_weight = _times(weight, kl_weight)
    for gate in gates:
        shut = _stored_gate_closed(gate, tokens)
        outside = outside | shut
        if gate.scope == "mask":
            mask = mask & ~shut
            continue
        keep = (~shut).to(old.dtype)
        token_weight = _times(keep, token_weight)
        if gate.scope == "policy_and_kl":
            kl_weight = _times(keep, kl_weight)
    metrics = _mismatch_metrics(weight, difference, outside, tokens, ~rollout.isnan())
    return Corrected(mask, old, log_weight, token_weight, kl_weight, (ROLLOUT_METRICS, metrics))


def _mismatch_metrics(
    weight: Tensor, log_ratio: Tensor, outside: Tensor, tokens: Tokens, scored: Tensor
) -> Tensor:
    """Rows of ROLLOUT_METRICS: weights over live tokens, mismatch over those that the sampler scored."""
    weights = torch.stack([weight, weight * weight])
    mismatch = torch.stack(
        [
            log_ratio.abs(),
            -log_ratio,
            torch.expm1(log_ratio) - log_ratio,
            torch.expm1(2 * log_ratio.clamp(-20.0, 20.0)),
        ]
    )
    return torch.cat(
        [
            reduce_metrics(weights.double(), tokens),
            reduce_metrics(mismatch.double(), tokens._replace(live=tokens.live & scored)),
            reduce_metrics(outside[None].double(), tokens),
        ]
    )
