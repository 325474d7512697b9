"""How completions form groups: equal ones side by side, or any by ids, without reading a value on the host."""

import torch
from torch import Tensor

from fastgrpo.functional.checks import (
    data_check,
    describe,
    require_device,
    require_shape,
    require_tensor,
)

__all__ = ["data_check", "group_layout", "require_group_size", "require_ids"]


def require_group_size(group_size: object) -> int:
    """Return a group size >= 1."""
    if isinstance(group_size, bool) or not isinstance(group_size, int):
        raise TypeError(f"group_size must be an integer, got {describe(group_size)}")
    if group_size < 1:
        raise ValueError(f"group_size must be >= 1, got {group_size!r}")
    return group_size


def require_ids(name: str, value: object, rows: int, like: Tensor, like_name: str) -> Tensor:
    """Return an int64 or int32 tensor of shape [rows] on the device of `like`."""
    ids = require_tensor(name, value, (torch.int64, torch.int32), "int64 or int32")
    require_shape(name, ids, (rows,), f"one entry per row of {like_name}")
    require_device(name, ids, like, like_name)
    return ids


def group_layout(
    rows: int, like: Tensor, like_name: str, group_size: int | None, group_ids: Tensor | None
) -> tuple[Tensor, Tensor, int]:
    """Rows in group order [B] and group ends [B + 1] for ids; two empty tensors and the size otherwise.

    The number of groups stays unknown to the host: unused entries of the ends hold B.
    """
    if (group_size is None) == (group_ids is None):
        raise ValueError(
            "exactly one of group_size and group_ids must be given, got "
            + ("neither" if group_size is None else "both")
        )
    if group_ids is None:
        size = require_group_size(group_size)
        if rows % size:
            raise ValueError(
                f"{like_name} must hold whole groups: {rows} rows are not divisible by group_size={size}; "
                "give group_ids for groups of different sizes"
            )
        nothing = torch.empty(0, dtype=torch.int64, device=like.device)
        return nothing, nothing, size
    ids, order = torch.sort(require_ids("group_ids", group_ids, rows, like, like_name), stable=True)
    if rows == 0:
        return order, torch.zeros(1, dtype=torch.int64, device=like.device), 0
    group = torch.cat([order.new_zeros(1), torch.cumsum(ids[1:] != ids[:-1], dim=0)])
    return order, torch.searchsorted(group, torch.arange(rows + 1, device=like.device)), 0
