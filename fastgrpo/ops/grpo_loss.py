"""`fastgrpo::grpo_loss`: logits to loss and gradient of the logits in one pass."""

import torch
from torch import Tensor

from fastgrpo import reference
from fastgrpo.ops.define import mutating_op
from fastgrpo.reference.token_logprob import accumulate_dtype
from fastgrpo.spec import NUM_METRICS


@mutating_op("fastgrpo::grpo_loss", mutated="dlogits")
def grpo_loss(
    logits: Tensor,  # [N, V], last dimension contiguous
    token_ids: Tensor,  # [N] int64
    temperature: Tensor,  # [1] or [N]
    logit_params: Tensor,  # [0], [1] or [2]
    advantage: Tensor,  # [N]
    mask: Tensor,  # [N] bool
    weight: Tensor,  # [N]
    old: Tensor,  # [N] or [0], like all that follow up to entropy_weight
    ref: Tensor,
    rollout: Tensor,
    log_weight: Tensor,
    token_weight: Tensor,
    kl_weight: Tensor,
    entropy_weight: Tensor,
    cu_seqlens: Tensor,  # [B + 1] int32
    params: Tensor,  # [NUM_PARAMS]
    grad_scale: Tensor,  # [1], or [0]: 1
    spec: list[int],
    surrogate: str,
    with_entropy: bool,
    dlogits: Tensor,  # [N, V] written (may be the memory of logits), or [0]: no gradient work
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss [], token_loss [N], logprob [N], entropy [N] or [0], dlogprob [N], metrics."""
    return reference.grpo_loss(
        logits,
        token_ids,
        temperature,
        logit_params,
        advantage,
        mask,
        weight,
        old,
        ref,
        rollout,
        log_weight,
        token_weight,
        kl_weight,
        entropy_weight,
        cu_seqlens,
        params,
        grad_scale,
        spec,
        surrogate,
        with_entropy,
        dlogits,
    )


@grpo_loss.register_fake
def _(
    logits: Tensor,
    token_ids: Tensor,
    temperature: Tensor,
    logit_params: Tensor,
    advantage: Tensor,
    mask: Tensor,
    weight: Tensor,
    old: Tensor,
    ref: Tensor,
    rollout: Tensor,
    log_weight: Tensor,
    token_weight: Tensor,
    kl_weight: Tensor,
    entropy_weight: Tensor,
    cu_seqlens: Tensor,
    params: Tensor,
    grad_scale: Tensor,
    spec: list[int],
    surrogate: str,
    with_entropy: bool,
    dlogits: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    per_token = logits.new_empty(rows, dtype=accumulate_dtype(logits.dtype))
    return (
        per_token.new_empty(()),
        per_token,
        torch.empty_like(per_token),
        per_token.new_empty(rows if with_entropy else 0),
        torch.empty_like(per_token),
        per_token.new_empty((NUM_METRICS, 4), dtype=torch.float64),
    )
