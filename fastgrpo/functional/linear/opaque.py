"""The linear ops as single operators, for torch.compile: their loops over chunks and rows are not for a tracer to see.

They live in a namespace of their own because they are made of `fastgrpo::*` ops and have no kernel of any backend.
"""

import torch
from torch import Tensor

from fastgrpo.functional.linear.gemm import HALF, Precision
from fastgrpo.functional.linear.gradients import Needs, Originals
from fastgrpo.functional.linear.inputs import LinearOptions, make_head
from fastgrpo.functional.linear.logprob import logprob_backward, logprob_forward
from fastgrpo.functional.linear.loss import Formula, TokenInputs, linear_loss
from fastgrpo.functional.linear.plan import classify, plan_from_indices
from fastgrpo.functional.linear.score import Scored, Scoring, Upstream
from fastgrpo.spec import NUM_METRICS


def _options(precision: str, workspace_bytes: int | None, capacity: int | None) -> LinearOptions:
    checked: Precision = precision  # type: ignore[assignment]  # LinearOptions refuses anything else
    return LinearOptions(checked, workspace_bytes, capacity)


def _present(values: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, ...]:
    """Operators return tensors only: an absent gradient has 0 elements."""
    return tuple(like.new_empty(0) if value is None else value for value in values)


@torch.library.custom_op("fastgrpo_linear::token_logprob_fwd", mutates_args=())
def token_logprob_fwd(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    token_ids: Tensor,
    mask: Tensor,
    temperature: Tensor,
    logit_params: Tensor,
    with_entropy: bool,
    dtype: torch.dtype,
    precision: str,
    workspace_bytes: int | None,
    capacity: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logprob [N], entropy [N] or [0], lse [N]."""
    options = _options(precision, workspace_bytes, capacity)
    head = make_head(weight, bias, dtype, options.logits_precision)
    scoring = Scoring(hidden, token_ids, temperature, logit_params, with_entropy)
    with torch.autocast(hidden.device.type, enabled=False):
        logprob, entropy, lse = logprob_forward(head, scoring, mask, options)
    return logprob, entropy, lse


@token_logprob_fwd.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, mask: Tensor, temperature: Tensor,
    logit_params: Tensor, with_entropy: bool, dtype: torch.dtype, precision: str, workspace_bytes: int | None,
    capacity: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows = hidden.shape[0]
    return (
        temperature.new_empty(rows),
        temperature.new_empty(rows if with_entropy else 0),
        temperature.new_empty(rows),
    )


@torch.library.custom_op("fastgrpo_linear::token_logprob_bwd", mutates_args=())
def token_logprob_bwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    mask: Tensor,
    temperature: Tensor,
    logit_params: Tensor,
    logprob: Tensor,
    entropy: Tensor,
    lse: Tensor,
    dlogprob: Tensor,  # [N] or [0]
    dentropy: Tensor,  # [N] or [0]
    needs: list[bool],
    dtype: torch.dtype,
    precision: str,
    workspace_bytes: int | None,
    capacity: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of hidden, weight and bias; [0] where not needed."""
    options = _options(precision, workspace_bytes, capacity)
    head = make_head(weight, bias, dtype, options.logits_precision)
    with torch.autocast(hidden.device.type, enabled=False):
        found = logprob_backward(
            head,
            Originals(hidden, weight, bias),
            Scoring(hidden, token_ids, temperature, logit_params, entropy.numel() > 0),
            Scored(logprob, entropy, lse),
            Upstream(dlogprob, dentropy),
            mask,
            Needs(needs[0], needs[1], needs[2]),
            options,
        )
    dhidden, dweight, dbias = _present(found, hidden)
    return dhidden, dweight, dbias


@token_logprob_bwd.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, mask: Tensor, temperature: Tensor,
    logit_params: Tensor, logprob: Tensor, entropy: Tensor, lse: Tensor, dlogprob: Tensor, dentropy: Tensor,
    needs: list[bool], dtype: torch.dtype, precision: str, workspace_bytes: int | None, capacity: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _like_gradients(hidden, weight, bias, needs, None)


def _like_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool], wide: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    def like(value: Tensor | None, needed: bool, dtype: torch.dtype | None) -> Tensor:
        if value is None or not needed:
            return hidden.new_empty(0)
        return value.new_empty(value.shape, dtype=dtype or value.dtype)

    return like(hidden, needs[0], None), like(weight, needs[1], wide), like(bias, needs[2], wide)


@torch.library.custom_op("fastgrpo_linear::grpo_loss", mutates_args=())
def grpo_loss(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    token_ids: Tensor,
    temperature: Tensor,
    logit_params: Tensor,
    tokens: list[Tensor],  # the fields of TokenInputs
    active: Tensor,  # [N] bool
    active_index: Tensor | None,  # of the caller's plan, or None: planned here
    score_index: Tensor | None,
    cu_seqlens: Tensor,
    params: Tensor,
    grad_scale: Tensor,
    spec: list[int],
    surrogate: str,
    with_entropy: bool,
    by_sequence: bool,
    score_inactive: bool,
    needs: list[bool],
    dtype: torch.dtype,
    precision: str,
    workspace_bytes: int | None,
    capacity: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss, token_loss, logprob, entropy, metrics, and gradients of hidden, weight, bias ([0]: not needed)."""
    options = _options(precision, workspace_bytes, capacity)
    per_token = TokenInputs(*tokens)
    if active_index is None or score_index is None:
        plan = classify(
            per_token.mask, active, cu_seqlens,
            by_sequence=by_sequence, score_inactive=score_inactive, capacity=capacity,
        )  # fmt: skip
    else:
        plan = plan_from_indices(
            active_index, score_index, cu_seqlens, hidden.shape[0], by_sequence
        )
    with torch.autocast(hidden.device.type, enabled=False):
        outcome = linear_loss(
            make_head(weight, bias, dtype, options.logits_precision),
            Scoring(hidden, token_ids, temperature, logit_params, with_entropy),
            per_token,
            Formula(params, spec, surrogate, grad_scale),
            plan.row_classes(),
            Originals(hidden, weight, bias),
            Needs(needs[0], needs[1], needs[2]),
            options,
        )
    loss, gradients = outcome.loss, list(_present(outcome.gradients, hidden))
    if plan.overflow is not None:
        loss, *gradients = (
            torch.where(plan.overflow, torch.nan, value) for value in (loss, *gradients)
        )
    dhidden, dweight, dbias = gradients
    return (
        loss,
        outcome.token_loss,
        outcome.logprob,
        outcome.entropy,
        outcome.metrics,
        dhidden,
        dweight,
        dbias,
    )


@grpo_loss.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, temperature: Tensor, logit_params: Tensor,
    tokens: list[Tensor], active: Tensor, active_index: Tensor | None, score_index: Tensor | None, cu_seqlens: Tensor,
    params: Tensor, grad_scale: Tensor, spec: list[int], surrogate: str, with_entropy: bool, by_sequence: bool,
    score_inactive: bool, needs: list[bool], dtype: torch.dtype, precision: str, workspace_bytes: int | None,
    capacity: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows = hidden.shape[0]
    wide = (torch.float32 if dtype in HALF else dtype) if grad_scale.numel() else None
    return (
        temperature.new_empty(()),
        temperature.new_empty(rows),
        temperature.new_empty(rows),
        temperature.new_empty(rows if with_entropy else 0),
        temperature.new_empty((NUM_METRICS, 4), dtype=torch.float64),
        *_like_gradients(hidden, weight, bias, needs, wide),
    )
