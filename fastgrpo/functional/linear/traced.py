"""Autograd of the linear ops while torch.compile traces: the same contracts around one opaque operator each."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgrpo.functional.linear import opaque
from fastgrpo.ops.scale_gradient import scale_gradient_


def _or_none(gradient: Tensor, needed: bool) -> Tensor | None:
    return gradient if needed else None


class TracedLogprobFunction(torch.autograd.Function):
    """`LinearTokenLogprobFunction` as one operator forward and one backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, mask: Tensor,
        temperature: Tensor, logit_params: Tensor, with_entropy: bool, dtype: torch.dtype, precision: str,
        workspace_bytes: int | None, capacity: int | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Score the live rows."""
        tensors = (hidden, weight, bias, token_ids, mask, temperature, logit_params)
        ctx.cut = (dtype, precision, workspace_bytes, capacity)
        logprob, entropy, lse = opaque.token_logprob_fwd(*tensors, with_entropy, *ctx.cut)
        ctx.set_materialize_grads(False)
        if not with_entropy:
            ctx.mark_non_differentiable(entropy)
        ctx.save_for_backward(*tensors, logprob, entropy, lse)
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dlogprob: Tensor | None, dentropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of hidden, weight and bias."""
        saved = ctx.saved_tensors
        absent = saved[-1].new_empty(0)
        upstream = (absent if g is None else g.contiguous() for g in (dlogprob, dentropy))
        needs = [bool(need) for need in ctx.needs_input_grad[:3]]
        needs[2] = needs[2] and saved[2] is not None
        found = opaque.token_logprob_bwd(*saved, *upstream, needs, *ctx.cut)
        return (*(_or_none(g, need) for g, need in zip(found, needs, strict=True)), *(None,) * 9)


class TracedLossFunction(torch.autograd.Function):
    """`LinearGRPOLossFunction` as one operator."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
    ) -> tuple[Tensor, ...]:
        """Loss and gradients; `rest` as in `opaque.grpo_loss` without `tokens` packed and without `needs`."""
        tokens, (active, *middle), cut = list(rest[3:13]), rest[13:-4], rest[-4:]
        needs = [bool(need) for need in ctx.needs_input_grad[:3]]
        needs[2] = needs[2] and bias is not None
        loss, token_loss, logprob, entropy, metrics, *gradients = opaque.grpo_loss(
            hidden, weight, bias, *rest[:3], tokens, active, *middle, needs, *cut
        )
        ctx.mark_non_differentiable(token_loss, logprob, entropy, metrics)
        ctx.set_materialize_grads(False)
        ctx.needs, ctx.arguments = needs, len(rest)
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
        ctx.save_for_backward(rest[18], *gradients)
        return loss, token_loss, logprob, entropy, metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        """The stored gradients times dloss / grad_scale."""
        nothing = (None,) * ctx.arguments
        if dloss is None:
            return (None, None, None, *nothing)
        grad_scale, *gradients = ctx.saved_tensors
        scale = (dloss / grad_scale if grad_scale.numel() else dloss).reshape(1)
        results: list[Tensor | None] = []
        for gradient, need, dtype in zip(gradients, ctx.needs, ctx.dtypes, strict=True):
            if not need:
                results.append(None)
                continue
            scale_gradient_(gradient, scale.double() if gradient.dtype == torch.float64 else scale)
            results.append(gradient.to(dtype))
        return (*results, *nothing)
