"""Registered surrogates: a user's jit function, inlined into the kernels like the built-in policy terms."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo.kernels.launch import COMPILE, on_device_of

SURROGATES: dict[str, Callable[..., object]] = {}

_BLOCK = 256


def register(name: str, jit: Callable[..., object]) -> None:
    """Register `(log_ratio, advantage, params) -> (value, dvalue)`; `params` points to eight numbers."""
    SURROGATES[name] = jit


def lookup(name: str) -> Callable[..., object] | None:
    """Return the jit function of a surrogate, None for the empty name of the built-in ones."""
    if name and name not in SURROGATES:
        raise ValueError(
            f"surrogate {name!r} has no Triton function; pass one to register_surrogate"
        )
    return SURROGATES[name] if name else None


@triton.jit(do_not_specialize=["n"])
def _evaluate_kernel(
    log_ratio_ptr, advantage_ptr, params_ptr, value_ptr, slope_ptr, n, FUNCTION: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n
    log_ratio = tl.load(log_ratio_ptr + offsets, mask=inside, other=0.0)
    advantage = tl.load(advantage_ptr + offsets, mask=inside, other=0.0)
    value, slope = FUNCTION(log_ratio, advantage, params_ptr)
    tl.store(value_ptr + offsets, value, mask=inside)
    tl.store(slope_ptr + offsets, slope, mask=inside)


def evaluate(
    name: str,
    log_ratio: Tensor,  # [N]
    advantage: Tensor,  # [N]
    params: Tensor,  # [8]
) -> tuple[Tensor, Tensor]:  # value [N], dvalue [N]
    """Run a registered function by itself, to compare it with its torch expression."""
    value, slope = torch.empty_like(log_ratio), torch.empty_like(log_ratio)
    n = log_ratio.numel()
    if n:
        with on_device_of(log_ratio):
            _evaluate_kernel[(triton.cdiv(n, _BLOCK),)](
                log_ratio, advantage, params, value, slope, n, FUNCTION=lookup(name), BLOCK=_BLOCK,
                num_warps=4, **COMPILE,
            )  # fmt: skip
    return value, slope
