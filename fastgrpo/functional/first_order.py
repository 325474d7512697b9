"""Backward passes that are differentiable once: a second derivative raises instead of lacking a term."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def first_order_only(
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[..., tuple[Tensor | None, ...]]:
    """Decorate the backward of an autograd.Function whose gradient depends on its saved inputs: no `create_graph`.

    Torch's `once_differentiable` hangs its error into the graph of the gradients, where two ways lead past it: a
    constant upstream gradient (`loss.backward(create_graph=True)`) and `autograd.grad` for inputs that the error does
    not lead to. Either way a gradient penalty would lose this op's share silently.
    """

    @wraps(backward)
    def wrapper(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            name = type(ctx).__name__.removesuffix("Backward").removesuffix("Generated")
            raise RuntimeError(
                f"fastgrpo: {name.removesuffix('Function')} has no second derivative; call backward without "
                "create_graph=True, and not inside a torch.func transform"
            )
        return backward(ctx, *upstream)

    return wrapper
