"""`linear_token_logprob`: log-probability and entropy of sampled tokens from hidden states, without all the logits."""

from typing import Any

import torch
from torch import Tensor

from fastgrpo.functional.checks import (
    as_mask,
    flatten,
    is_strict,
    require_flag,
    require_token_ids,
)
from fastgrpo.functional.faults import raise_on_fault
from fastgrpo.functional.first_order import first_order_only
from fastgrpo.functional.linear.gemm import Precision
from fastgrpo.functional.linear.gradients import Originals
from fastgrpo.functional.linear.inputs import (
    LinearOptions,
    check_head,
    check_weight_grad_buffer,
    make_head,
    product_dtype,
)
from fastgrpo.functional.linear.logprob import logprob_backward, logprob_forward
from fastgrpo.functional.linear.score import Scored, Scoring, Upstream
from fastgrpo.functional.linear.statistics import StatisticsVisitor
from fastgrpo.functional.linear.traced import TracedLogprobFunction
from fastgrpo.functional.token_logprob import TokenLogprob, logit_params_tensor, temperature_tensor


class LinearTokenLogprobFunction(torch.autograd.Function):
    """Flat hidden states in, log-prob and entropy out; the backward recomputes the logits of the rows that need it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        token_ids: Tensor,
        mask: Tensor,
        temperature: Tensor,
        logit_params: Tensor,
        with_entropy: bool,
        options: LinearOptions,
        weight_grad_buffer: Tensor | None,
        outputs: tuple[str, ...] = (),
    ) -> tuple[Tensor, ...]:
        """Score the live rows and keep their statistics; `outputs` adds results without gradient."""
        ctx.dtype, ctx.options, ctx.with_entropy = product_dtype(hidden), options, with_entropy
        ctx.weight_grad_buffer = weight_grad_buffer
        head = make_head(weight, bias, ctx.dtype, options.logits_precision)
        scoring = Scoring(hidden, token_ids, temperature, logit_params, with_entropy)
        with torch.autocast(hidden.device.type, enabled=False):
            visitor = StatisticsVisitor(outputs, hidden.shape[0], logit_params)
            scored = logprob_forward(head, scoring, mask, options, visitor if outputs else None)
        ctx.set_materialize_grads(False)
        extra = visitor.masked(mask)
        ctx.mark_non_differentiable(*extra, *([] if with_entropy else [scored.entropy]))
        ctx.save_for_backward(
            hidden, weight, bias, token_ids, mask, temperature, logit_params, *scored
        )
        return scored.logprob, scored.entropy, *extra

    @staticmethod
    @first_order_only
    def backward(
        ctx: Any, dlogprob: Tensor | None, dentropy: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of hidden, weight and bias in their own dtypes."""
        hidden, weight, bias, token_ids, mask, temperature, logit_params, *scored = (
            ctx.saved_tensors
        )
        if dlogprob is None and dentropy is None:
            return (None,) * len(ctx.needs_input_grad)
        like = Originals(hidden, weight, bias)
        absent = scored[0].new_empty(0)
        upstream = Upstream(
            *(absent if g is None else g.contiguous() for g in (dlogprob, dentropy))
        )
        with torch.autocast(hidden.device.type, enabled=False):
            found = logprob_backward(
                make_head(weight, bias, ctx.dtype, ctx.options.logits_precision),
                like,
                Scoring(hidden, token_ids, temperature, logit_params, ctx.with_entropy),
                Scored(*scored),
                upstream,
                mask,
                like.needs(ctx.needs_input_grad),
                ctx.options,
                ctx.weight_grad_buffer,
            )
        return (*found, *(None,) * (len(ctx.needs_input_grad) - 3))


