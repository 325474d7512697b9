"""group_advantage: what every completion is worth, compared with the others that answer the same prompt."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastgrpo.functional.checks import (
    FLOATS,
    INTEGERS,
    data_check,
    describe,
    is_readable,
    is_strict,
    needs_grad,
    require_detached,
    require_device,
    require_float,
    require_number,
    require_shape,
    require_tensor,
)
from fastgrpo.functional.first_order import first_order_only
from fastgrpo.functional.groups import group_layout
from fastgrpo.ops import group_advantage as ops
from fastgrpo.reference.group_advantage import Baseline, Combine, Scale, Singleton
from fastgrpo.reference.token_logprob import accumulate_dtype

BASELINES = {
    "mean": Baseline.MEAN,
    "leave_one_out": Baseline.LEAVE_ONE_OUT,
    "length_weighted": Baseline.LENGTH_WEIGHTED,
    "second_best": Baseline.SECOND_BEST,
    "batch": Baseline.BATCH,
    "none": Baseline.NONE,
}
SCALES = {"group": Scale.GROUP, "batch": Scale.BATCH, "mean": Scale.MEAN, "none": Scale.NONE}
COMBINES = {"sum": Combine.SUM, "normalize_then_sum": Combine.NORMALIZE_THEN_SUM}
SINGLETONS = {"zero": Singleton.ZERO, "raw": Singleton.RAW}


class GroupAdvantage(NamedTuple):
    """Result of group_advantage. Only `advantage` carries a gradient; nothing here has a data-dependent shape."""

    advantage: Tensor  # [B]
    mean: Tensor  # [B] mean score of the row's group; NaN if the group has no score or a fault
    std: Tensor  # [B] standard deviation of the row's group, before eps
    is_degenerate: Tensor  # [B] bool: the row's group has less than two scores, or equal ones
    active_index: Tensor  # [B] int64: rows whose advantage is not 0, ascending, then -1
    num_active: Tensor  # [] int64
    num_excluded: Tensor  # [] int64: rows left out because every reward in them is NaN
    num_missing: Tensor  # [] int64: NaN entries of `reward`
    num_fault: Tensor  # [] int64: rows of groups with an infinite reward; their advantage is NaN


class GroupAdvantageFunction(torch.autograd.Function):
    """Advantage with the hand-written backward; the other outputs are not differentiable."""

    @staticmethod
    def forward(
        reward: Tensor, layout: tuple[Tensor, ...], group_size: int, spec: list[int]
    ) -> tuple[Tensor, ...]:
        """Run the forward op."""
        outputs: tuple[Tensor, ...] = ops.group_advantage_fwd(reward, *layout, group_size, spec)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep the rewards, the scores and the batch statistics."""
        reward, layout, ctx.group_size, ctx.spec = inputs
        advantage, *others = output
        ctx.mark_non_differentiable(*others)
        ctx.set_materialize_grads(False)
        score, batch = others[-2:]
        ctx.save_for_backward(advantage, score, batch, reward, *layout)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        """Gradient of the rewards."""
        if grads[0] is None:
            return None, None, None, None
        dreward = ops.group_advantage_bwd(
            grads[0].contiguous(), *ctx.saved_tensors, ctx.group_size, ctx.spec
        )
        return dreward, None, None, None


def _choice(name: str, value: object, table: Mapping[str, int]) -> int:
    if not isinstance(value, str) or value not in table:
        allowed = ", ".join(map(repr, table))
        raise ValueError(f"{name} must be one of {allowed}, got {describe(value)}")
    return int(table[value])


def _check_reward(reward: object) -> Tensor:
    """Return the rewards as [B, K] in the dtype of the result."""
    reward = require_float("reward", reward)
    if reward.dim() not in (1, 2) or (reward.dim() == 2 and reward.shape[1] == 0):
        raise ValueError(
            f"reward must have shape [B] or [B, K] with K >= 1, got {describe(reward)}"
        )
    if is_readable(reward):
        message = f"reward must not be infinite (NaN means not scored), got {describe(reward)}"
        data_check(~reward.detach().isinf(), message)
    columns = reward[:, None] if reward.dim() == 1 else reward
    return columns.to(accumulate_dtype(reward.dtype)).contiguous()


