"""Advantages from rewards of steps or turns: the process supervision of DeepSeekMath, section 4.1.3."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastgrpo.functional.checks import (
    data_check,
    describe,
    require_device,
    require_float,
    require_number,
    require_tensor,
)
from fastgrpo.functional.group_advantage import group_advantage
from fastgrpo.functional.groups import require_group_size, require_ids
from fastgrpo.functional.segment_scan import check_ends, segment_scan

_INTEGERS = ((torch.int64, torch.int32), "int64 or int32")


class _Places(NamedTuple):
    """First token and length of each sequence, and the shape of the result."""

    start: Tensor  # [B]
    size: Tensor  # [B]
    shape: tuple[int, ...]

    @property
    def sequences(self) -> int:
        """Return B."""
        return self.start.numel()


def _count(num_sequences: int | None, group_ids: Tensor | None, cu_seqlens: Tensor | None) -> int:
    """Return the number of sequences, from whatever tells it; all that tell it must agree."""
    told = {}
    if num_sequences is not None:
        told["num_sequences"] = num_sequences
    if group_ids is not None:
        told["group_ids"] = require_tensor("group_ids", group_ids, *_INTEGERS).numel()
    if cu_seqlens is not None:
        told["cu_seqlens"] = require_tensor("cu_seqlens", cu_seqlens, *_INTEGERS).numel() - 1
    if not told:
        raise ValueError("num_sequences must be given with group_size and padded output")
    if len(set(told.values())) > 1 or min(told.values()) < 0:
        counts = ", ".join(f"{name}: {count}" for name, count in told.items())
        raise ValueError(
            f"the number of sequences must be >= 0 and the same everywhere, got {counts}"
        )
    return next(iter(told.values()))


def _places(count: int, length: int, cu_seqlens: Tensor | None, like: Tensor) -> _Places:
    if isinstance(length, bool) or not isinstance(length, int) or length < 0:
        raise ValueError(f"length must be an integer >= 0, got {length!r}")
    if cu_seqlens is None:
        start = torch.arange(count, device=like.device) * length
        return _Places(start, torch.full_like(start, length), (count, length))
    require_device("cu_seqlens", cu_seqlens, like, "step_reward")
    check_ends(cu_seqlens, length)
    ends = cu_seqlens.long()
    return _Places(ends[:-1], ends[1:] - ends[:-1], (length,))


def _groups(count: int, group_size: int | None, group_ids: Tensor | None, like: Tensor) -> Tensor:
    """Return the group of each sequence, [B]."""
    if (group_size is None) == (group_ids is None):
        raise ValueError("exactly one of group_size and group_ids must be given")
    if group_ids is not None:
        return require_ids("group_ids", group_ids, count, like, "the sequences")
    size = require_group_size(group_size)
    if count % size:
        raise ValueError(f"num_sequences={count} is not divisible by group_size={size}")
    return torch.arange(count, device=like.device) // size


def process_advantage(
    step_reward: Tensor,  # [S] float; NaN = not scored
    step_end: Tensor,  # [S] int64: index of the step's last token in its sequence, inclusive
    sequence_ids: Tensor,  # [S] int64 in [0, B): the sequence of each step, any order
    *,
    length: int,
    group_size: int | None = None,
    group_ids: Tensor | None = None,  # [B] int64
    num_sequences: int | None = None,
    cu_seqlens: Tensor | None = None,  # [B + 1] int32
    baseline: Literal["mean", "leave_one_out", "none"] = "mean",
    scale: Literal["group", "batch", "none"] = "group",
    eps: float = 1e-4,
    ddof: int = 1,
    gamma: float = 1.0,
) -> Tensor:  # [B, T], or [N] with cu_seqlens
    """Advantage of every token from the rewards of the steps that end at it or after it.

    z_s = (r_s - mean(R)) / (std(R) + eps), with R the rewards of all steps of all completions of the group;
    A_{i,t} = sum of z_s over the steps s of completion i with step_end_s >= t. Turn rewards are the same thing: `gamma`
    discounts every later step once more, scale="none" and baseline="none" leave the rewards as they are.
    Differentiable with respect to step_reward. The result is a per-token advantage for `policy_loss`.

    Args:
        step_reward: Reward of each step.
        step_end: Where the step ends.
        sequence_ids: Which completion it belongs to. Steps that end at the same token add up.
        length: T, or with cu_seqlens the number N of packed tokens.
        group_size: Number of completions per prompt when they stand side by side.
        group_ids: The prompt of each completion instead.
        num_sequences: B, where neither group_ids nor cu_seqlens tells it.
        cu_seqlens: Ends of the sequences in a packed batch.
        baseline: As in `group_advantage`, over steps.
        scale: As in `group_advantage`, over steps.
        eps: Added to the standard deviation.
        ddof: Degrees of freedom taken off the count in the variance.
        gamma: Discount per step, in [0, 1].

    Returns:
        float32 (float64 for float64 rewards); 0 after the last step. A step that points outside its sequence raises on
        the CPU; elsewhere it makes NaN of that sequence and takes no part in its group.

    Raises:
        TypeError: A tensor has the wrong dtype.
        ValueError: Shapes, devices or counts do not fit together, or a number is out of range.

    Source: Shao et al. 2024 (arXiv:2402.03300), 4.1.3.
    """
    step_reward = require_float("step_reward", step_reward)
    if step_reward.dim() != 1:
        raise ValueError(f"step_reward must have shape [S], got {describe(step_reward)}")
    steps = step_reward.numel()
    end = require_ids("step_end", step_end, steps, step_reward, "step_reward").long()
    owner = require_ids("sequence_ids", sequence_ids, steps, step_reward, "step_reward").long()
    require_number("gamma", gamma, above=-1.0, rule="in [0, 1]")
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be in [0, 1], got {gamma!r}")
    count = _count(num_sequences, group_ids, cu_seqlens)
    places = _places(count, length, cu_seqlens, step_reward)
    groups = _groups(count, group_size, group_ids, step_reward)
    if count * length == 0 or steps == 0:
        if steps:
            raise ValueError(
                f"steps must end inside their sequences, got {steps} steps and no token"
            )
        return step_reward.new_zeros(
            places.shape, dtype=torch.promote_types(step_reward.dtype, torch.float32)
        )
    known = (owner >= 0) & (owner < count)
    owner = owner.clamp(0, count - 1)
    inside = known & (end >= 0) & (end < places.size[owner])
    data_check(
        inside,
        f"steps must end inside their sequences: sequence_ids in [0, {count}), step_end in [0, its length)",
    )
    z = group_advantage(
        torch.where(inside, step_reward, torch.nan),
        group_ids=groups[owner],
        baseline=baseline,
        scale=scale,
        eps=eps,
        ddof=ddof,
    ).advantage
    return _sum_from_the_right(z, end, owner, inside, places, cu_seqlens, gamma).to(z.dtype)


def _sum_from_the_right(
    z: Tensor,
    end: Tensor,
    owner: Tensor,
    inside: Tensor,
    places: _Places,
    cu_seqlens: Tensor | None,
    gamma: float,
) -> Tensor:
    """Put the steps at their last tokens and sum; a step in an empty sequence has no token to mark."""
    size = places.size[owner]
    tokens = places.shape[-1] if cu_seqlens is not None else places.sequences * places.shape[-1]
    place = places.start[owner] + torch.minimum(end.clamp(min=0), size - 1)
    place = place.clamp(0, tokens - 1)
    impulse = torch.where(inside, z.double(), torch.nan)
    impulse = torch.where(size > 0, impulse, 0.0)
    # Accumulating index_put sorts on CUDA: no float atomics, the same bits every time.
    flat = impulse.new_zeros(tokens).index_put((place,), impulse, accumulate=True)
    decay = torch.ones_like(flat, requires_grad=False).index_fill(0, place, gamma)
    return segment_scan(flat.view(places.shape), decay.view(places.shape), cu_seqlens=cu_seqlens)
