"""Whitening over a whole batch, of sequences or tokens."""

from typing import Literal

import torch
from torch import Tensor

from fastgrpo.functional.checks import as_mask, require_float, require_number


def whiten(
    x: Tensor,  # any shape
    mask: Tensor | None = None,  # the same shape, bool
    *,
    ddof: int = 1,
    eps: float = 1e-8,
    eps_on: Literal["variance", "std", "floor"] = "variance",
    shift_mean: bool = True,
) -> Tensor:
    """Mean 0 and variance 1 over all live entries: (x - mean) / std.

    eps enters as 1 / sqrt(var + eps) (eps_on="variance"; verl), 1 / (std + eps) ("std"; TRL) or 1 / sqrt(max(var, eps))
    ("floor"; OpenRLHF, with ddof=0). Computed in float64, centred on the smallest entry; entries that are all equal
    give exactly 0, or stay as they are without shift_mean. Masked entries give 0. Differentiable.

    REINFORCE++ is `whiten(reward_to_go(...), mask)`, its baseline variant
    `whiten(group_advantage(..., scale="none").advantage[:, None].expand(B, T), mask)`: over tokens in verl and
    OpenRLHF, over sequences without the expansion.

    Raises:
        TypeError: x is no float tensor.
        ValueError: The mask has another shape, ddof is not 0 or 1, or eps is negative.

    Source: Hu et al. 2025 (arXiv:2501.03262).
    """
    require_float("x", x)
    live = torch.ones_like(x, dtype=torch.bool) if mask is None else as_mask(mask, x.shape, x, "x")
    require_number("eps", eps, above=-5e-324, rule=">= 0 and finite")
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, got {ddof!r}")
    if eps_on not in ("variance", "std", "floor"):
        raise ValueError(f"eps_on must be 'variance', 'std' or 'floor', got {eps_on!r}")
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.numel() == 0:
        return x.to(dtype)
    wide = torch.where(live, x.double(), 0.0)
    low = torch.where(live, wide, torch.inf).amin().detach()
    high = torch.where(live, wide, -torch.inf).amax().detach()
    n = live.sum()
    spread = high > low
    y = torch.where(live & spread, wide - low, 0.0)
    mean = y.sum() / n.clamp(min=1)
    centred = torch.where(live & spread, y - mean, 0.0)
    variance = centred.square().sum() / (n - ddof).clamp(min=1)
    variance = torch.where(spread, variance, 1.0)
    if eps_on == "std":
        inverse = 1 / (variance.sqrt() + eps)
    elif eps_on == "floor":
        inverse = variance.clamp(min=eps).rsqrt()
    else:
        inverse = (variance + eps).rsqrt()
    if shift_mean:
        return (centred * inverse).to(dtype)
    return torch.where(spread, wide * inverse, wide).to(dtype)
