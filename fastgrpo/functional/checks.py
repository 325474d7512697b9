"""Argument checks shared by the public functions, and the policy for faults that only the device sees."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.autograd import forward_ad

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
LONGEST = 100
"""Characters of a value in an error."""
_POLICIES = ("flag", "off", "strict")


def _policy_from_environment() -> str:
    policy = os.environ.get("FASTGRPO_CHECKS", "flag")
    if policy not in _POLICIES:
        raise ValueError(f"FASTGRPO_CHECKS must be one of {', '.join(_POLICIES)}, got {policy!r}")
    return policy


_policy: ContextVar[str] = ContextVar("fastgrpo_checks", default=_policy_from_environment())  # noqa: B039 (a string)


@contextmanager
def checks(policy: str) -> Iterator[None]:
    """Choose what happens to faults in the data that no shape check can see (a NaN row, an id outside [0, V)).

    "flag" (default) counts them in `metrics["fault"]`, without a sync; "strict" raises after the op, naming argument,
    place, value and rule, at the price of one sync; "off" ignores them. In each case the faulty row alone is NaN.
    FASTGRPO_CHECKS sets the default.
    """
    if policy not in _POLICIES:
        raise ValueError(f"checks policy must be one of {', '.join(_POLICIES)}, got {policy!r}")
    token = _policy.set(policy)
    try:
        yield
    finally:
        _policy.reset(token)


def is_strict() -> bool:
    """Whether faults raise (never while a graph is traced: raising needs the values)."""
    return not torch.compiler.is_compiling() and _policy.get() == "strict"


def describe(value: object) -> str:
    """Shape, dtype and device of a tensor; type and shape of other arrays; type and value (cut) of anything else."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}, on {value.device}"
    kind = type(value).__name__
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{type(value).__module__}.{kind} of shape {tuple(value.shape)}, {value.dtype}"
    text = repr(value)
    return f"{kind} {text if len(text) <= LONGEST else text[:LONGEST] + '...'}"


def is_readable(value: Tensor) -> bool:
    """Whether looking at the values costs no synchronisation and no graph break."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling() and not is_fake(value)


def data_check(condition: Tensor, message: str) -> None:
    """Raise if a condition on the data fails anywhere, where the data can be looked at for nothing."""
    if is_readable(condition) and not bool(condition.all()):
        raise ValueError(message)


def require_tensor(name: str, value: object, dtypes: Sequence[torch.dtype], kind: str) -> Tensor:
    """Return `value` if it is a tensor of one of the dtypes."""
    if not isinstance(value, Tensor) or value.dtype not in dtypes:
        article = "an" if kind[0] in "aeiou" else "a"
        raise TypeError(f"{name} must be {article} {kind} tensor, got {describe(value)}")
    if hasattr(value, "full_tensor"):
        raise TypeError(
            f"{name} must be a plain tensor, got a DTensor of shape {tuple(value.shape)}; pass {name}.full_tensor(), "
            "or .to_local() where each rank holds rows of its own"
        )
    return value


def require_float(name: str, value: object) -> Tensor:
    """Return `value` if it is a floating-point tensor of a supported dtype."""
    return require_tensor(name, value, FLOATS, "float16, bfloat16, float32 or float64")


def require_shape(name: str, value: Tensor, shape: Sequence[int], rule: str) -> None:
    """Raise unless `value` has exactly this shape."""
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)} ({rule}), got {describe(value)}")


def require_device(name: str, value: Tensor, like: Tensor, like_name: str) -> None:
    """Raise unless both tensors are on one device."""
    if value.device != like.device:
        raise ValueError(
            f"{name} must be on the device of {like_name} ({like.device}), got {describe(value)}"
        )


def has_tangent(value: Tensor) -> bool:
    """Whether forward-mode differentiation (torch.func.jvp) carries a tangent with this tensor."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(value).tangent is not None


def needs_grad(*values: Tensor) -> bool:
    """Whether the autograd Function must run: an op by itself would drop the gradient, or the tangent, silently."""
    reverse = torch.is_grad_enabled() and any(value.requires_grad for value in values)
    return reverse or any(has_tangent(value) for value in values)


def require_detached(name: str, value: Tensor) -> None:
    """Raise on a tensor that requires grad where no gradient is ever returned."""
    if needs_grad(value):
        raise ValueError(f"{name} gets no gradient and must not require one; pass {name}.detach()")


def require_flag(name: str, value: object) -> bool:
    """Return a bool; a truthy string or tensor is a mistake."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {describe(value)}")
    return value


def require_number(name: str, value: object, *, above: float, rule: str) -> float:
    """Return a finite Python number greater than `above`."""
    if isinstance(value, bool) or not isinstance(
        value, int | float | torch.SymFloat | torch.SymInt
    ):
        raise TypeError(f"{name} must be a number, got {describe(value)}")
    if not (above < value < float("inf")):
        raise ValueError(f"{name} must be {rule}, got {value!r}")
    return float(value)


def flatten(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return contiguous [N] values; `reshape` alone may return a strided view (of one row or an expanded tensor)."""
    return value.reshape(-1).to(dtype).contiguous()


def require_token_ids(
    token_ids: object, shape: Sequence[int], logits: Tensor, like_name: str
) -> Tensor:
    """Return token ids as a flat int64 tensor; values are checked on the device (a bad id gives a NaN row)."""
    ids = require_tensor("token_ids", token_ids, INTEGERS, "integer")
    require_shape("token_ids", ids, shape, f"{like_name}.shape[:-1]")
    require_device("token_ids", ids, logits, like_name)
    return flatten(ids, torch.int64)


def as_mask(mask: object, shape: Sequence[int], like: Tensor, like_name: str) -> Tensor:
    """Return a bool mask of the given shape; integer masks hold 0 and 1, float masks are refused."""
    mask = require_tensor("mask", mask, (torch.bool, *INTEGERS), "bool or integer")
    require_shape("mask", mask, shape, f"one entry per token of {like_name}")
    require_device("mask", mask, like, like_name)
    if mask.dtype == torch.bool:
        return mask
    data_check((mask == 0) | (mask == 1), f"mask must hold 0 and 1 only, got {describe(mask)}")
    return mask != 0
