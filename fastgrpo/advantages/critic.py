"""PPO's side of the paper (Eq. 1): rewards to go, generalised advantage estimation, the value loss."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo.functional.checks import (
    as_mask,
    describe,
    require_detached,
    require_device,
    require_float,
    require_number,
    require_shape,
)
from fastgrpo.functional.tokens import Tokens


class GAE(NamedTuple):
    """Result of `gae`, in the shape of the rewards; masked tokens are 0."""

    advantage: Tensor
    returns: Tensor  # advantage + value


class ValueLoss(NamedTuple):
    """Result of `value_loss`."""

    loss: Tensor  # []
    token_loss: Tensor  # [B, T] or [N]; masked tokens are 0
    clip_fraction: Tensor  # [] share of live tokens whose clipped error is the larger one


def _require_share(name: str, value: float) -> float:
    require_number(name, value, above=-1.0, rule="in [0, 1]")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value!r}")
    return value


def _require_like(name: str, tensor: Tensor, value: Tensor) -> Tensor:
    """Return a detached float tensor with one entry per entry of `value`."""
    require_detached(name, require_float(name, tensor))
    require_shape(name, tensor, value.shape, "the shape of value")
    require_device(name, tensor, value, "value")
    return tensor


def _result_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _steps(live: Tensor, decay: float) -> Tensor:
    """Decay of each token in float64: masked tokens pass on what comes after them."""
    return torch.ones_like(live, dtype=torch.float64).masked_fill(live, decay)


def reward_to_go(
    reward: Tensor,  # [B, T], or [N] with cu_seqlens
    mask: Tensor,  # bool; masked tokens (padding, tool output) are stepped over
    *,
    gamma: float = 1.0,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Discounted sum of the rewards from each live token on: R_t = r_t + gamma * R_next.

    "next" is the next live token. Rewards on masked tokens are ignored, masked tokens get 0. This is the return of
    REINFORCE++ (arXiv:2501.03262), to be followed by `whiten`. Differentiable.
    """
    tokens = Tokens(require_float("reward", reward), mask, cu_seqlens, "reward")
    _require_share("gamma", gamma)
    live_reward = torch.where(tokens.live, reward.double(), 0.0)
    total = tokens.scan(live_reward, _steps(tokens.live, gamma))
    return torch.where(tokens.live, total, 0.0).to(_result_dtype(reward))


def gae(
    reward: Tensor,  # [B, T], or [N] with cu_seqlens
    value: Tensor,  # like reward, or [B, T + 1]: the last column is `bootstrap`
    mask: Tensor,  # like reward, bool
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    bootstrap: Tensor | None = None,  # [B]
    cu_seqlens: Tensor | None = None,  # [B + 1] int32
) -> GAE:
    """Generalised advantage estimation over the live tokens.

    delta_t = r_t + gamma * V_next - V_t,  A_t = delta_t + gamma * lam * A_next,  returns = A + V. "next" is the next
    live token, so that masked tokens in the middle (tool output) neither discount nor cut the recursion; whatever
    stands in masked slots is ignored. After the last live token V is `bootstrap`: 0 for a finished sequence, the value
    of the state after it for a truncated one. Computed in float64. Differentiable in reward and value.

    Args:
        reward: Reward of each token, see `token_reward` and `kl_in_reward`.
        value: Value of the state before each token.
        mask: True where the policy produced the token.
        gamma: Discount, in [0, 1].
        lam: Weight of longer returns, in [0, 1].
        bootstrap: Value after the last live token of each sequence, default 0.
        cu_seqlens: Ends of the sequences in a packed batch.

    Raises:
        TypeError: A tensor has the wrong dtype.
        ValueError: Shapes or devices disagree, or gamma or lam is out of range.

    Source: Schulman et al. 2016 (arXiv:1506.02438); carry-forward over masked tokens as in verl and NeMo-RL.
    """
    tokens = Tokens(require_float("reward", reward), mask, cu_seqlens, "reward")
    _require_share("gamma", gamma)
    _require_share("lam", lam)
    require_float("value", value)
    if cu_seqlens is None and value.dim() == 2 and value.shape[1] == reward.shape[1] + 1:
        if bootstrap is not None:
            raise ValueError(
                f"bootstrap must not be given with {describe(value)} as value [B, T + 1]"
            )
        value, bootstrap = value[:, :-1], value[:, -1]
    tokens.check("value", value)
    live = tokens.live
    v = torch.where(live, value.double(), 0.0)
    next_value = tokens.after(tokens.scan(v, _steps(live, 0.0)))
    if bootstrap is not None:
        final = tokens.spread(tokens.check_row("bootstrap", bootstrap)).double()
        next_value = torch.where(tokens.is_last(), final, next_value)
    delta = torch.where(live, reward.double() + gamma * next_value - v, 0.0)
    advantage = tokens.scan(delta, _steps(live, gamma * lam))
    advantage = torch.where(live, advantage, 0.0)
    dtype = _result_dtype(reward)
    return GAE(advantage.to(dtype), (advantage + v).to(dtype))


def value_loss(
    value: Tensor,  # [B, T] or [N], the critic's prediction
    returns: Tensor,  # the same shape
    mask: Tensor,  # the same shape, bool
    *,
    old_value: Tensor | None = None,  # the same shape: prediction when the returns were computed
    clip: float | None = None,
    normalizer: float | Tensor | None = None,
) -> ValueLoss:
    """Squared error of the value, mean over live tokens: 0.5 * (V - R)^2.

    With `clip` the larger of this and the same with V clamped to old_value +- clip (0.5 in verl, OpenRLHF and AReaL,
    0.2 in slime).

    Args:
        value: Prediction that gets the gradient.
        returns: Target, for instance `gae(...).returns`.
        mask: True where a token counts; other slots may hold anything.
        old_value: Needed by clip.
        clip: How far the prediction may move; None: any way.
        normalizer: Denominator, summed over all micro-batches; None: the live tokens of this call (at least 1).

    Raises:
        TypeError: A tensor has the wrong dtype.
        ValueError: Shapes or devices disagree, or only one of old_value and clip is given.

    Source: Schulman et al. 2017 (arXiv:1707.06347), as clipped in its reference implementation.
    """
    require_float("value", value)
    live = as_mask(mask, value.shape, value, "value")
    target = _require_like("returns", returns, value)
    if (old_value is None) != (clip is None):
        raise ValueError(
            f"old_value and clip go together, got clip={clip!r} and {describe(old_value)}"
        )
    dtype = _result_dtype(value)
    v = torch.where(live, value.to(dtype), 0.0)
    target = torch.where(live, target.to(dtype), 0.0)
    error = (v - target).square()
    larger = torch.zeros_like(live)
    if clip is not None and old_value is not None:
        require_number("clip", clip, above=0.0, rule="None, or > 0 and finite")
        old = torch.where(live, _require_like("old_value", old_value, value).to(dtype), 0.0)
        clipped = (torch.clamp(v, old - clip, old + clip) - target).square()
        larger = clipped > error
        error = torch.maximum(error, clipped)
    token_loss = torch.where(live, 0.5 * error, 0.0)
    count = live.sum().clamp(min=1)
    if isinstance(normalizer, Tensor):
        require_device("normalizer", normalizer, value, "value")
    denominator = count if normalizer is None else normalizer
    return ValueLoss(token_loss.sum() / denominator, token_loss, (larger & live).sum() / count)
