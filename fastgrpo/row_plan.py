"""Row plans: which tokens of a batch need gradient products, which only a score, and which nothing at all.

Made from the mask, the advantages and the objective before the forward pass, on the host where the data is there: then
the loss on a GPU needs no synchronisation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrpo.batch import check_objective
from fastgrpo.functional.checks import (
    INTEGERS,
    as_mask,
    describe,
    flatten,
    require_device,
    require_float,
    require_shape,
    require_tensor,
)
from fastgrpo.functional.linear.inputs import LinearOptions
from fastgrpo.functional.linear.loss import RowClasses
from fastgrpo.functional.linear.plan import PlannedRows
from fastgrpo.functional.linear.rows import Selection
from fastgrpo.objective import Objective
from fastgrpo.reduction import Layout


@dataclass(frozen=True, kw_only=True)
class RowPlan:
    """Flat indices of the tokens of one batch by what is done with them; tokens in neither list are left out.

    The fields after `score_index` are there where the objective looks at whole sequences, or with `capacity`.
    """

    num_tokens: int
    active_index: Tensor  # [A] int64, ascending: score, loss and gradient
    score_index: Tensor  # [S] int64, ascending: score and metrics; their gradient is exactly 0
    active_offsets: Tensor | None = None  # [B + 1] int32: active tokens before each sequence
    score_offsets: Tensor | None = None
    active_ends: list[int] | None = None  # active_offsets[1:] on the host
    score_ends: list[int] | None = None
    overflow: Tensor | None = None  # [] bool: more tokens were live than `capacity` holds

    @property
    def num_active(self) -> int:
        """Tokens that take part in the gradient products."""
        return self.active_index.numel()

    @property
    def num_scored(self) -> int:
        """Tokens that are only scored."""
        return self.score_index.numel()

    def to(self, device: torch.device | str) -> "RowPlan":
        """The plan with its tensors on `device`, copied without waiting for it."""
        device = torch.device(device)

        def move(value: Tensor | None) -> Tensor | None:
            if value is None or value.device == device:
                return value
            pinned = value.pin_memory() if device.type == "cuda" else value
            return pinned.to(device, non_blocking=True)

        names = ("active_index", "score_index", "active_offsets", "score_offsets", "overflow")
        return RowPlan(**(self.__dict__ | {name: move(getattr(self, name)) for name in names}))

    def row_classes(self) -> RowClasses:
        """The plan as the loss takes it."""

        def rows(index: Tensor, offsets: Tensor | None, ends: list[int] | None) -> PlannedRows:
            everything = index.numel() == self.num_tokens
            return PlannedRows(
                Selection.every(self.num_tokens)
                if everything
                else Selection.of(self.num_tokens, index),
                offsets,
                ends,
            )

        return RowClasses(
            rows(self.active_index, self.active_offsets, self.active_ends),
            rows(self.score_index, self.score_offsets, self.score_ends),
            self.overflow,
        )


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


def classify(
    live: Tensor,  # [N] bool
    active: Tensor,  # [N] bool
    layout: Layout,
    objective: Objective,
    *,
    score_inactive: bool,
    capacity: int | None,
) -> RowPlan:
    """The plan of a flat batch. One read by the host of two numbers, or of 2 B for a sequence-level objective."""
    total = live.numel()
    by_sequence = not objective.is_token_local
    cu_seqlens = layout.cu_seqlens
    if by_sequence:
        active = live & layout.spread(layout.lengths(active) > 0)
    scored = live & ~active
    if capacity is not None:
        return _static(live if score_inactive else active, cu_seqlens, by_sequence, capacity)
    if not score_inactive:
        scored = torch.zeros_like(scored)
    order = torch.where(active, 0, torch.where(scored, 1, 2)).sort(stable=True).indices
    offsets = [
        _count_before(kind, cu_seqlens) if by_sequence else None for kind in (active, scored)
    ]
    counts = (
        [active.sum(), scored.sum()]
        if not by_sequence
        else [o[1:] for o in offsets if o is not None]
    )
    host: list[int] = torch.cat([value.reshape(-1) for value in counts]).tolist()
    half = len(host) // 2
    ends = (host[:half], host[half:])
    num_active, num_scored = (values[-1] if values else 0 for values in ends)
    return RowPlan(
        num_tokens=total,
        active_index=order[:num_active],
        score_index=order[num_active : num_active + num_scored],
        active_offsets=offsets[0],
        score_offsets=offsets[1],
        active_ends=ends[0] if by_sequence else None,
        score_ends=ends[1] if by_sequence else None,
    )


def _count_before(chosen: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Chosen tokens before each sequence, [B + 1] int32."""
    running = torch.nn.functional.pad(chosen.cumsum(0), (1, 0))
    return running[cu_seqlens.long()].to(torch.int32)


def _static(wanted: Tensor, cu_seqlens: Tensor, by_sequence: bool, capacity: int) -> RowPlan:
    """`capacity` rows whatever the data: the wanted ones first, then dead ones that the mask keeps out."""
    if capacity >= wanted.numel():
        index, offsets = torch.arange(wanted.numel(), device=wanted.device), cu_seqlens
    else:
        index = wanted.sort(descending=True, stable=True).indices[:capacity]
        offsets = _count_before(wanted, cu_seqlens).clamp(max=capacity)
        offsets[-1] = capacity  # dead rows follow the last sequence
    return RowPlan(
        num_tokens=wanted.numel(),
        active_index=index,
        score_index=index[:0],
        active_offsets=offsets if by_sequence else None,
        score_offsets=offsets * 0 if by_sequence else None,
        overflow=wanted.sum() > capacity,
    )


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
        live, active, layout, objective, score_inactive=score_inactive, capacity=capacity
    )


def _per_token(advantage: Tensor, layout: Layout, mask: Tensor) -> Tensor:
    require_float("advantage", advantage)
    require_device("advantage", advantage, mask, "mask")
    if tuple(advantage.shape) == tuple(layout.shape):
        return flatten(advantage, advantage.dtype)
    rule = f"one value per sequence, or {tuple(layout.shape)}: one per token"
    require_shape("advantage", advantage, (layout.num_sequences,), rule)
    return layout.spread(advantage)
