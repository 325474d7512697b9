"""The loss from hidden states in one pass: `linear_grpo_loss`, as a function and as a module."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastgrpo.batch import LossInputs, prepare, sequence_shape
from fastgrpo.functional.checks import (
    describe,
    is_strict,
    needs_grad,
    require_flag,
    require_token_ids,
)
from fastgrpo.functional.faults import raise_on_fault
from fastgrpo.functional.linear.gemm import Precision
from fastgrpo.functional.linear.gradients import Originals
from fastgrpo.functional.linear.inputs import (
    LinearOptions,
    check_head,
    check_weight_grad_buffer,
    product_dtype,
)
from fastgrpo.functional.linear.loss import Formula, TokenInputs
from fastgrpo.functional.linear.plan import classify
from fastgrpo.functional.linear.score import Scoring
from fastgrpo.functional.linear.traced import TracedLossFunction
from fastgrpo.functional.linear_grpo_loss import (
    NO_GRADIENT,
    LinearGRPOLossFunction,
    run_linear_loss,
)
from fastgrpo.functional.token_logprob import logit_params_tensor, temperature_tensor
from fastgrpo.losses import PolicyLoss, grad_scale_tensor, loss_metrics
from fastgrpo.objective import Objective
from fastgrpo.reference.token_logprob import accumulate_dtype
from fastgrpo.row_plan import RowPlan, gradient_tokens

DEFAULT_OBJECTIVE = Objective.grpo()  # made here: torch.compile cannot build one while it traces


def linear_grpo_loss(
    hidden: Tensor,  # [B, T, H], or packed [N, H]
    weight: Tensor,  # [V, H]
    token_ids: Tensor,  # [B, T] or [N]
    advantage: Tensor,  # [B] or [B, T]; packed: [B] or [N]
    mask: Tensor,  # [B, T] or [N]
    *,
    bias: Tensor | None = None,  # [V]
    plan: RowPlan | None = None,
    old_logprob: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    rollout_logprob: Tensor | None = None,
    token_weight: Tensor | None = None,
    kl_weight: Tensor | None = None,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    objective: Objective | None = None,
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    with_entropy: bool = True,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    grad_scale: float | Tensor | None = None,
    score_inactive: bool = True,
    capacity: int | None = None,
    logits_precision: Precision = "auto",
    workspace_bytes: int | None = None,
    weight_grad_buffer: Tensor | None = None,  # [V, H] float32
) -> PolicyLoss:
    """`grpo_loss` of the logits `hidden @ weight.T + bias`, of which only a chunk of rows exists at a time.

    A chunk of logits becomes loss and gradient in place, and the gradient goes on into those of `hidden` and `weight`
    at once: three matrix products, two for a frozen head, none in backward. Masked tokens take part in no product;
    tokens whose gradient is known to be exactly 0 (see `plan_rows`) only in the first. For an objective that looks at
    whole sequences, chunks end where sequences do; a sequence of more tokens than a chunk holds is scored first and
    recomputed for its gradient (`backend_report().paths` tells). The products run in autocast's dtype if autocast is
    on, else in that of `hidden`; gradients have the dtypes of their tensors, and the weight's is summed in float32.

    Args:
        hidden: Last hidden states at the positions that predict `token_ids`.
        weight: Weight of the language-model head; any strides, tied or not. A sharded DTensor is gathered once.
        token_ids: The sampled tokens.
        advantage: See `policy_loss`, as for the arguments from `old_logprob` to `cu_seqlens`.
        mask: See `policy_loss`.
        bias: Bias of the head.
        plan: `plan_rows` of this batch, made on the host. None: made here; on a GPU that is one small read.
        old_logprob: See `policy_loss`.
        ref_logprob: See `policy_loss`.
        rollout_logprob: See `policy_loss`.
        token_weight: See `policy_loss`.
        kl_weight: See `policy_loss`.
        group_size: See `policy_loss`.
        group_ids: See `policy_loss`.
        objective: See `policy_loss`.
        normalizer: See `policy_loss`.
        cu_seqlens: See `policy_loss`.
        temperature: See `token_logprob`.
        with_entropy: Also compute the entropy (metrics, entropy bonus); it comes almost free.
        logit_scale: See `token_logprob`.
        logit_softcap: See `token_logprob`.
        grad_scale: See `grpo_loss`; the default looks at the dtype of the products.
        score_inactive: See `plan_rows`; for `plan=None`.
        capacity: See `plan_rows`; for `plan=None`.
        logits_precision: See `linear_token_logprob`.
        workspace_bytes: See `linear_token_logprob`.
        weight_grad_buffer: float32 tensor (float64 for a float64 weight), such as a main gradient, that the gradient of
            `weight` is added to; `weight` itself receives none. The sum is made in forward, so the loss must be
            differentiated with an upstream gradient of 1 (anything else raises; on a GPU the gradients become NaN).

    Returns:
        PolicyLoss(loss, token_loss, metrics, logprob, entropy). Only `loss` carries gradient.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes or devices disagree, or the objective needs a tensor that is missing.

    Source: Shao et al. 2024 (arXiv:2402.03300), Eq. 3 and 4.
    """
    hidden, weight, bias = check_head(hidden, weight, bias)
    check_weight_grad_buffer(weight_grad_buffer, weight)
    options = LinearOptions(logits_precision, workspace_bytes, capacity)
    require_flag("with_entropy", with_entropy)
    require_flag("score_inactive", score_inactive)
    shape = sequence_shape(hidden, cu_seqlens, "hidden", trailing="H")
    ids = require_token_ids(token_ids, shape, hidden, "hidden")
    inputs = LossInputs(
        advantage=advantage,
        mask=mask,
        old_logprob=old_logprob,
        ref_logprob=ref_logprob,
        rollout_logprob=rollout_logprob,
        token_weight=token_weight,
        kl_weight=kl_weight,
        group_size=group_size,
        group_ids=group_ids,
        objective=objective or DEFAULT_OBJECTIVE,
        normalizer=normalizer,
        cu_seqlens=cu_seqlens,
    )
    batch = prepare(inputs, shape, hidden, accumulate_dtype(hidden.dtype), with_entropy)
    if weight_grad_buffer is not None and (
        grad_scale not in (None, 1) or product_dtype(hidden) == torch.float16
    ):
        raise ValueError(
            "weight_grad_buffer needs grad_scale=1 and no float16 products: a scale could not be undone"
        )
    originals = Originals(hidden.reshape(-1, hidden.shape[-1]), weight, bias)
    scoring = Scoring(
        originals.hidden,
        ids,
        temperature_tensor(temperature, shape, hidden),
        logit_params_tensor(logit_scale, logit_softcap, hidden),
        with_entropy,
    )
    tokens = TokenInputs(
        advantage=batch.advantage,
        mask=batch.mask,
        weight=batch.weight,
        old=batch.old,
        ref=batch.ref,
        rollout=batch.rollout,
        log_weight=batch.log_weight,
        token_weight=batch.token_weight,
        kl_weight=batch.kl_weight,
        entropy_weight=batch.entropy_weight,
    )
    products = hidden.new_empty(0, dtype=product_dtype(hidden))
    scale = grad_scale_tensor(grad_scale, products, batch.weight)
    formula = Formula(batch.params, batch.spec, batch.surrogate, scale)
    planning = Planning(plan, batch.cu_seqlens, inputs.objective, score_inactive)
    if torch.compiler.is_compiling():
        results = _traced(originals, scoring, tokens, formula, planning, options)
    else:
        classes = planning.make(tokens, options.capacity).row_classes()
        work = (scoring, tokens, formula, classes)
        if needs_grad(*(value for value in originals if value is not None)):
            results = LinearGRPOLossFunction.apply(*originals, *work, options, weight_grad_buffer)
        else:
            results = run_linear_loss(originals, *work, NO_GRADIENT, options)[:5]
    loss, token_loss, logprob, entropy, data = results
    if is_strict():
        raise_on_fault(
            "linear_grpo_loss", batch.mask & ~token_loss.isfinite(), shape, weight.shape[0],
            token_ids=token_ids, hidden=hidden, temperature=temperature, **vars(inputs), weight=weight, bias=bias,
        )  # fmt: skip
    return PolicyLoss(
        loss,
        token_loss.view(shape),
        loss_metrics(data, batch),
        logprob.view(shape),
        entropy.view(shape) if with_entropy else None,
    )


@dataclass(frozen=True)
class Planning:
    """The caller's plan, or what is needed to make one."""

    plan: RowPlan | None
    cu_seqlens: Tensor
    objective: Objective
    score_inactive: bool

    def active(self, tokens: TokenInputs) -> Tensor:
        """Tokens [N] that may have a gradient."""
        return gradient_tokens(
            tokens.mask, tokens.advantage, self.objective, tokens.token_weight, tokens.kl_weight
        )

    def given(self, total: int) -> RowPlan | None:
        """The caller's plan; raises if it cannot be of this batch."""
        plan = self.plan
        if plan is None:
            return None
        if not isinstance(plan, RowPlan):
            raise TypeError(f"plan must be a RowPlan of plan_rows, got {describe(plan)}")
        if plan.num_tokens != total:
            raise ValueError(
                f"plan was made for {plan.num_tokens} tokens, but hidden holds {total}"
            )
        if (plan.active_offsets is None) != self.objective.is_token_local:
            raise ValueError(
                f"plan was made for another kind of objective than {self.objective.name!r}; pass it to plan_rows"
            )
        return plan

    def make(self, tokens: TokenInputs, capacity: int | None) -> RowPlan:
        """The caller's plan on the batch's device, checked where that needs no sync, or one made from the batch."""
        live, active, plan = tokens.mask, self.active(tokens), self.given(tokens.mask.numel())
        if plan is None:
            by_sequence = not self.objective.is_token_local
            return classify(
                live,
                active,
                self.cu_seqlens,
                by_sequence=by_sequence,
                score_inactive=self.score_inactive,
                capacity=capacity,
            )
        plan = plan.to(live.device)
        if live.device.type == "cpu" and plan.overflow is None:
            covered = torch.zeros_like(live).index_fill_(0, plan.active_index, True)
            if bool((active & ~covered).any()):
                raise ValueError(
                    "plan leaves out tokens that have a gradient: it was made from another mask or advantage"
                )
        return plan


