"""Logits to loss and gradient of the logits in one call: eager specification, composed of the two-step ops."""

from torch import Tensor

from fastgrpo.reference.policy_loss import policy_loss
from fastgrpo.reference.token_logprob import token_logprob_bwd, token_logprob_fwd


def grpo_loss(
    logits: Tensor,  # [N, V]
    token_ids: Tensor,  # [N]
    temperature: Tensor,  # [1] or [N]
    logit_params: Tensor,  # [0], [1] or [2]
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
    grad_scale: Tensor,  # [1], or [0]: 1
    spec: list[int],
    surrogate: str,
    with_entropy: bool,
    dlogits: Tensor,  # [N, V] receives the gradient, or [0]: no gradient work
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss, token_loss, logprob, entropy, dlogprob, metrics; `dlogits` may be the memory of `logits`."""
    logprob, entropy, lse = token_logprob_fwd(
        logits, token_ids, mask, temperature, logit_params, with_entropy
    )
    loss, token_loss, dlogprob, metrics = policy_loss(
        logprob, advantage, mask, weight, old, ref, rollout, log_weight, token_weight, kl_weight,
        entropy, entropy_weight, cu_seqlens, params, spec, surrogate,
    )  # fmt: skip
    if dlogits.numel():
        scale = grad_scale if grad_scale.numel() else 1.0
        dentropy = (
            -entropy_weight.where(mask, 0.0) * scale if entropy_weight.numel() else entropy_weight
        )
        dlogits.copy_(
            token_logprob_bwd(
                logits,
                token_ids,
                temperature,
                logit_params,
                logprob,
                entropy,
                lse,
                dlogprob * scale,
                dentropy,
            )
        )
    return loss, token_loss, logprob, entropy, dlogprob, metrics
