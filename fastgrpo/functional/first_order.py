"""Backward passes that are differentiable once: a second derivative raises instead of lacking a term."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def first_order_only(
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[..., tuple[Tensor | None, ...]]:
    """Decorate the backward of an autograd.Function whose gradient depends on its saved inputs.

    `once_differentiable` raises only if the upstream gradient requires grad. With a constant one, as from
    `loss.backward(create_graph=True)`, it detaches the gradient, and a gradient penalty loses this op's share silently.
    """

    @wraps(backward)
    def wrapper(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return gradients
        name = type(ctx).__name__.removesuffix("Backward").removesuffix("Generated")
        name = name.removesuffix("Function")
        if (
            torch._C._functorch.peek_interpreter_stack() is not None
        ):  # no way to mark a result there
            raise RuntimeError(
                f"fastgrpo: {name} cannot be differentiated inside a torch.func transform; use torch.autograd.grad"
            )
        message = f"fastgrpo: {name} has no second derivative".encode()
        tracked = [None if g is None else g.detach().requires_grad_() for g in gradients]
        error = torch._C._functions.DelayedError(message, len(tracked))
        outputs: tuple[Tensor | None, ...] = error(*tracked)  # type: ignore[arg-type]
        return outputs

    return wrapper
