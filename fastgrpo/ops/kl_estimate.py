"""`fastgrpo::kl_estimate`: KL estimate per token and its derivative."""

import torch
from torch import Tensor

from fastgrpo import reference


@torch.library.custom_op("fastgrpo::kl_estimate", mutates_args=())
def kl_estimate(
    logprob: Tensor,  # [N] float32 or float64
    ref: Tensor,  # [N]
    old: Tensor,  # [N], or [0]: ratio 1
    params: Tensor,  # [3] clamp_in, clamp_out, ratio_cap
    estimator: int,
    gradient: int,
) -> tuple[Tensor, Tensor]:
    """Return value [N] and d value / d logprob [N]."""
    return reference.kl_estimate(logprob, ref, old, params, estimator, gradient)


@kl_estimate.register_fake
def _(
    logprob: Tensor, ref: Tensor, old: Tensor, params: Tensor, estimator: int, gradient: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(logprob), torch.empty_like(logprob)
