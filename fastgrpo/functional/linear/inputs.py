"""Checks of what the linear ops share, and the dtype their products run in."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgrpo.functional.checks import (
    describe,
    require_device,
    require_float,
    require_shape,
    require_tensor,
)
from fastgrpo.functional.linear.gemm import DirectHead, Head, Precision, UpcastHead, choose_mode
from fastgrpo.functional.linear.gemm_mixed import MixedHead, NativeHead
from fastgrpo.ops.head_products import is_native

PRECISIONS: tuple[Precision, ...] = ("auto", "float32", "input")


@dataclass(frozen=True)
class LinearOptions:
    """How the work is cut; nothing here changes what is computed, beyond the rounding of the logits."""

    logits_precision: Precision = "auto"
    workspace_bytes: int | None = None
    capacity: int | None = None

    def __post_init__(self) -> None:
        """Check names and ranges."""
        if self.logits_precision not in PRECISIONS:
            allowed = ", ".join(PRECISIONS)
            raise ValueError(
                f"logits_precision must be one of {allowed}, got {self.logits_precision!r}"
            )
        for name, least in (("workspace_bytes", 1), ("capacity", 0)):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be None or an integer, got {describe(value)}")
            if value < least:
                raise ValueError(f"{name} must be None or >= {least}, got {value!r}")


def whole(name: str, value: Any) -> Any:
    """The full tensor of a sharded DTensor, gathered once (its gradient is scattered back); others as they are."""
    if not hasattr(value, "full_tensor"):
        return value
    full = value.full_tensor()
    if full.shape != value.shape:
        raise ValueError(
            f"{name} is a DTensor whose full_tensor() has shape {tuple(full.shape)}, not {tuple(value.shape)}"
        )
    return full


def check_head(
    hidden: object, weight: object, bias: object
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return hidden [..., H], weight [V, H] and bias [V] or None, plain tensors that fit together."""
    hidden = require_float("hidden", hidden)
    if hidden.device.type == "meta":
        raise ValueError(
            f"hidden must hold data (how many rows are multiplied depends on it), got {describe(hidden)}"
        )
    weight = require_float("weight", whole("weight", weight))
    if hidden.dim() < 1 or hidden.shape[-1] == 0:
        raise ValueError(f"hidden must have shape [..., H] with H >= 1, got {describe(hidden)}")
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        rule = f"[V, H] with V >= 1 and H = {hidden.shape[-1]} as in hidden"
        raise ValueError(f"weight must have shape {rule}, got {describe(weight)}")
    require_device("weight", weight, hidden, "hidden")
    if bias is None:
        return hidden, weight, None
    bias = require_float("bias", whole("bias", bias))
    require_shape("bias", bias, (weight.shape[0],), "one entry per row of weight")
    require_device("bias", bias, hidden, "hidden")
    return hidden, weight, bias


def check_weight_grad_buffer(buffer: Tensor | None, weight: Tensor) -> None:
    """Raise unless the buffer can take the sum of weight gradients."""
    if buffer is None:
        return
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    require_tensor("weight_grad_buffer", buffer, (wide,), str(wide).removeprefix("torch."))
    require_shape("weight_grad_buffer", buffer, weight.shape, "the shape of weight")
    require_device("weight_grad_buffer", buffer, weight, "weight")
    if not buffer.is_contiguous() or buffer.requires_grad:
        raise ValueError(
            f"weight_grad_buffer must be contiguous and not require grad, got {describe(buffer)}"
        )


def product_dtype(hidden: Tensor) -> torch.dtype:
    """Dtype of the products: autocast's if it is on (float64 is left alone, as by autocast), else that of `hidden`."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


def make_head(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype, precision: Precision
) -> Head:
    """The head in the dtype of the products; a weight of another dtype (or, here and there, layout) is copied."""
    mode = choose_mode(precision, dtype, weight.device)
    weight = weight.to(dtype)
    if mode == "direct":
        return DirectHead(weight, bias, mode)
    if mode == "upcast":
        return UpcastHead(weight, bias, mode)
    if dtype == torch.bfloat16 and is_native(weight.device):
        return NativeHead(weight if weight.stride(1) == 1 else weight.contiguous(), bias, mode)
    return MixedHead(weight, bias, mode)
