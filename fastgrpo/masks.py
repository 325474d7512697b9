"""Token weights that need the whole batch, for `policy_loss(token_weight=...)` or `kl_weight`.

A per-token formula cannot express them: they rank tokens against each other, or look ahead. Call them on all tokens of
the step, before it is cut into micro-batches: on one micro-batch they rank among fewer tokens (which is what verl and
AReaL do). No host sync, no gradient; masked slots may hold anything and get 0. Tensors are [B, T], or [N] with
cu_seqlens where sequences matter; results are float32 (float64 for float64 log-probs).
"""

import torch
from torch import Tensor

from fastgrpo.functional.checks import (
    as_mask,
    describe,
    require_device,
    require_float,
    require_number,
    require_shape,
)
from fastgrpo.functional.tokens import Tokens


def _like(name: str, tensor: object, like: Tensor, like_name: str) -> Tensor:
    """Return a float tensor of the shape of `like`."""
    value = require_float(name, tensor)
    require_shape(name, value, like.shape, f"the shape of {like_name}")
    require_device(name, value, like, like_name)
    return value.detach()


def _share(name: str, value: float) -> float:
    require_number(name, value, above=-1.0, rule="in [0, 1]")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value!r}")
    return value


def _weight(keep: Tensor, like: Tensor) -> Tensor:
    return keep.to(torch.promote_types(like.dtype, torch.float32))


def _rank(key: Tensor) -> Tensor:
    """Place of each entry in ascending order, ties in order of position."""
    order = torch.argsort(key.reshape(-1), stable=True)
    place = torch.arange(order.numel(), device=key.device)
    return torch.empty_like(order).scatter_(0, order, place).view(key.shape)


def masked_quantile(x: Tensor, mask: Tensor, quantile: float) -> Tensor:
    """Quantile of the live entries, linearly interpolated like `torch.quantile`, of any number of them.

    NaN if nothing is live.
    """
    require_float("x", x)
    live = as_mask(mask, x.shape, x, "x")
    _share("quantile", quantile)
    if x.numel() == 0:
        return x.new_full((), torch.nan)
    ordered = torch.where(live, x.detach(), torch.inf).reshape(-1).sort().values
    last = (live.sum() - 1).double()
    place = quantile * last
    # Indexing with a 0-dim tensor would read it on the host; take does not.
    low, high = place.floor().clamp(min=0).long(), place.ceil().clamp(min=0).long()
    value = torch.lerp(ordered.take(low), ordered.take(high), (place - low).to(x.dtype))
    return torch.where(last >= 0, value, torch.nan)


def top_entropy_weight(
    entropy: Tensor, mask: Tensor, *, quantile: float = 0.8, threshold: Tensor | None = None
) -> Tensor:
    """1 on tokens whose entropy reaches the quantile of all live tokens, else 0: .8 trains on the top 20 %.

    `threshold` (0-dim) replaces the quantile of this call, for instance by one over all ranks. The entropies must be
    those of the policy being trained; the mask applies to the policy term and leaves denominators alone.

    Source: Wang et al. 2025 (arXiv:2506.01939); `top_entropy_quantile` of TRL is 1 - the kept share, as here.
    """
    require_float("entropy", entropy)
    live = as_mask(mask, entropy.shape, entropy, "entropy")
    cut = masked_quantile(entropy, live, quantile)
    if threshold is not None:
        require_device("threshold", require_float("threshold", threshold), entropy, "entropy")
        require_shape("threshold", threshold, (), "a single value")
        cut = threshold
    return _weight(live & (entropy.detach() >= cut), entropy)


def _covariance(logprob: Tensor, advantage: Tensor, live: Tensor) -> Tensor:
    """(A - mean A)(l - mean l) over live tokens in float64; -inf elsewhere."""
    count = live.sum().clamp(min=1)

    def centred(x: Tensor) -> Tensor:
        x = torch.where(live, x.double(), 0.0)
        return x - x.sum() / count

    return torch.where(live, centred(advantage) * centred(logprob), -torch.inf)


