"""User surrogates: a policy term of one's own, fused into the same kernels as the built-in ones."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgrpo.functional.checks import describe
from fastgrpo.ops import backend
from fastgrpo.ops.surrogates import INLINED
from fastgrpo.reference import SURROGATES

Expression = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def register_surrogate(name: str, jit: Any, expression: Expression) -> None:
    """Register a policy term under a name that `Objective(surrogate=name)` accepts.

    Args:
        name: A Python identifier that is not "ratio" or "logp".
        jit: A `@triton.jit` function `(log_ratio, advantage, params) -> (value, dvalue)`, inlined on a GPU; None where
            only the CPU is used. `params` points to the objective's `surrogate_params`: `tl.load(params + k)`.
        expression: The same as torch code `(log_ratio [N], advantage [N], params [8]) -> (value [N], dvalue [N])`.

    `value` is minimised; `dvalue` is its derivative with respect to the log-ratio.

    Raises:
        TypeError: The name is no string, or a function cannot be called.
        ValueError: The name is taken or no identifier.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {describe(name)}")
    if not callable(expression):
        raise TypeError(f"expression must be a function, got {describe(expression)}")
    if jit is not None and not callable(getattr(jit, "run", None)):
        raise TypeError(f"jit must be a @triton.jit function or None, got {describe(jit)}")
    if not name.isidentifier() or name in ("ratio", "logp") or name in SURROGATES:
        raise ValueError(f"name must be a new identifier other than ratio and logp, got {name!r}")
    SURROGATES[name] = expression
    if jit is not None:
        from fastgrpo.kernels import surrogates

        surrogates.register(name, jit)
        INLINED.add(name)


def is_inlined(name: str, device: torch.device) -> bool:
    """Whether the loss kernels of this device run the surrogate's jit function instead of its torch expression."""
    return name in INLINED and backend.is_triton("policy_loss", device)
