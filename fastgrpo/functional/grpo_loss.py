"""Autograd of the one-pass loss: the gradient of the logits is made in forward and scaled in backward."""

from typing import Any

import torch
from torch import Tensor

from fastgrpo.functional.checks import is_readable
from fastgrpo.functional.first_order import first_order_only
from fastgrpo.ops.scale_gradient import scale_gradient_
from fastgrpo.ops.surrogates import run_grpo_loss


class GRPOLossFunction(torch.autograd.Function):
    """Only `loss` carries gradient; token_loss, logprob, entropy and metrics are marked non-differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,  # [N, V]
        overwrite_logits: bool,
        token_ids: Tensor,
        temperature: Tensor,
        logit_params: Tensor,
        *rest: Any,  # advantage ... entropy_weight, cu_seqlens, params, grad_scale, spec, surrogate, with_entropy
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Run the op with a buffer for the gradient, the logits' own memory if that was agreed."""
        dlogits = logits if overwrite_logits else torch.empty_like(logits)
        loss, token_loss, logprob, entropy, _, metrics = run_grpo_loss(
            logits, token_ids, temperature, logit_params, *rest, dlogits
        )
        ctx.mark_non_differentiable(token_loss, logprob, entropy, metrics)
        ctx.set_materialize_grads(False)
        grad_scale = rest[-4]
        ctx.save_for_backward(dlogits, grad_scale)
        return loss, token_loss, logprob, entropy, metrics

    @staticmethod
    @first_order_only
    def backward(ctx: Any, dloss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the stored gradient times dloss / grad_scale, scaled in place on the device.

        The scaling bumps the version of the stored gradient, so a second backward raises instead of being wrong. Where
        the first backward (with retain_graph) did not have to scale, its caller may still hold that very buffer: later
        ones return a scaled copy.
        """
        nothing = (None,) * (len(ctx.needs_input_grad) - 1)
        if dloss is None:
            return (None, *nothing)
        dlogits, grad_scale = ctx.saved_tensors
        scale = (dloss / grad_scale if grad_scale.numel() else dloss).reshape(1)
        if torch.compiler.is_compiling():
            scale_gradient_(dlogits, scale)
            return (dlogits, *nothing)
        if getattr(ctx, "handed_out", False):
            dlogits = dlogits.clone()
        ctx.handed_out = True
        if (
            not is_readable(scale) or float(scale) != 1.0
        ):  # a GPU's value is read by the kernel, not here
            scale_gradient_(dlogits, scale)
        return (dlogits, *nothing)


def default_grad_scale(logits: Tensor, weight: Tensor) -> Tensor:
    """For float16 the power of two nearest the normaliser, from the largest weight; absent (1) otherwise.

    Without it most entries of dlogits underflow: at N = 8192 tokens a gradient of p / N is below 2^-24 for p < 5e-4.
    """
    if logits.dtype != torch.float16 or weight.numel() == 0:
        return weight.new_empty(0)
    largest = weight.abs().amax()
    scale = torch.exp2(torch.round(-torch.log2(largest)))
    return torch.where(largest > 0, scale, 1.0).reshape(1)
