"""Row plans: which tokens of a batch need gradient products, which only a score, and which nothing at all.

Made from the mask, the advantages and the objective before the forward pass, on the host where the data is there: then
the loss on a GPU needs no synchronisation.
"""

import torch
from torch import Tensor

from fastgrpo.batch import check_objective
from fastgrpo.functional.checks import (
    INTEGERS,
    as_mask,
    describe,
    flatten,
    require_device,
    require_flag,
    require_float,
    require_shape,
    require_tensor,
)
from fastgrpo.functional.linear.inputs import LinearOptions
from fastgrpo.functional.linear.plan import RowPlan, classify
from fastgrpo.objective import Objective
from fastgrpo.reduction import Layout


def gradient_tokens(
    mask: Tensor, advantage: Tensor, objective: Objective, token_weight: Tensor, kl_weight: Tensor
) -> Tensor:
    """Live tokens [N] whose gradient is not known to be 0 before they are scored; all arguments are flat."""
    if objective.entropy_coef:
        return mask
    builtin = objective.surrogate in ("ratio", "logp")
    policy = advantage != 0 if builtin else torch.ones_like(mask)
    if token_weight.numel():
        policy = policy & (token_weight != 0)
    if objective.kl.beta:
        policy = policy | (kl_weight != 0 if kl_weight.numel() else torch.ones_like(mask))
    return mask & policy


def plan_rows(
    mask: Tensor,  # [B, T], or packed [N]
    advantage: Tensor,  # [B] or [B, T]; packed: [B] or [N]
    *,
    objective: Objective | None = None,
    token_weight: Tensor | None = None,
    kl_weight: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    score_inactive: bool = True,
    capacity: int | None = None,
) -> RowPlan:
    """Plan the rows of a batch for `linear_grpo_loss(plan=...)`; make it from CPU tensors to spare a GPU the sync.

    A live token is active unless its gradient is exactly 0 whatever the policy says: advantage 0 (or `token_weight` 0)
    with no KL gradient (beta 0, or `kl_weight` 0) and no entropy bonus. For an objective that looks at whole sequences,
    a sequence is active if any of its tokens is.

    Args:
        mask: True where a token counts, as for the loss.
        advantage: As for the loss; `group_advantage` gives exactly 0 for groups with equal rewards.
        objective: As for the loss.
        token_weight: As for the loss.
        kl_weight: As for the loss.
        cu_seqlens: [B + 1] offsets of packed sequences.
        score_inactive: Score tokens whose gradient is 0, for the metrics; False leaves them out (log-prob 0, not
            counted).
        capacity: Plan exactly this many rows without reading the data: static shapes for graph capture. If more
            tokens are live than that, the loss is NaN.

    Returns:
        RowPlan, on the device of `mask`.
    """
    objective = objective or Objective.grpo()
    check_objective(objective)
    mask = require_tensor("mask", mask, (torch.bool, *INTEGERS), "bool or integer")
    shape = mask.shape
    if len(shape) != (2 if cu_seqlens is None else 1):
        raise ValueError(
            f"mask must be padded [B, T], or packed [N] with cu_seqlens, got {describe(mask)}"
        )
    LinearOptions(capacity=capacity)
    require_flag("score_inactive", score_inactive)
    layout = Layout.of(shape, cu_seqlens, mask.device)
    live = flatten(as_mask(mask, shape, mask, "the batch"), torch.bool)
    absent = torch.empty(0, device=mask.device)

    def weights(name: str, value: Tensor | None) -> Tensor:
        if value is None:
            return absent
        require_shape(name, require_float(name, value), shape, "one value per token")
        require_device(name, value, mask, "mask")
        return flatten(value, value.dtype)

    active = gradient_tokens(
        live,
        _per_token(advantage, layout, mask),
        objective,
        weights("token_weight", token_weight),
        weights("kl_weight", kl_weight),
    )
    return classify(
        live,
        active,
        layout.cu_seqlens,
        by_sequence=not objective.is_token_local,
        score_inactive=score_inactive,
        capacity=capacity,
    )


def _per_token(advantage: Tensor, layout: Layout, mask: Tensor) -> Tensor:
    require_float("advantage", advantage)
    require_device("advantage", advantage, mask, "mask")
    if tuple(advantage.shape) == tuple(layout.shape):
        return flatten(advantage, advantage.dtype)
    rule = f"one value per sequence, or {tuple(layout.shape)}: one per token"
    require_shape("advantage", advantage, (layout.num_sequences,), rule)
    return layout.spread(advantage)


__all__ = ["RowPlan", "gradient_tokens", "plan_rows"]
