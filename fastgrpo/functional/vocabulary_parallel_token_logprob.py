"""`vocabulary_parallel_token_logprob`: linear_token_logprob for a head split over a group of ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastgrpo.functional.checks import (
    as_mask,
    describe,
    flatten,
    is_strict,
    require_flag,
    require_token_ids,
)
from fastgrpo.functional.faults import raise_on_fault
from fastgrpo.functional.first_order import first_order_only
from fastgrpo.functional.linear.gemm import Precision
from fastgrpo.functional.linear.gradients import Originals
from fastgrpo.functional.linear.inputs import LinearOptions, check_head, make_head, product_dtype
from fastgrpo.functional.linear.logprob import logprob_backward, logprob_forward
from fastgrpo.functional.linear.score import Scored, Scoring, Upstream
from fastgrpo.functional.linear.shards import DeadRows, Shard, ShardScoring, combine, gather
from fastgrpo.functional.token_logprob import TokenLogprob, logit_params_tensor, temperature_tensor


class VocabularyParallelFunction(torch.autograd.Function):
    """Local products and statistics, one exchange in forward; the backward is local but for the sum of dhidden."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V / ranks, H]
        bias: Tensor | None,
        token_ids: Tensor,
        mask: Tensor,
        temperature: Tensor,
        logit_params: Tensor,
        with_entropy: bool,
        options: LinearOptions,
        shard: Shard,
        group: "dist.ProcessGroup | None",
        reduce_hidden_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        """Score against this shard and combine with the others."""
        dtype = product_dtype(hidden)
        head = make_head(weight, bias, dtype, options.logits_precision)
        column = shard.local(token_ids)
        owned = shard.owns(token_ids)
        scoring = Scoring(hidden, column, temperature, logit_params, with_entropy)
        dead = None if bias is None else DeadRows(hidden.shape[0], hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            local = logprob_forward(head, scoring, mask, options, visit=dead)
        local = local if dead is None else dead.settle(local)
        slope = logit_params / temperature if logit_params.numel() == 1 else 1.0 / temperature
        scored = combine(gather(local, owned, group), slope)
        if mask.numel():
            scored = Scored(*(value.where(mask, 0.0) for value in scored))
        entropy = scored.entropy if with_entropy else scored.entropy.new_empty(0)
        ctx.set_materialize_grads(False)
        if not with_entropy:
            ctx.mark_non_differentiable(entropy)
        ctx.dtype, ctx.options, ctx.with_entropy = dtype, options, with_entropy
        ctx.group, ctx.reduce = group, reduce_hidden_gradient
        ctx.save_for_backward(
            hidden,
            weight,
            bias,
            column,
            owned,
            mask,
            temperature,
            logit_params,
            scored.logprob,
            entropy,
            scored.lse,
        )
        return scored.logprob, entropy

    @staticmethod
    @first_order_only
    def backward(
        ctx: Any, dlogprob: Tensor | None, dentropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of hidden (summed over the group if asked for), and of this shard's weight and bias."""
        hidden, weight, bias, column, owned, mask, temperature, logit_params, *scored = (
            ctx.saved_tensors
        )
        if dlogprob is None and dentropy is None:
            return (None,) * 12
        like = Originals(hidden, weight, bias)
        absent = scored[0].new_empty(0)
        upstream = Upstream(
            *(absent if g is None else g.contiguous() for g in (dlogprob, dentropy))
        )
        with torch.autocast(hidden.device.type, enabled=False):
            dhidden, dweight, dbias = logprob_backward(
                make_head(weight, bias, ctx.dtype, ctx.options.logits_precision),
                like,
                ShardScoring(hidden, column, temperature, logit_params, ctx.with_entropy, owned),
                Scored(*scored),
                upstream,
                mask,
                like.needs(ctx.needs_input_grad),
                ctx.options,
            )
        if dhidden is not None and ctx.reduce:
            wide = dhidden.to(scored[0].dtype)
            dist.all_reduce(wide, dist.ReduceOp.SUM, ctx.group)
            dhidden = wide.to(dhidden.dtype)
        return (dhidden, dweight, dbias, *(None,) * 9)


def vocabulary_parallel_token_logprob(
    hidden: Tensor,  # [..., H], the same on every rank
    weight: Tensor,  # [V_rank, H], this rank's rows of the head's weight
    token_ids: Tensor,  # [...] in [0, V) of the whole vocabulary, the same on every rank
    *,
    group: "dist.ProcessGroup | None" = None,
    vocabulary_start: int | None = None,
    bias: Tensor | None = None,  # [V_rank]
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,  # [...] bool
    with_entropy: bool = False,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    logits_precision: Precision = "auto",
    workspace_bytes: int | None = None,
    reduce_hidden_gradient: bool = True,
) -> TokenLogprob:
    """`linear_token_logprob` under tensor parallelism: four numbers per token are exchanged, never logits.

    Every rank gets the same log-prob and entropy and must differentiate the same function of them. Its backward makes
    the gradient of its own weight shard, and its share of the gradient of `hidden`.

    Args:
        hidden: See `linear_token_logprob`.
        weight: The rows [vocabulary_start, vocabulary_start + V_rank) of the head's weight.
        token_ids: The tokens to score; a token that no shard holds gives NaN.
        group: The ranks that share the vocabulary; None: all.
        vocabulary_start: First token of this shard; None: rank * V_rank, for shards of equal size.
        bias: This rank's entries of the bias.
        temperature: See `token_logprob`.
        mask: See `linear_token_logprob`.
        with_entropy: See `linear_token_logprob`.
        logit_scale: See `token_logprob`.
        logit_softcap: See `token_logprob`.
        logits_precision: See `linear_token_logprob`.
        workspace_bytes: See `linear_token_logprob`.
        reduce_hidden_gradient: Sum the gradient of `hidden` over the group; False where the layer before does it
            (Megatron's copy-to-region).

    Returns:
        TokenLogprob(logprob, entropy), float32 (float64 for float64 hidden states).
    """
    hidden, weight, bias = check_head(hidden, weight, bias)
    require_flag("with_entropy", with_entropy)
    require_flag("reduce_hidden_gradient", reduce_hidden_gradient)
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "vocabulary_parallel_token_logprob needs torch.distributed to be initialised"
        )
    if vocabulary_start is not None and (
        not isinstance(vocabulary_start, int) or vocabulary_start < 0
    ):
        raise ValueError(
            f"vocabulary_start must be None or an integer >= 0, got {describe(vocabulary_start)}"
        )
    size = weight.shape[0]
    start = dist.get_rank(group) * size if vocabulary_start is None else vocabulary_start
    shape = hidden.shape[:-1]
    ids = require_token_ids(token_ids, shape, hidden, "hidden")
    live = hidden.new_empty(0, dtype=torch.bool)
    if mask is not None:
        live = flatten(as_mask(mask, shape, hidden, "hidden"), torch.bool)
    logprob, entropy = VocabularyParallelFunction.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        ids,
        live,
        temperature_tensor(temperature, shape, hidden),
        logit_params_tensor(logit_scale, logit_softcap, hidden),
        with_entropy,
        LinearOptions(logits_precision, workspace_bytes),
        Shard(start, size),
        group,
        reduce_hidden_gradient,
    )
    if is_strict():
        total = size * dist.get_world_size(group) if vocabulary_start is None else None
        raise_on_fault(
            "vocabulary_parallel_token_logprob", logprob.isnan(), shape, total,
            token_ids=token_ids, hidden=hidden, temperature=temperature, weight=weight, bias=bias,
        )  # fmt: skip
    return TokenLogprob(logprob.view(shape), entropy.view(shape) if with_entropy else None)
