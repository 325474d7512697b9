"""KL estimators with their derivatives: eager specification, also the KL term of the policy loss."""

import torch
from torch import Tensor

from fastgrpo.reference.log_ratio import log_ratio_of
from fastgrpo.spec import Estimator, KLGrad


def kl_terms(
    logprob: Tensor,  # [N]
    target: Tensor,  # [N] log-prob of the policy that is pulled towards
    ratio: Tensor,  # [N] importance ratio, used by the two ratio modes
    clamp_in: Tensor,
    clamp_out: Tensor,
    ratio_cap: Tensor,
    estimator: int,
    gradient: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return value, d value / d logprob, d value / d log ratio, and where a clamp acted.

    delta = target - logprob, clamped to +-clamp_in; k1 = -delta, k2 = delta^2 / 2, k3 = exp(delta) - 1 - delta (by
    expm1), abs = |delta|, clamped to +-clamp_out. A clamped value has derivative 0.
    """
    raw = log_ratio_of(target, logprob)
    clamped = raw.abs() > clamp_in
    delta = torch.clamp(raw, -clamp_in, clamp_in)
    if estimator == Estimator.K1:
        value, slope = -delta, torch.ones_like(delta)
    elif estimator == Estimator.K2:
        value, slope = 0.5 * delta * delta, -delta
    elif estimator == Estimator.K3:
        value, slope = torch.expm1(delta) - delta, -torch.expm1(delta)
    else:
        value, slope = delta.abs(), -torch.sign(delta)
    outside = value.abs() > clamp_out
    value = torch.clamp(value, -clamp_out, clamp_out)
    acted = clamped | outside
    if gradient == KLGrad.K2:
        slope, outside = -delta, torch.zeros_like(outside)
    slope = torch.where(clamped | outside, 0.0, slope)
    through_ratio = torch.zeros_like(value)
    if gradient == KLGrad.RATIO:
        value, slope = ratio * value, ratio * slope
        through_ratio = value
    elif gradient == KLGrad.RATIO_DETACHED:
        weight = torch.minimum(ratio, ratio_cap)
        value, slope = weight * value, weight * slope
    return value, slope, through_ratio, acted


def kl_estimate(
    logprob: Tensor,  # [N]
    ref: Tensor,  # [N]
    old: Tensor,  # [N], or [0]: ratio 1
    params: Tensor,  # [3] clamp_in, clamp_out, ratio_cap
    estimator: int,
    gradient: int,
) -> tuple[Tensor, Tensor]:  # value [N], d value / d logprob [N]
    """KL estimate per token and its derivative; the ratio modes use exp(logprob - old)."""
    ratio = torch.exp(log_ratio_of(logprob, old)) if old.numel() else torch.ones_like(logprob)
    clamp_in, clamp_out, ratio_cap = params.unbind()
    value, slope, through_ratio, _ = kl_terms(
        logprob, ref, ratio, clamp_in, clamp_out, ratio_cap, estimator, gradient
    )
    return value, slope + through_ratio
