"""Autograd of the policy loss: the op returns the derivative with the value, so the backward is one product."""

from typing import Any

import torch
from torch import Tensor

from fastgrpo.functional.first_order import first_order_only
from fastgrpo.ops.surrogates import run_policy_loss


class PolicyLossFunction(torch.autograd.Function):
    """Gradient for `logprob` and `entropy` through `loss` and through `token_loss`."""

    @staticmethod
    def forward(
        logprob: Tensor,
        entropy: Tensor,
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
        spec: list[int],
        surrogate: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run the op; arguments as in `fastgrpo.ops.policy_loss`, entropy second."""
        return run_policy_loss(
            logprob, advantage, mask, weight, old, ref, rollout, log_weight, token_weight, kl_weight,
            entropy, entropy_weight, cu_seqlens, params, spec, surrogate,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep the derivative, and the inputs for a gradient through `token_loss`."""
        _, _, dlogprob, metrics = output
        ctx.mark_non_differentiable(dlogprob, metrics)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dlogprob, *inputs[:14])
        ctx.spec, ctx.surrogate = inputs[14:]

    @staticmethod
    @first_order_only
    def backward(
        ctx: Any, dloss: Tensor | None, dtoken: Tensor | None, *unused: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Scale the stored derivative; a per-token upstream gradient takes the place of the weights."""
        dlogprob, logprob, entropy, advantage, mask, weight, *middle = ctx.saved_tensors
        *sides, entropy_weight, cu_seqlens, params = middle
        if dloss is None and dtoken is None:
            return (None,) * 16
        dentropy = None
        if dloss is not None and entropy_weight.numel() and ctx.needs_input_grad[1]:
            dentropy = torch.where(mask, -entropy_weight * dloss, 0.0)
        if dtoken is None:
            return (torch.where(dlogprob == 0, 0.0, dlogprob * dloss), dentropy, *(None,) * 14)
        upstream = dtoken if dloss is None else dtoken + weight * dloss
        absent = entropy_weight.new_empty(0)
        _, _, recomputed, _ = run_policy_loss(
            logprob, advantage, mask, upstream.contiguous(), *sides,
            entropy, absent, cu_seqlens, params, ctx.spec, ctx.surrogate,
        )  # fmt: skip
        return (recomputed, dentropy, *(None,) * 14)