def _check_row(name: str, value: object, reward: Tensor) -> Tensor:
    """Return a finite float input of one value per completion."""
    row = require_float(name, value)
    require_shape(name, row, reward.shape[:1], "one entry per row of reward")
    require_device(name, row, reward, "reward")
    if is_readable(row):
        data_check(row.detach().isfinite(), f"{name} must be finite, got {describe(row)}")
    return row.to(reward.dtype)


def _check_weights(weights: Tensor | Sequence[float] | None, reward: Tensor) -> Tensor:
    """Return the column weights on the device of the rewards, or nothing where all are 1."""
    columns = reward.shape[1]
    if weights is None:
        return reward.new_empty(0)
    if isinstance(weights, Tensor):
        require_detached("reward_weights", require_float("reward_weights", weights))
    elif not isinstance(weights, Sequence) or not all(isinstance(w, int | float) for w in weights):
        raise TypeError(f"reward_weights must be a tensor or numbers, got {describe(weights)}")
    weight = torch.as_tensor(weights, dtype=reward.dtype)
    require_shape("reward_weights", weight, (columns,), "one weight per reward column")
    if is_readable(weight):
        data_check(weight.isfinite(), f"reward_weights must be finite, got {weight}")
    return weight.to(reward.device, non_blocking=True)


def _check_lengths(lengths: Tensor | None, needed: bool, reward: Tensor) -> Tensor:
    if (lengths is not None) != needed:
        raise ValueError(
            "lengths must be given with baseline='length_weighted' and only then, "
            f"got {describe(lengths)}"
        )
    if lengths is None:
        return reward.new_empty(0)
    lengths = require_tensor("lengths", lengths, (*INTEGERS, *FLOATS), "integer or float")
    require_detached("lengths", lengths)
    length = _check_row("lengths", lengths.to(reward.dtype), reward).contiguous()
    if is_readable(length):
        data_check(length >= 0, f"lengths must be >= 0, got {describe(lengths)}")
    return length


def _with_baseline(reward: Tensor, weight: Tensor, baseline: Tensor) -> tuple[Tensor, Tensor]:
    """Append an external baseline as a column of weight -1, NaN where the row has no reward."""
    column = _check_row("baseline", baseline, reward)
    column = torch.where(reward.detach().isnan().all(dim=1), torch.nan, column)
    weight = weight if weight.numel() else reward.new_ones(reward.shape[1])
    return torch.cat([reward, column[:, None]], 1), torch.cat([weight, weight.new_full((1,), -1.0)])


def _check_numbers(eps: float, ddof: int, tie_tolerance: float) -> Tensor:
    for name, value in (("eps", eps), ("tie_tolerance", tie_tolerance)):
        require_number(name, value, above=-math.ulp(0.0), rule=">= 0 and finite")
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, got {ddof!r}")
    if tie_tolerance >= 1:
        raise ValueError(f"tie_tolerance must be < 1, got {tie_tolerance!r}")
    return torch.tensor([eps, float(ddof), tie_tolerance], dtype=torch.float64)


def _check_spec(baseline: str, scale: str, combine: str, singleton: str) -> list[int]:
    spec = [
        _choice("baseline", baseline, BASELINES),
        _choice("scale", scale, SCALES),
        _choice("combine", combine, COMBINES),
        _choice("singleton", singleton, SINGLETONS),
    ]
    if baseline == "batch" and scale not in ("batch", "none"):
        raise ValueError(f"baseline='batch' needs scale='batch' or 'none', got scale={scale!r}")
    normal = (baseline, scale, singleton) == ("mean", "group", "zero")
    if combine == "normalize_then_sum" and not normal:
        raise ValueError(
            "combine='normalize_then_sum' normalises within the group: it needs baseline='mean', scale='group' and "
            f"singleton='zero', got {baseline!r}, {scale!r} and {singleton!r}"
        )
    return spec