def _traced(
    originals: Originals, scoring: Scoring, tokens: TokenInputs, formula: Formula, planning: Planning,
    options: LinearOptions,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The loss as one operator that torch.compile does not look into; rows are planned inside, or by a plain plan."""
    plan = planning.given(tokens.mask.numel())
    if plan is not None and plan.overflow is not None:
        raise ValueError(
            "a plan with capacity is not available under torch.compile; pass capacity to linear_grpo_loss"
        )
    results: tuple[Tensor, ...] = TracedLossFunction.apply(
        *originals,
        scoring.token_ids,
        scoring.temperature,
        scoring.logit_params,
        *tokens,
        planning.active(
            tokens
        ).clone(),  # it may be the mask, and a tracer refuses one tensor twice
        None if plan is None else plan.active_index,
        None if plan is None else plan.score_index,
        planning.cu_seqlens,
        formula.params,
        formula.grad_scale,
        formula.spec,
        formula.surrogate,
        scoring.with_entropy,
        not planning.objective.is_token_local,
        planning.score_inactive,
        product_dtype(originals.hidden),
        options.logits_precision,
        options.workspace_bytes,
        options.capacity,
    )
    return results


class LinearGRPOLoss(nn.Module):
    """`linear_grpo_loss` with fixed options as a module; the head's weight is an argument of `forward`.

    Call it inside the forward of the model that owns the head, so that the hooks of DDP and FSDP fire.
    """

    def __init__(
        self,
        objective: Objective | None = None,
        *,
        temperature: float = 1.0,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
        logits_precision: Precision = "auto",
        workspace_bytes: int | None = None,
        score_inactive: bool = True,
    ) -> None:
        """Keep the options; see `linear_grpo_loss`."""
        super().__init__()
        self.objective = objective or DEFAULT_OBJECTIVE
        self.temperature = temperature
        self.logit_scale = logit_scale
        self.logit_softcap = logit_softcap
        self.logits_precision: Precision = logits_precision
        self.workspace_bytes = workspace_bytes
        self.score_inactive = score_inactive

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        token_ids: Tensor,
        advantage: Tensor,
        mask: Tensor,
        *,
        bias: Tensor | None = None,
        plan: RowPlan | None = None,
        old_logprob: Tensor | None = None,
        ref_logprob: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> PolicyLoss:
        """Loss of a batch; call `linear_grpo_loss` itself for the rarer arguments."""
        return linear_grpo_loss(
            hidden,
            weight,
            token_ids,
            advantage,
            mask,
            bias=bias,
            plan=plan,
            old_logprob=old_logprob,
            ref_logprob=ref_logprob,
            normalizer=normalizer,
            cu_seqlens=cu_seqlens,
            objective=self.objective,
            temperature=self.temperature,
            logit_scale=self.logit_scale,
            logit_softcap=self.logit_softcap,
            logits_precision=self.logits_precision,
            workspace_bytes=self.workspace_bytes,
            score_inactive=self.score_inactive,
        )
