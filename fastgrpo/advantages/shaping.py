"""What happens to rewards and completions before the advantages: KL in the reward, length, truncation, filtering."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastgrpo.functional.checks import (
    FLOATS,
    INTEGERS,
    describe,
    require_device,
    require_float,
    require_number,
    require_shape,
    require_tensor,
)
from fastgrpo.functional.kl_estimate import kl_estimate
from fastgrpo.functional.tokens import Tokens


class Rows(NamedTuple):
    """Some of B rows, without a data-dependent shape."""

    row_index: Tensor  # [B] int64: the rows in ascending order, then -1
    num_rows: Tensor  # [] int64


def token_reward(
    reward: Tensor,  # [B]
    mask: Tensor,  # [B, T], or [N] with cu_seqlens
    *,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Put the reward of each completion on its last live token; 0 elsewhere. An empty completion loses its reward."""
    require_float("reward", reward)
    like = torch.zeros_like(mask, dtype=torch.promote_types(reward.dtype, torch.float32))
    tokens = Tokens(like, mask, cu_seqlens, "mask")
    per_token = tokens.spread(tokens.check_row("reward", reward))
    return torch.where(tokens.is_last(), per_token.to(like.dtype), like)


def kl_in_reward(
    reward: Tensor,  # [B], or per token like logprob
    logprob: Tensor,  # [B, T], or [N] with cu_seqlens: the policy that sampled
    ref_logprob: Tensor,  # the same shape
    mask: Tensor,  # the same shape, bool
    *,
    beta: float,
    estimator: Literal["k1", "k2", "k3", "abs"] = "k1",
    clamp: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Token rewards with the KL penalty of PPO: r_t = r_t - beta * KL_t (k1: KL_t = log pi - log pi_ref).

    A reward per completion stands on its last live token. Feed the result to `gae` or `reward_to_go`; for a penalty per
    completion (RLOO, GRPO with KL in the reward) sum it over the tokens. The result carries no gradient.

    Args:
        reward: Rewards; masked tokens are ignored.
        logprob: Log-probs of the sampled tokens under the policy.
        ref_logprob: The same under the reference.
        mask: True where the policy produced the token.
        beta: Weight of the penalty, >= 0.
        estimator: KL estimator, see `kl_estimate`.
        clamp: Limit of |log pi - log pi_ref|; None: no limit, as in the paper.
        cu_seqlens: Ends of the sequences in a packed batch.

    Source: Shao et al. 2024 (arXiv:2402.03300), Eq. 2.
    """
    tokens = Tokens(require_float("logprob", logprob), mask, cu_seqlens, "logprob")
    tokens.check("ref_logprob", ref_logprob)
    require_number("beta", beta, above=-5e-324, rule=">= 0 and finite")
    require_float("reward", reward)
    if reward.shape == logprob.shape:
        base = torch.where(tokens.live, tokens.check("reward", reward), 0.0)
    else:
        base = token_reward(reward, mask, cu_seqlens=cu_seqlens)
    with torch.no_grad():
        penalty = kl_estimate(
            torch.where(tokens.live, logprob, 0.0),
            torch.where(tokens.live, ref_logprob, 0.0),
            estimator,
            clamp_in=clamp,
        )
        return base - beta * penalty


def soft_overlong_penalty(length: Tensor, *, max_length: int, buffer: int) -> Tensor:
    """DAPO's length penalty, to be added to the reward: 0 up to max_length - buffer, then linear to -1 at max_length.

    Longer completions get -1. `length` holds the completion lengths, of any shape and number type; the result is
    float32.

    Source: Yu et al. 2025 (arXiv:2503.14476), Eq. 13.
    """
    require_tensor("length", length, (*INTEGERS, *FLOATS), "integer or float")
    if not 0 < buffer <= max_length:
        raise ValueError(
            f"need 0 < buffer <= max_length, got buffer={buffer!r}, max_length={max_length!r}"
        )
    excess = length.double() - (max_length - buffer)
    return (0.0 - (excess / buffer).clamp(0, 1)).float()


def is_truncated(
    token_ids: Tensor,  # [B, T], or [N] with cu_seqlens
    mask: Tensor,  # the same shape, bool
    eos_token_id: int | Sequence[int],
    *,
    cu_seqlens: Tensor | None = None,
) -> Tensor:  # [B] bool
    """Mark completions whose last live token is no end-of-sequence token. An empty completion is not marked."""
    require_tensor("token_ids", token_ids, INTEGERS, "integer")
    like = torch.zeros_like(token_ids, dtype=torch.float32)
    tokens = Tokens(like, mask, cu_seqlens, "token_ids")
    eos = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    if not eos:
        raise ValueError("eos_token_id must name at least one token")
    ends = torch.zeros_like(tokens.live)
    for token in eos:
        ends = ends | (token_ids == token)
    cut = tokens.is_last() & ~ends
    if cu_seqlens is None:
        return cut.any(dim=1)
    bounds = tokens.layout.cu_seqlens.long()
    running = torch.cat([bounds.new_zeros(1), cut.cumsum(0)])
    return running[bounds[1:]] > running[bounds[:-1]]


def drop_rows(mask: Tensor, rows: Tensor) -> Tensor:
    """Loss mask [B, T] without the marked rows [B], for instance the truncated ones (DAPO's overlong filtering).

    The rows keep their place in the batch; whether they count in the loss's denominator is the objective's choice.
    """
    require_tensor("rows", rows, (torch.bool,), "bool")
    if mask.dim() != 2:
        raise ValueError(f"mask must have shape [B, T], got {describe(mask)}")
    require_shape("rows", rows, mask.shape[:1], "one entry per row of mask")
    require_device("rows", rows, mask, "mask")
    return (mask != 0) & ~rows[:, None]


def dynamic_sampling_filter(is_degenerate: Tensor) -> Rows:
    """Rows of groups whose rewards differ: what DAPO's dynamic sampling keeps, and refills the batch to have enough of.

    Takes `GroupAdvantage.is_degenerate`. Dropping the others loses their KL and entropy terms.

    Source: Yu et al. 2025 (arXiv:2503.14476), Eq. 11.
    """
    require_tensor("is_degenerate", is_degenerate, (torch.bool,), "bool")
    if is_degenerate.dim() != 1:
        raise ValueError(f"is_degenerate must have shape [B], got {describe(is_degenerate)}")
    order = torch.argsort(is_degenerate, stable=True)
    count = (~is_degenerate).sum()
    place = torch.arange(order.numel(), device=order.device)
    return Rows(torch.where(place < count, order, -1), count)
