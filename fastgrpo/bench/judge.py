"""Errors of a provider against float64, and whether it may be ranked: a wrong answer is marked, never compared."""

import math

import torch
from torch import Tensor

from fastgrpo.bench.problems import Case

# What a provider may be off by and still be ranked. Logits rounded to bf16 cost 0.08 nats and 3 % of a gradient.
LIMITS = {"logprob": 0.5, "entropy": 1.0, "loss": 0.05, "gradient": 0.10, "advantage": 1e-2}


def errors(
    outputs: dict[str, Tensor], expected: dict[str, Tensor], mask: Tensor
) -> dict[str, float]:
    """Largest absolute error per token and of the loss (relative above 1); relative norm of a gradient's error."""
    found: dict[str, float] = {}
    for name, value in outputs.items():
        if name not in expected:
            continue
        want = expected[name]
        got = value.detach()[: len(want)].double() if want.dim() else value.detach().double()
        if name in ("logprob", "entropy"):
            found[name] = float((got - want)[mask].abs().max())
        elif name == "advantage":
            found[name] = float((got - want).abs().max())
        elif name == "loss":
            found[name] = float((got - want).abs() / want.abs().clamp(min=1.0))
        else:
            relative = torch.linalg.vector_norm(got - want) / torch.linalg.vector_norm(want)
            found["gradient"] = max(float(relative), found.get("gradient", 0.0))
    return found


def required(case: Case) -> set[str]:
    """What a provider must return to be compared: the result, and every gradient that was asked for."""
    names = {"linear": "loss"}.get(case.what, case.what)
    wanted = set() if case.mode == "backward" else {names}
    if case.mode == "forward" or case.what == "advantage":
        return wanted
    if case.what != "linear":
        return wanted | {"dlogits"}
    return wanted | ({"dhidden"} if case.frozen_head else {"dhidden", "dweight"})


def is_wrong(found: dict[str, float]) -> bool:
    """Whether any error is beyond rounding."""
    return any(math.isnan(error) or error > LIMITS[name] for name, error in found.items())
