"""Definition of ops that write into an argument.

`torch.library.custom_op` does this too, but bumps the version of the argument in Python by walking the schema at each
call: 0.25 ms for the 21 arguments of `grpo_loss`, more than its kernel takes on a small batch. Here the op is defined
with the same inferred schema, and the caller bumps the version of the one argument it knows.
"""

from collections.abc import Callable
from typing import Any

import torch


class MutatingOp:
    """An op `fastgrpo::name` with the decorated function as its kernel for every device without a better one."""

    def __init__(self, name: str, mutated: str, function: Callable[..., Any]) -> None:
        """Define the op; `mutated` is the name of the argument written to."""
        schema = torch.library.infer_schema(function, mutates_args=(mutated,))
        torch.library.define(name, schema)
        torch.library.impl(name, "default")(function)
        self.name = name
        namespace, _, short = name.partition("::")
        self.overload = getattr(getattr(torch.ops, namespace), short).default
        self.position = [argument.name for argument in self.overload._schema.arguments].index(
            mutated
        )

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Register what shapes and dtypes the op returns."""
        torch.library.register_fake(self.name)(function)
        return function

    def __call__(self, *args: Any) -> Any:
        """Run the op and bump the version of the argument it wrote, so that autograd notices a stale saved tensor."""
        result = self.overload(*args)
        if not torch.compiler.is_compiling():
            written = args[self.position]
            if written.numel() and not written.is_inference():
                torch.autograd.graph.increment_version(written)
        return result


def mutating_op(name: str, *, mutated: str) -> Callable[[Callable[..., Any]], MutatingOp]:
    """Decorate the default kernel of an op that writes into one argument."""
    return lambda function: MutatingOp(name, mutated, function)
