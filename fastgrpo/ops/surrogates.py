"""Losses with a registered surrogate: inlined by Triton where it serves the op, otherwise around the torch expression.

The compiled CPU library knows the built-in surrogates only. With a registered one the row statistics and the gradient
of the logits still come from its kernels; only the arithmetic on [N] numbers between them is the user's torch code.
"""

from typing import Any

import torch
from torch import Tensor

from fastgrpo import reference
from fastgrpo.ops import backend
from fastgrpo.ops.grpo_loss import grpo_loss
from fastgrpo.ops.policy_loss import policy_loss
from fastgrpo.ops.token_logprob import token_logprob_bwd, token_logprob_fwd

INLINED: set[str] = set()  # surrogates with a Triton function


def _has_kernel(surrogate: str, op: str, device: torch.device) -> bool:
    return not surrogate or (surrogate in INLINED and backend.is_triton(op, device))


def run_policy_loss(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Call `fastgrpo::policy_loss`, or the reference with the expression of a registered surrogate."""
    logprob, surrogate = args[0], args[-1]
    if _has_kernel(surrogate, "policy_loss", logprob.device):
        return policy_loss(*args)
    return reference.policy_loss(*args)


def run_grpo_loss(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Call `fastgrpo::grpo_loss`, or its three steps with the expression of a registered surrogate in the middle."""
    logits, token_ids, temperature, logit_params, advantage, mask, weight, *sides = args[:13]
    entropy_weight, cu_seqlens, params, grad_scale, *codes, with_entropy, dlogits = args[13:]
    spec, surrogate = codes
    if _has_kernel(surrogate, "grpo_loss", logits.device):
        return grpo_loss(*args)
    row = (logits, token_ids, mask, temperature, logit_params)
    logprob, entropy, lse = token_logprob_fwd(*row, with_entropy)
    middle: tuple[Any, ...] = (*sides, entropy, entropy_weight, cu_seqlens, params, spec, surrogate)
    loss, token_loss, dlogprob, metrics = reference.policy_loss(
        logprob, advantage, mask, weight, *middle
    )
    if dlogits.numel():
        scale = grad_scale if grad_scale.numel() else 1.0
        dentropy = entropy_weight
        if entropy_weight.numel():
            dentropy = torch.where(mask, -entropy_weight * scale, 0.0)
        token_logprob_bwd(
            logits, token_ids, temperature, logit_params, logprob, entropy, lse, dlogprob * scale, dentropy, dlogits
        )  # fmt: skip
    return loss, token_loss, logprob, entropy, dlogprob, metrics
