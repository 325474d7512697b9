"""From an objective's `Reduce` to the weight of each token: every published reduction is a per-sequence factor."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fastgrpo.functional.checks import describe, require_shape
from fastgrpo.objective import Objective


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


def _prompts(
    num_sequences: int, group_size: int | None, group_ids: Tensor | None, like: Tensor
) -> Tensor:
    """[B, B] matrix, 1 where two sequences answer the same prompt."""
    if group_ids is None:
        if group_size is None:
            raise ValueError("reduce per='prompt' needs group_size or group_ids")
        if group_size < 1 or num_sequences % group_size:
            raise ValueError(
                f"group_size must divide the {num_sequences} sequences, got {group_size}"
            )
        group_ids = torch.arange(num_sequences, device=like.device) // group_size
    require_shape("group_ids", group_ids, (num_sequences,), "one id per sequence")
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
    if normalizer is None:
        denominator: Tensor | float = local.clamp(min=1)
    elif isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(
                f"normalizer must be a number or hold one element, got {describe(normalizer)}"
            )
        denominator = normalizer.reshape(()).double()
    elif normalizer > 0:
        denominator = normalizer
    else:
        raise ValueError(f"normalizer must be > 0, got {normalizer!r}")
    per_token = layout.spread((factor / denominator).to(dtype))
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
    """
    if cu_seqlens is None:
        if mask.dim() != 2:
            raise ValueError(f"mask must be [B, T], or [N] with cu_seqlens, got {describe(mask)}")
        layout = Layout.padded(mask.shape, mask.device)
    else:
        layout = Layout(mask.shape, cu_seqlens)
    lengths = layout.lengths(mask.reshape(-1) != 0)
    _, total = _units(lengths, objective, group_size, group_ids)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total, dist.ReduceOp.SUM, group)
    return total
