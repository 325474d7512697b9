"""The losses: an objective and the ops, from log-probs (`policy_loss`) or from logits in one pass (`grpo_loss`)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastgrpo.batch import LossBatch, LossInputs, check_objective, prepare, sequence_shape
from fastgrpo.functional.checks import (
    data_check,
    describe,
    flatten,
    is_strict,
    needs_grad,
    require_device,
    require_flag,
    require_float,
    require_number,
    require_shape,
    require_token_ids,
)
from fastgrpo.functional.faults import raise_on_fault
from fastgrpo.functional.grpo_loss import GRPOLossFunction, default_grad_scale
from fastgrpo.functional.policy_loss import PolicyLossFunction
from fastgrpo.functional.token_logprob import (
    check_logits,
    logit_params_tensor,
    rows,
    temperature_tensor,
)
from fastgrpo.metrics import Metrics
from fastgrpo.objective import Objective
from fastgrpo.ops.surrogates import run_grpo_loss, run_policy_loss
from fastgrpo.reference.token_logprob import accumulate_dtype
from fastgrpo.spec import METRICS

# Made here, not in the call: Dynamo does not trace the construction of an objective.
DEFAULT_OBJECTIVE = Objective.grpo()


class PolicyLoss(NamedTuple):
    """Result of a loss; `logprob` and `entropy` come from the one-pass losses only."""

    loss: Tensor  # 0-dim
    token_loss: Tensor  # shape of the tokens, before weights; exactly 0 where masked
    metrics: Metrics
    logprob: Tensor | None = None
    entropy: Tensor | None = None


def loss_metrics(data: Tensor, batch: LossBatch) -> Metrics:
    """Metric rows of the op, and of the rollout correction if there was one."""
    if batch.rollout_metrics is None:
        return Metrics(data)
    names, rollout = batch.rollout_metrics
    return Metrics(torch.cat([data, rollout]), METRICS + names)


def policy_loss(
    logprob: Tensor,  # [B, T], or packed [N]
    advantage: Tensor,  # [B] or [B, T]; packed: [B] or [N]
    mask: Tensor,  # [B, T] or [N], bool or integer
    *,
    old_logprob: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    rollout_logprob: Tensor | None = None,
    entropy: Tensor | None = None,
    token_weight: Tensor | None = None,
    kl_weight: Tensor | None = None,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    objective: Objective | None = None,
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> PolicyLoss:
    """Policy-gradient loss of any GRPO-family objective from per-token log-probs.

    loss = sum_t weight_t * (policy_t + beta * kl_t) - entropy_coef * sum_t weight_t * entropy_t over live tokens;
    `objective` (default `Objective.grpo()`, Eq. 3 with beta = 0) says what policy_t, kl_t and weight_t are.

    Args:
        logprob: Log-probs of the sampled tokens under the policy being trained.
        advantage: One value per completion, or one per token. Nothing else is broadcast.
        mask: True where a token counts. What a masked slot holds, in any argument, has no influence.
        old_logprob: Log-probs under the policy that sampled (or of the last sync); None: the ratio is exactly 1.
        ref_logprob: Log-probs under the reference; required by beta > 0, else it only feeds `metrics["kl"]`.
        rollout_logprob: Log-probs reported by the sampler, for `objective.correction` and gates. NaN: not scored.
        entropy: Entropy of each position, for the entropy bonus and the metrics.
        token_weight: Factor on the policy term; denominators keep their count.
        kl_weight: Factor on the KL term.
        group_size: Completions per prompt, for `Reduce(per="prompt")`.
        group_ids: Prompt of each completion [B] instead of `group_size`.
        objective: What is optimised.
        normalizer: The denominator D of the reduction, summed over all micro-batches and ranks
            (`global_normalizer`); None: of this call. Gradients are then to be summed, not averaged.
        cu_seqlens: [B + 1] offsets of packed sequences.

    Returns:
        PolicyLoss(loss, token_loss, metrics). Gradient flows to `logprob` and `entropy` through both.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes or devices disagree, or the objective needs a tensor that is missing.

    Source: Shao et al. 2024 (arXiv:2402.03300), Eq. 1, 3 and 4; each preset of `Objective` cites its paper.
    """
    logprob = require_float("logprob", logprob)
    shape = sequence_shape(logprob, cu_seqlens, "logprob")
    dtype = accumulate_dtype(logprob.dtype)
    if entropy is not None:
        require_float("entropy", entropy)
        require_shape("entropy", entropy, shape, "the shape of logprob")
        require_device("entropy", entropy, logprob, "logprob")
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
        objective=DEFAULT_OBJECTIVE if objective is None else objective,
        normalizer=normalizer,
        cu_seqlens=cu_seqlens,
    )
    batch = prepare(inputs, shape, logprob, dtype, entropy is not None)
    flat = flatten(logprob, dtype)
    flat_entropy = flat.new_empty(0) if entropy is None else flatten(entropy, dtype)
    tail = (batch.entropy_weight, batch.cu_seqlens, batch.params, batch.spec, batch.surrogate)
    if needs_grad(flat, flat_entropy):
        loss, token_loss, _, data = PolicyLossFunction.apply(
            flat, flat_entropy, batch.advantage, batch.mask, batch.weight, *batch.sides(), *tail
        )
    else:
        loss, token_loss, _, data = run_policy_loss(
            flat, batch.advantage, batch.mask, batch.weight, *batch.sides(), flat_entropy, *tail
        )
    if is_strict():
        raise_on_fault(
            "policy_loss", batch.mask & ~token_loss.isfinite(), shape,
            logprob=logprob, entropy=entropy, **vars(inputs),
        )  # fmt: skip
    return PolicyLoss(loss, token_loss.view(shape), loss_metrics(data, batch))


def grpo_loss(
    logits: Tensor,  # [B, T, V], or packed [N, V]
    token_ids: Tensor,  # [B, T] or [N]
    advantage: Tensor,  # [B] or [B, T]; packed: [B] or [N]
    mask: Tensor,  # [B, T] or [N]
    *,
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
    overwrite_logits: bool = False,
    grad_scale: float | Tensor | None = None,
) -> PolicyLoss:
    """`token_logprob` and `policy_loss` in one pass over the logits, gradient included.

    The gradient of the logits is made in forward, while a row is in cache, and scaled by the upstream gradient in
    backward. Tokens whose coefficient is exactly 0 (masked, clipped, zero advantage with beta = 0) cost no second read.

    Args:
        logits: Scores over the vocabulary; `token_ids` are the tokens to score at these positions.
        token_ids: The sampled tokens.
        advantage: See `policy_loss`, as for all arguments up to `cu_seqlens`.
        mask: See `policy_loss`.
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
        temperature: See `token_logprob`, as for all that follow.
        with_entropy: Also compute the entropy (metrics, entropy bonus); it comes almost free.
        logit_scale: See `token_logprob`.
        logit_softcap: See `token_logprob`.
        overwrite_logits: Write the gradient into the memory of `logits` during forward: no second [N, V] buffer.
        grad_scale: Factor folded into the stored gradient and divided out in backward, against underflow. Default: for
            float16 logits the power of two nearest the normaliser, else 1.

    Returns:
        PolicyLoss(loss, token_loss, metrics, logprob, entropy). Only `loss` carries gradient.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes or devices disagree, or the objective needs a tensor that is missing.

    Source: Shao et al. 2024 (arXiv:2402.03300), Eq. 3 and 4.
    """
    logits = check_logits(logits, overwrite_logits)
    require_flag("with_entropy", with_entropy)
    shape = sequence_shape(logits, cu_seqlens, "logits", trailing="V")
    ids = require_token_ids(token_ids, shape, logits, "logits")
    dtype = accumulate_dtype(logits.dtype)
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
        objective=DEFAULT_OBJECTIVE if objective is None else objective,
        normalizer=normalizer,
        cu_seqlens=cu_seqlens,
    )
    batch = prepare(inputs, shape, logits, dtype, with_entropy)
    scale = grad_scale_tensor(grad_scale, logits, batch.weight)
    head = (
        ids,
        temperature_tensor(temperature, shape, logits),
        logit_params_tensor(logit_scale, logit_softcap, logits),
    )
    tail = (
        batch.advantage,
        batch.mask,
        batch.weight,
        *batch.sides(),
        batch.entropy_weight,
        batch.cu_seqlens,
        batch.params,
        scale,
        batch.spec,
        batch.surrogate,
        with_entropy,
    )
    if needs_grad(logits):
        loss, token_loss, logprob, entropy, data = GRPOLossFunction.apply(
            rows(logits), overwrite_logits, *head, *tail
        )
    else:
        loss, token_loss, logprob, entropy, _, data = run_grpo_loss(
            rows(logits), *head, *tail, logits.new_empty(0)
        )
    if is_strict():
        raise_on_fault(
            "grpo_loss", batch.mask & ~token_loss.isfinite(), shape, logits.shape[-1],
            token_ids=token_ids, logits=logits, temperature=temperature, **vars(inputs),
        )  # fmt: skip
    return PolicyLoss(
        loss,
        token_loss.view(shape),
        loss_metrics(data, batch),
        logprob.view(shape),
        entropy.view(shape) if with_entropy else None,
    )


def grad_scale_tensor(grad_scale: float | Tensor | None, like: Tensor, weight: Tensor) -> Tensor:
    """The grad_scale of a one-pass loss as [1], or [0] for a factor of 1."""
    if grad_scale is None:
        return default_grad_scale(like, weight)
    if isinstance(grad_scale, Tensor):
        require_float("grad_scale", grad_scale)
        if grad_scale.numel() != 1:
            raise ValueError(
                f"grad_scale must be a number or hold one element, got {describe(grad_scale)}"
            )
        positive = (grad_scale > 0) & (grad_scale < torch.inf)
        data_check(positive, f"grad_scale must be > 0 and finite, got {grad_scale}")
        return grad_scale.detach().reshape(1).to(like.device, weight.dtype)
    require_number("grad_scale", grad_scale, above=0.0, rule="> 0 and finite")
    return torch.full((1,), grad_scale, dtype=weight.dtype, device=like.device)


class GRPOLoss(nn.Module):
    """`grpo_loss` with fixed options as a module: `GRPOLoss(Objective.dapo())(logits, token_ids, advantage, mask)`."""

    def __init__(
        self,
        objective: Objective | None = None,
        *,
        temperature: float = 1.0,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
        overwrite_logits: bool = False,
    ) -> None:
        """Keep the options; see `grpo_loss`."""
        super().__init__()
        self.objective = DEFAULT_OBJECTIVE if objective is None else objective
        check_objective(self.objective)
        self.temperature = temperature
        self.logit_scale = logit_scale
        self.logit_softcap = logit_softcap
        self.overwrite_logits = overwrite_logits

    def forward(
        self,
        logits: Tensor,
        token_ids: Tensor,
        advantage: Tensor,
        mask: Tensor,
        *,
        old_logprob: Tensor | None = None,
        ref_logprob: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> PolicyLoss:
        """Loss of a batch; call `grpo_loss` itself for the rarer arguments."""
        return grpo_loss(
            logits,
            token_ids,
            advantage,
            mask,
            old_logprob=old_logprob,
            ref_logprob=ref_logprob,
            normalizer=normalizer,
            cu_seqlens=cu_seqlens,
            objective=self.objective,
            temperature=self.temperature,
            logit_scale=self.logit_scale,
            logit_softcap=self.logit_softcap,
            overwrite_logits=self.overwrite_logits,
        )