def _at_least_one(ratio: float, live: Tensor) -> Tensor:
    return (ratio * live.sum().double()).floor().clamp(min=1)


def clip_cov_weight(
    logprob: Tensor,
    advantage: Tensor,  # like logprob
    mask: Tensor,
    *,
    ratio: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
    clipped: Tensor | None = None,  # bool, like logprob
    generator: torch.Generator | None = None,
) -> Tensor:
    """0 on a random choice of tokens whose covariance lies in (low, high), else 1: Clip-Cov.

    max(1, floor(ratio * live tokens)) tokens are taken out, or all candidates if there are fewer. Tokens that the
    surrogate clips anyway (`clipped`) are no candidates.

    Source: Cui et al. 2025 (arXiv:2505.22617), 4.2; defaults as in verl.
    """
    require_float("logprob", logprob)
    live = as_mask(mask, logprob.shape, logprob, "logprob")
    _share("ratio", ratio)
    if not low < high:
        raise ValueError(f"low must be < high, got {low!r} and {high!r}")
    cov = _covariance(logprob.detach(), _like("advantage", advantage, logprob, "logprob"), live)
    candidate = (cov > low) & (cov < high) & live
    if clipped is not None:
        candidate = candidate & ~as_mask(clipped, logprob.shape, logprob, "logprob")
    key = torch.rand(logprob.shape, generator=generator, device=logprob.device)
    rank = _rank(torch.where(candidate, key, 2.0))
    chosen = candidate & (rank < _at_least_one(ratio, live))
    return _weight(live & ~chosen, logprob)


def kl_cov_weight(
    logprob: Tensor,
    advantage: Tensor,  # like logprob
    mask: Tensor,
    *,
    ratio: float = 2e-4,
) -> Tensor:
    """1 on the max(1, floor(ratio * live tokens)) tokens with the largest covariance, else 0: KL-Cov.

    For `kl_weight`, with a KL term towards the old policy: only these tokens are held back.

    Source: Cui et al. 2025 (arXiv:2505.22617), 4.3; default as in verl.
    """
    require_float("logprob", logprob)
    live = as_mask(mask, logprob.shape, logprob, "logprob")
    _share("ratio", ratio)
    cov = _covariance(logprob.detach(), _like("advantage", advantage, logprob, "logprob"), live)
    return _weight(live & (_rank(-cov) < _at_least_one(ratio, live)), logprob)


def m2po_weight(
    old_logprob: Tensor,
    rollout_logprob: Tensor,  # like old_logprob; NaN = not scored
    mask: Tensor,
    *,
    threshold: float = 0.04,
) -> Tensor:
    """Drop the tokens with the largest (old - rollout)^2 until the mean of the rest is below the threshold.

    At least one token stays. Tokens without a rollout log-prob are kept and not counted.

    Source: Zheng et al. 2025 (arXiv:2510.01161); as in AReaL.
    """
    require_float("old_logprob", old_logprob)
    live = as_mask(mask, old_logprob.shape, old_logprob, "old_logprob")
    require_number("threshold", threshold, above=0.0, rule="> 0 and finite")
    rollout = _like("rollout_logprob", rollout_logprob, old_logprob, "old_logprob")
    square = (old_logprob.detach().double() - rollout.double()).square()
    scored = live & ~square.isnan()
    key = torch.where(scored, square, torch.inf).reshape(-1)
    ordered = key.sort().values
    counted = torch.arange(key.numel(), device=key.device) < scored.sum()
    size = torch.arange(1, key.numel() + 1, device=key.device)
    mean = (
        torch.where(counted, ordered, 0.0).cumsum(0) / size
    )  # of the `size` smallest; never falls
    kept = (counted & (mean < threshold)).sum().clamp(min=1)
    return _weight(live & (~scored | (_rank(key).view(live.shape) < kept)), old_logprob)


