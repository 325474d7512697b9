"""Schemas of the group_advantage ops: the reference is the default kernel, csrc registers CPU and CUDA."""

import torch
from torch import Tensor

from fastgrpo.reference import group_advantage as reference


@torch.library.custom_op("fastgrpo::group_advantage_fwd", mutates_args=())
def group_advantage_fwd(
    reward: Tensor,
    weight: Tensor,
    length: Tensor,
    order: Tensor,
    offsets: Tensor,
    params: Tensor,
    group_size: int,
    spec: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Advantage, mean, std, is_degenerate, active_index [B], counts, score [B], batch (see the reference)."""
    return reference.group_advantage_fwd(
        reward, weight, length, order, offsets, params, group_size, spec
    )


@group_advantage_fwd.register_fake
def _fwd_fake(
    reward: Tensor,
    weight: Tensor,
    length: Tensor,
    order: Tensor,
    offsets: Tensor,
    params: Tensor,
    group_size: int,
    spec: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = reward.shape[0]
    per_row = reward.new_empty(rows)
    return (
        per_row,
        torch.empty_like(per_row),
        torch.empty_like(per_row),
        reward.new_empty(rows, dtype=torch.bool),
        reward.new_empty(rows, dtype=torch.int64),
        reward.new_empty(reference.NUM_COUNTS, dtype=torch.int64),
        reward.new_empty(rows, dtype=torch.float64),
        reward.new_empty(reference.NUM_BATCH, dtype=torch.float64),
    )


@torch.library.custom_op("fastgrpo::group_advantage_bwd", mutates_args=())
def group_advantage_bwd(
    dadvantage: Tensor,
    advantage: Tensor,
    score: Tensor,
    batch: Tensor,
    reward: Tensor,
    weight: Tensor,
    length: Tensor,
    order: Tensor,
    offsets: Tensor,
    params: Tensor,
    group_size: int,
    spec: list[int],
) -> Tensor:
    """Gradient with respect to the reward, [B, K]."""
    return reference.group_advantage_bwd(
        dadvantage,
        advantage,
        score,
        batch,
        reward,
        weight,
        length,
        order,
        offsets,
        params,
        group_size,
        spec,
    )


@group_advantage_bwd.register_fake
def _bwd_fake(
    dadvantage: Tensor,
    advantage: Tensor,
    score: Tensor,
    batch: Tensor,
    reward: Tensor,
    weight: Tensor,
    length: Tensor,
    order: Tensor,
    offsets: Tensor,
    params: Tensor,
    group_size: int,
    spec: list[int],
) -> Tensor:
    return torch.empty_like(reward, memory_format=torch.contiguous_format)
