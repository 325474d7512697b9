"""Autograd of the one-pass loss from hidden states: gradients are made in forward and scaled in backward."""

from typing import Any

import torch
from torch import Tensor

from fastgrpo.functional.first_order import first_order_only
from fastgrpo.functional.linear.gradients import Needs, Originals
from fastgrpo.functional.linear.inputs import LinearOptions, make_head, product_dtype
from fastgrpo.functional.linear.loss import Formula, Outcome, TokenInputs, linear_loss
from fastgrpo.functional.linear.plan import RowClasses
from fastgrpo.functional.linear.score import Scoring
from fastgrpo.ops.scale_gradient import scale_gradient_

NO_GRADIENT = Needs(False, False, False)


def run_linear_loss(
    like: Originals, scoring: Scoring, tokens: TokenInputs, formula: Formula, classes: RowClasses, needs: Needs,
    options: LinearOptions, weight_grad_buffer: Tensor | None = None,
) -> Outcome:  # fmt: skip
    """Compute the loss, and the gradients that `needs` asks for, in autocast's dtype but outside of autocast."""
    hidden, weight, bias = like
    head = make_head(weight, bias, product_dtype(hidden), options.logits_precision)
    with torch.autocast(hidden.device.type, enabled=False):
        outcome = linear_loss(
            head, scoring, tokens, formula, classes, like, needs, options, weight_grad_buffer
        )
    if classes.overflow is None:
        return outcome
    return outcome._replace(loss=torch.where(classes.overflow, torch.nan, outcome.loss))


class LinearGRPOLossFunction(torch.autograd.Function):
    """Only `loss` carries gradient; token_loss, logprob, entropy and metrics are marked non-differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        scoring: Scoring,
        tokens: TokenInputs,
        formula: Formula,
        classes: RowClasses,
        options: LinearOptions,
        weight_grad_buffer: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Loss and gradients of every planned row."""
        like = Originals(hidden, weight, bias)
        needs = like.needs(ctx.needs_input_grad)
        outcome = run_linear_loss(
            like, scoring, tokens, formula, classes, needs, options, weight_grad_buffer
        )
        results = (outcome.token_loss, outcome.logprob, outcome.entropy, outcome.metrics)
        ctx.mark_non_differentiable(*results)
        ctx.set_materialize_grads(False)
        ctx.dtypes = tuple(None if value is None else value.dtype for value in like)
        ctx.fixed, ctx.handed_out = weight_grad_buffer is not None, False
        ctx.save_for_backward(formula.grad_scale, classes.overflow, *outcome.gradients)
        return outcome.loss, *results

    @staticmethod
    @first_order_only
    def backward(ctx: Any, dloss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the stored gradients times dloss / grad_scale, scaled in place on the device.

        The scaling bumps the version of the stored gradients, so a second backward raises instead of being wrong. Where
        the first backward (with retain_graph) did not have to scale, its caller may still hold those very buffers:
        later ones return scaled copies.
        """
        nothing = (None,) * 6
        if dloss is None:
            return (None, None, None, *nothing)
        grad_scale, overflow, *gradients = ctx.saved_tensors
        scale = (dloss / grad_scale if grad_scale.numel() else dloss).reshape(1)
        if overflow is not None:
            scale = torch.where(overflow, torch.nan, scale)
        if ctx.fixed:
            scale = _only_one(scale)
        if ctx.handed_out:
            gradients = [g if g is None else g.clone() for g in gradients]
        ctx.handed_out = True
        if scale.is_cuda or float(scale) != 1.0:  # a GPU's value is read by the kernel, not here
            for gradient in (g for g in gradients if g is not None):
                wide = gradient.dtype == torch.float64
                scale_gradient_(gradient, scale.double() if wide else scale)
        results = zip(gradients, ctx.dtypes, strict=True)
        return (*(g if g is None else g.to(dtype) for g, dtype in results), *nothing)


def _only_one(scale: Tensor) -> Tensor:
    """Refuse an upstream gradient other than 1 once the weight's gradient is in the caller's buffer; NaN on a GPU."""
    if scale.device.type == "cpu" and float(scale) != 1.0:
        raise ValueError(
            "linear_grpo_loss with weight_grad_buffer adds the gradient of the weight in forward, so the loss must be "
            f"differentiated with an upstream gradient of 1 (scale through `normalizer`), got {float(scale)}"
        )
    return torch.where(scale == 1.0, 1.0, torch.nan)