def linear_token_logprob(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    token_ids: Tensor,  # [...] integer, each in [0, V)
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,  # [...] bool
    with_entropy: bool = False,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    logits_precision: Precision = "auto",
    workspace_bytes: int | None = None,
    capacity: int | None = None,
    weight_grad_buffer: Tensor | None = None,  # [V, H] float32
) -> TokenLogprob:
    """`token_logprob` of the logits `hidden @ weight.T + bias`, of which only a chunk of rows exists at a time.

    Masked rows are left out of every product, and the backward recomputes the logits of those rows alone whose upstream
    gradient is not exactly 0. The products run in autocast's dtype if autocast is on, else in that of `hidden` (a
    weight of another dtype is copied once per pass); gradients have the dtypes of their tensors.

    Args:
        hidden: Last hidden states at the positions that predict `token_ids`.
        weight: Weight of the language-model head; any strides, tied or not. A sharded DTensor is gathered once.
        token_ids: The tokens to score.
        bias: Bias of the head.
        temperature: A number > 0, or a tensor with one value per token.
        mask: True where a token counts. Elsewhere log-prob, entropy and gradient are exactly 0, whatever is there. On a
            GPU the number of live rows is read on the host (the one sync of this function) unless `capacity` is given.
        with_entropy: Also return the entropy (differentiable).
        logit_scale: See `token_logprob`.
        logit_softcap: See `token_logprob`.
        logits_precision: "auto" keeps half-precision products as the hardware sums them, in float32, where that is as
            fast: on GPUs and on CPUs with AVX512-BF16; their log-probs are exact to 1e-5. Elsewhere it is "input",
            which rounds the logits to the products' dtype as everybody else does: off by up to 2^-9 of the largest
            logit. "float32" keeps them everywhere, and makes the gradient products from unrounded gradients of the
            logits (1.6 times the work; float32 products on CPUs without AVX512-BF16). `backend_report()` tells which.
        workspace_bytes: Memory for logits at a time, whatever the number of tokens. Default: 160 MiB on a CPU (kept for
            the next call until `release_workspace()`), a 32nd of a GPU's memory within 1 to 2.5 GiB.
        capacity: Work on exactly this many rows, live ones first: static shapes and no sync, as graph capture needs.
            If more rows are live, all live results are NaN.
        weight_grad_buffer: float32 (float64 for a float64 weight) tensor that backward adds the gradient of `weight`
            to, such as a main gradient; `weight` itself then receives none.

    Returns:
        TokenLogprob(logprob, entropy), float32 (float64 for float64 hidden states).

    Raises:
        TypeError: A tensor has the wrong dtype.
        ValueError: Shapes or devices disagree, or a number is out of range. A token id outside [0, V) on a live token
            gives NaN in that row; `fastgrpo.checks("strict")` raises on it.

    Source: the policy term of Shao et al. 2024 (arXiv:2402.03300), Eq. 3.
    """
    logprob, entropy, *_ = apply_scoring(
        hidden,
        weight,
        token_ids,
        bias=bias,
        temperature=temperature,
        mask=mask,
        with_entropy=with_entropy,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        options=LinearOptions(logits_precision, workspace_bytes, capacity),
        weight_grad_buffer=weight_grad_buffer,
    )
    return TokenLogprob(logprob, entropy if with_entropy else None)


def apply_scoring(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None,
    temperature: float | Tensor,
    mask: Tensor | None,
    with_entropy: bool,
    logit_scale: float,
    logit_softcap: float | None,
    options: LinearOptions,
    weight_grad_buffer: Tensor | None = None,
    outputs: tuple[str, ...] = (),
) -> list[Tensor]:
    """Check the arguments of `linear_token_logprob` and run it: log-prob, entropy ([0] if not asked for), `outputs`."""
    hidden, weight, bias = check_head(hidden, weight, bias)
    check_weight_grad_buffer(weight_grad_buffer, weight)
    require_flag("with_entropy", with_entropy)
    shape = hidden.shape[:-1]
    ids = require_token_ids(token_ids, shape, hidden, "hidden")
    live = hidden.new_empty(0, dtype=torch.bool)
    if mask is not None:
        live = flatten(as_mask(mask, shape, hidden, "hidden"), torch.bool)
    tensors = (
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        ids,
        live,
        temperature_tensor(temperature, shape, hidden),
        logit_params_tensor(logit_scale, logit_softcap, hidden),
    )
    if torch.compiler.is_compiling():
        if outputs or weight_grad_buffer is not None:
            raise ValueError("outputs and weight_grad_buffer are not available under torch.compile")
        cut = (options.logits_precision, options.workspace_bytes, options.capacity)
        results = TracedLogprobFunction.apply(*tensors, with_entropy, product_dtype(hidden), *cut)
    else:
        results = LinearTokenLogprobFunction.apply(
            *tensors, with_entropy, options, weight_grad_buffer, outputs
        )
    if is_strict():
        raise_on_fault(
            "linear_token_logprob", results[0].isnan(), shape, weight.shape[0],
            token_ids=token_ids, hidden=hidden, temperature=temperature, weight=weight, bias=bias,
        )  # fmt: skip
    absent = 1 if not with_entropy else len(results)
    return [value if k == absent else value.view(shape) for k, value in enumerate(results)]