def group_advantage(
    reward: Tensor,  # [B] or [B, K] float; NaN = not scored
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,  # [B] int64, any values in any order
    baseline: str | Tensor = "mean",
    scale: Literal["group", "batch", "mean", "none"] = "group",
    eps: float = 1e-4,
    ddof: int = 1,
    reward_weights: Tensor | Sequence[float] | None = None,  # [K]
    combine: Literal["sum", "normalize_then_sum"] = "sum",
    lengths: Tensor | None = None,  # [B] completion lengths, for baseline="length_weighted"
    singleton: Literal["zero", "raw"] = "zero",
    tie_tolerance: float = 0.0,
) -> GroupAdvantage:
    """Advantage of every completion relative to its group: (score - baseline) / scale.

    The score of a row is the weighted sum of its K rewards. Statistics are computed in float64, centred on the smallest
    score, so that equal scores give exactly 0 and large offsets cost no digits. Use one of the following, or any other
    combination of `baseline` and `scale`:

    ============================  =================================================  ======================
    GRPO (arXiv 2402.03300)       the defaults: (r - mean) / (std + eps)
    Dr. GRPO (2503.20783)         scale="none"                                       r - mean
    RLOO (2402.14740)             baseline="leave_one_out", scale="none"             r - mean of the others
    batch std (2508.08221)        scale="batch"                                      (r - mean) / (std_B + eps)
    MaxRL (2602.02710)            scale="mean"                                       (r - mean) / mean, 0 if mean <= 0
    pass@k (2503.19595)           baseline="second_best", scale="none" or "group"    best only: r_1 - r_2
    OPO (2505.23585)              baseline="length_weighted", scale="none"           r - sum(len r) / sum(len)
    ReMax (2310.10505)            baseline=greedy_reward, scale="none"               r - reward of the greedy answer
    REINFORCE++ (2501.03262)      baseline="batch", scale="batch"                    (r - mean_B) / (std_B + eps)
    GDPO (2601.05242)             combine="normalize_then_sum"                       sum_k w_k z_k / (std_B + eps)
    ============================  =================================================  ======================

    The baseline variant of REINFORCE++ is scale="none" followed by `whiten`. GDPO subtracts no batch mean: the mean of
    scores that are centred within every group is 0.

    A row whose rewards are all NaN is left out of every statistic and has advantage 0. A group with an infinite reward
    raises on the CPU; on other devices its rows become NaN, count in num_fault and touch no other group. A group
    without spread has advantage exactly 0 whenever baseline or scale is taken from the group; `tie_tolerance` widens
    "without spread" from equal scores to largest - smallest <= tie_tolerance * largest magnitude. A batch without
    spread is treated alike by scale="batch".

    Args:
        reward: rewards, one column per reward function.
        group_size: number of completions per prompt when they stand side by side.
        group_ids: the prompt of each completion instead; groups may differ in size.
        baseline: what is subtracted; a tensor [B] is an external baseline.
        scale: what the difference is divided by.
        eps: added to the standard deviation.
        ddof: degrees of freedom taken off the count in the variance, 0 or 1.
        reward_weights: weight of each reward column, default 1.
        combine: weighted sum of rewards, or of their group z-scores (then divided by the batch standard deviation).
        lengths: weights of the length-weighted baseline, >= 0; equal ones where a group's total is 0.
        singleton: advantage of a group with a single scored member: 0, or its reward (group mean 0, std 1; as verl).
        tie_tolerance: relative spread up to which scores count as equal.

    Returns:
        GroupAdvantage. float64 rewards give float64 results, all others float32.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices, values or choices do not fit together.
    """
    columns = _check_reward(reward)
    weight = _check_weights(reward_weights, columns)
    if isinstance(baseline, Tensor):
        columns, weight = _with_baseline(columns, weight, baseline)
        baseline = "none"
    spec = _check_spec(baseline, scale, combine, singleton)
    params = _check_numbers(eps, ddof, tie_tolerance)
    length = _check_lengths(lengths, baseline == "length_weighted", columns)
    order, offsets, size = group_layout(columns.shape[0], columns, "reward", group_size, group_ids)
    layout = (weight, length, order, offsets, params)
    if needs_grad(columns):
        outputs = GroupAdvantageFunction.apply(columns, layout, size, spec)
    else:
        outputs = ops.group_advantage_fwd(columns, *layout, size, spec)
    advantage, mean, std, is_degenerate, active_index, counts = outputs[:6]
    active, excluded, missing, fault = counts.unbind()
    if is_strict() and bool(fault > 0):
        where = ", ".join(map(str, reward.isinf().nonzero()[0].tolist()))
        raise ValueError(
            f"group_advantage: reward[{where}] must be finite, or NaN if there is none, got an infinite value; "
            f"{int(fault)} rows are in such groups"
        )
    return GroupAdvantage(
        advantage, mean, std, is_degenerate, active_index, active, excluded, missing, fault
    )