def fipo_weight(
    logprob: Tensor,
    old_logprob: Tensor,  # like logprob
    advantage: Tensor,  # like logprob
    mask: Tensor,
    *,
    half_life: float = 32.0,
    low: float = 1.0,
    high: float = 1.2,
    ratio_limit: float | None = None,
    safety_ratio: float | None = 4.0,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Weight of each token by where the rest of its sequence is moving: clamp(exp(F_t), low, high), the FIPO weight.

    F_t = sum_{k >= t} 2^(-(k - t) / half_life) * (logprob_k - old_logprob_k) over live tokens.

    Args:
        logprob: Current policy.
        old_logprob: Policy at the start of the step.
        advantage: Advantage of each token.
        mask: True where a token counts.
        half_life: Tokens after which a token's influence has halved.
        low: Lower bound of the weight (1 - 0.2 for the symmetric form).
        high: Upper bound of the weight.
        ratio_limit: Leave tokens with a larger ratio out of F; None: none.
        safety_ratio: Negative-advantage tokens with a larger ratio get a weight in [0.8, 1]; None: off.
        cu_seqlens: Ends of the sequences in a packed batch.

    Source: Ma et al. 2026 (arXiv:2603.19835); defaults as in ms-swift.
    """
    tokens = Tokens(require_float("logprob", logprob), mask, cu_seqlens, "logprob")
    old = _like("old_logprob", old_logprob, logprob, "logprob")
    advantage = _like("advantage", advantage, logprob, "logprob")
    require_number("half_life", half_life, above=0.0, rule="> 0 and finite")
    if not 0 <= low <= high:
        raise ValueError(f"need 0 <= low <= high, got low={low!r}, high={high!r}")
    change = torch.where(tokens.live, logprob.detach().double() - old.double(), 0.0)
    counted = (
        change if ratio_limit is None else torch.where(change.exp() <= ratio_limit, change, 0.0)
    )
    weight = tokens.scan(counted, 2.0 ** (-1.0 / half_life)).exp().clamp(low, high)
    if safety_ratio is not None:
        risky = (advantage < 0) & (change.exp() > safety_ratio)
        weight = torch.where(risky, weight.clamp(0.8, 1.0), weight)
    return _weight(torch.where(tokens.live, weight, 0.0), logprob)


def off_policy_sequence_weight(
    logprob: Tensor,
    rollout_logprob: Tensor,  # like logprob; NaN = not scored. Or the old log-probs
    advantage: Tensor,  # [B], or like logprob
    mask: Tensor,
    *,
    threshold: float,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Drop negative-advantage sequences that the policy has left: mean(rollout - policy) > threshold.

    The mean runs over the live tokens; a token that was not scored adds 0 to it.

    Source: DeepSeek-V3.2 (arXiv:2512.02556), Eq. 9; as `off_policy_mask_threshold` of TRL.
    """
    tokens = Tokens(require_float("logprob", logprob), mask, cu_seqlens, "logprob")
    rollout = _like("rollout_logprob", rollout_logprob, logprob, "logprob")
    require_number("threshold", threshold, above=-float("inf"), rule="finite")
    require_float("advantage", advantage)
    if advantage.shape != logprob.shape:
        if advantage.dim() != 1:
            raise ValueError(
                f"advantage must have shape [B] or {tuple(logprob.shape)}, got {describe(advantage)}"
            )
        advantage = tokens.spread(tokens.check_row("advantage", advantage))
    gap = rollout.double() - logprob.detach().double()
    total = tokens.whole(torch.where(tokens.live & ~gap.isnan(), gap, 0.0))
    count = tokens.whole(tokens.live.double()).clamp(min=1)
    keep = (advantage.detach() >= 0) | (total / count <= threshold)
    return _weight(tokens.live & keep, logprob)
