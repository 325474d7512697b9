"""The operators `torch.ops.fastgrpo.*`. Importing this package defines every op and registers its kernels."""

from fastgrpo.ops import (
    backend,
    group_advantage,
    grpo_loss,
    kl_estimate,
    policy_loss,
    scale_gradient,
    segment_scan,
    token_logprob,
)

__all__ = [
    "backend",
    "group_advantage",
    "grpo_loss",
    "kl_estimate",
    "policy_loss",
    "scale_gradient",
    "segment_scan",
    "token_logprob",
]

backend.load()
