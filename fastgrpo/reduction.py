"""From an objective's `Reduce` to the weight of each token: every published reduction is a per-sequence factor."""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from fastgrpo.functional.checks import (
    INTEGERS,
    as_mask,
    data_check,
    describe,
    is_readable,
    require_detached,
    require_device,
    require_number,
    require_shape,
    require_tensor,
)
from fastgrpo.functional.groups import require_group_size
from fastgrpo.objective import Objective


def require_objective(value: object) -> Objective:
    """Return `value` if it is an Objective; a preset's name is a mistake that is met often."""
    if not isinstance(value, Objective):
        preset = isinstance(value, str) and hasattr(Objective, value)
        hint = f"; pass fastgrpo.Objective.{value}()" if preset else ""
        raise TypeError(f"objective must be a fastgrpo Objective, got {describe(value)}{hint}")
    return value


@dataclass(frozen=True)
class Layout:
    """Where the sequences of a batch are: padded [B, T], or packed [N] with offsets."""

    shape: torch.Size
    cu_seqlens: Tensor  # [B + 1] int32

    @classmethod
    def padded(cls, shape: torch.Size, device: torch.device) -> "Layout":
        """Layout of [B, T] tokens."""
        offsets = torch.arange(shape[0] + 1, dtype=torch.int32, device=device) * shape[1]
        return cls(shape, offsets)

    @classmethod
    def of(cls, shape: torch.Size, cu_seqlens: Tensor | None, device: torch.device) -> "Layout":
        """Layout of [B, T] or packed [N] tokens; raises unless the offsets cut [0, N) into sequences."""
        if cu_seqlens is None:
            return cls.padded(shape, device)
        offsets = require_tensor(
            "cu_seqlens", cu_seqlens, (torch.int32, torch.int64), "int32 or int64"
        )
        if offsets.dim() != 1 or offsets.numel() < 1:
            raise ValueError(f"cu_seqlens must have shape [B + 1], got {describe(offsets)}")
        if offsets.device != device:
            raise ValueError(
                f"cu_seqlens must be on the device of the tokens ({device}), got {describe(offsets)}"
            )
        if is_readable(offsets):
            host = offsets.tolist()
            if host[0] != 0 or host[-1] != shape[0] or any(a > b for a, b in pairwise(host)):
                raise ValueError(
                    f"cu_seqlens must rise from 0 to the number of tokens ({shape[0]}), got {host[:8]}..."
                )
        return cls(shape, offsets.to(torch.int32))

    @property
    def num_sequences(self) -> int:
        """B."""
        return self.cu_seqlens.numel() - 1

    def lengths(self, mask: Tensor) -> Tensor:
        """Live tokens of each sequence, [B] int64, from a flat mask."""
        if len(self.shape) == 2:
            return mask.view(self.shape).sum(1)
        running = torch.nn.functional.pad(mask.cumsum(0), (1, 0))
        bounds = running[self.cu_seqlens.long()]
        return bounds[1:] - bounds[:-1]

    def spread(self, per_sequence: Tensor) -> Tensor:
        """Give each token the value of its sequence: [B] -> [N], without a host sync."""
        if len(self.shape) == 2:
            return per_sequence[:, None].expand(self.shape).reshape(-1).contiguous()
        position = torch.arange(self.shape[0], device=per_sequence.device, dtype=torch.int32)
        index = torch.searchsorted(self.cu_seqlens[1:].contiguous(), position, right=True)
        return per_sequence[index.clamp(max=max(per_sequence.numel() - 1, 0))]


def check_groups(
    group_size: int | None, group_ids: Tensor | None, num_sequences: int, like: Tensor
) -> None:
    """Raise unless at most one of the two is given and it fits the number of sequences."""
    if group_size is not None and group_ids is not None:
        raise ValueError("at most one of group_size and group_ids may be given, got both")
    if group_size is not None and num_sequences % require_group_size(group_size):
        raise ValueError(f"group_size must divide the {num_sequences} sequences, got {group_size}")
    if group_ids is not None:
        require_tensor("group_ids", group_ids, INTEGERS, "integer")
        require_shape("group_ids", group_ids, (num_sequences,), "one id per sequence")
        require_device("group_ids", group_ids, like, "the policy's tokens")


