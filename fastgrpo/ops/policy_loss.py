"""`fastgrpo::policy_loss`: log-probs to loss, its derivative and metric sums."""

import torch
from torch import Tensor

from fastgrpo import reference
from fastgrpo.spec import NUM_METRICS


@torch.library.custom_op("fastgrpo::policy_loss", mutates_args=())
def policy_loss(
    logprob: Tensor,  # [N], float32 or float64 like every per-token tensor
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
    """Return loss [], token_loss [N], dlogprob [N], metrics [NUM_METRICS, 4] float64."""
    return reference.policy_loss(
        logprob,
        advantage,
        mask,
        weight,
        old,
        ref,
        rollout,
        log_weight,
        token_weight,
        kl_weight,
        entropy,
        entropy_weight,
        cu_seqlens,
        params,
        spec,
        surrogate,
    )


@policy_loss.register_fake
def _(
    logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    weight: Tensor,
    old: Tensor,
    ref: Tensor,
    rollout: Tensor,
    log_weight: Tensor,
    token_weight: Tensor,
    kl_weight: Tensor,
    entropy: Tensor,
    entropy_weight: Tensor,
    cu_seqlens: Tensor,
    params: Tensor,
    spec: list[int],
    surrogate: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    metrics = logprob.new_empty((NUM_METRICS, 4), dtype=torch.float64)
    return logprob.new_empty(()), torch.empty_like(logprob), torch.empty_like(logprob), metrics