def _denominator(normalizer: float | Tensor | None, local: Tensor) -> float | Tensor:
    """The number that the weights are divided by; 0-dim float64 where it is a tensor."""
    if normalizer is None:
        return local.clamp(min=1)
    if not isinstance(normalizer, Tensor):
        return require_number("normalizer", normalizer, above=0.0, rule="> 0 and finite")
    if normalizer.numel() != 1 or normalizer.is_complex() or normalizer.dtype == torch.bool:
        raise ValueError(
            f"normalizer must be a number or hold one real element, got {describe(normalizer)}"
        )
    require_device("normalizer", normalizer, local, "the policy's tokens")
    require_detached("normalizer", normalizer)
    positive = (normalizer > 0) & (normalizer < torch.inf)
    data_check(positive, f"normalizer must be > 0 and finite, got {normalizer}")
    return normalizer.reshape(()).double()


def _prompts(
    num_sequences: int, group_size: int | None, group_ids: Tensor | None, like: Tensor
) -> Tensor:
    """[B, B] matrix, 1 where two sequences answer the same prompt."""
    if group_ids is None:
        if group_size is None:
            raise ValueError("reduce per='prompt' needs group_size or group_ids, got neither")
        group_ids = torch.arange(num_sequences, device=like.device) // group_size
    return (group_ids[:, None] == group_ids[None, :]).double()


def _units(
    lengths: Tensor, objective: Objective, group_size: int | None, group_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return each sequence's factor [B] and the local count D, in float64."""
    reduce = objective.reduce
    tokens = lengths.double()
    counted = torch.ones_like(tokens) if reduce.count_empty else (tokens > 0).double()
    if reduce.per == "token":
        return torch.ones_like(tokens), tokens.sum()
    if reduce.per == "prompt":
        same = _prompts(lengths.numel(), group_size, group_ids, lengths)
        members = (same @ counted).clamp(min=1)
        return 1.0 / (same @ tokens).clamp(min=1), (counted / members).sum()
    if reduce.per == "constant":
        assert reduce.length is not None
        return torch.full_like(tokens, 1.0 / reduce.length), counted.sum()
    return tokens.clamp(min=1) ** reduce.power, counted.sum()


def reduction_weight(
    mask: Tensor,  # [N] bool
    layout: Layout,
    objective: Objective,
    normalizer: float | Tensor | None,
    group_size: int | None,
    group_ids: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # [N]
    """Weight of each token in the loss; 0 where masked."""
    factor, local = _units(layout.lengths(mask), objective, group_size, group_ids)
    per_token = layout.spread((factor / _denominator(normalizer, local)).to(dtype))
    return torch.where(mask, per_token, 0.0)


def global_normalizer(
    mask: Tensor,  # [B, T] or [N]
    objective: Objective,
    group: "dist.ProcessGroup | None" = None,
    *,
    cu_seqlens: Tensor | None = None,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
) -> Tensor:  # 0-dim float64
    """D of the objective's reduction over this mask, summed over the ranks of `group` if torch.distributed is running.

    Add the results of all micro-batches of an optimizer step and pass the sum as `normalizer`; gradients are then to be
    summed. Where DDP or FSDP averages gradients over ranks, pass D / world_size.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: The mask is neither [B, T] nor packed, or the prompts are missing where the reduction counts them.
    """
    require_tensor("mask", mask, (torch.bool, *INTEGERS), "bool or integer")
    if mask.dim() != (2 if cu_seqlens is None else 1):
        raise ValueError(f"mask must be [B, T], or [N] with cu_seqlens, got {describe(mask)}")
    require_objective(objective)
    layout = Layout.of(mask.shape, cu_seqlens, mask.device)
    check_groups(group_size, group_ids, layout.num_sequences, mask)
    live = as_mask(mask, mask.shape, mask, "the policy").reshape(-1)
    _, total = _units(layout.lengths(live), objective, group_size, group_ids)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total, dist.ReduceOp.SUM, group)
    return total
