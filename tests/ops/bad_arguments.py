"""Machinery of the error tests: a valid call per function, overrides that break it, and the proof that nothing ran."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastgrpo import grpo_loss, kl_estimate, policy_loss, token_logprob

B, T, V = 2, 3, 7


def valid_arguments(function: Callable[..., Any]) -> dict[str, Any]:
    """Arguments by name that the function accepts."""
    tokens = {"advantage": torch.ones(B), "mask": torch.ones(B, T, dtype=torch.bool)}
    head = {"logits": torch.randn(B, T, V), "token_ids": torch.zeros(B, T, dtype=torch.int64)}
    if function is token_logprob:
        return head
    if function is grpo_loss:
        return {**head, **tokens}
    if function is policy_loss:
        return {"logprob": torch.zeros(B, T), **tokens}
    assert function is kl_estimate
    return {"logprob": torch.zeros(B, T), "ref_logprob": torch.zeros(B, T)}


@dataclass(frozen=True)
class Bad:
    """One broken argument: what is passed, the error, and what its message must say."""

    name: str  # the argument that the message must name
    value: Any
    error: type[Exception]
    rule: str  # regular expression
    given: dict[str, Any] = field(default_factory=dict)  # further overrides, valid in themselves
    label: str = ""
    got: str = ""  # what the message shows of the value, where that is not its repr

    def __str__(self) -> str:
        """Test id."""
        return f"{self.name}={self.label or summary(self.value)}"


def summary(value: Any) -> str:
    """Short form of a value for a test id."""
    if isinstance(value, Tensor):
        grad = "-grad" if value.requires_grad else ""
        shape = "x".join(map(str, value.shape))
        return f"{str(value.dtype).removeprefix('torch.')}[{shape}]{value.device.type}{grad}"
    return re.sub(r"\s+", " ", repr(value))[:40]


class NothingRuns(TorchDispatchMode):
    """Fails the test if any op of the package is reached."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not func.name().startswith("fastgrpo::"), f"{func.name()} was launched"
        return func(*args, **(kwargs or {}))


def check_refused(function: Callable[..., Any], bad: Bad) -> None:
    """The call raises the right error, which names argument, rule and what it got, before any op."""
    arguments = {**valid_arguments(function), **bad.given, bad.name: bad.value}
    with NothingRuns(), pytest.raises(bad.error) as caught:
        function(**arguments)
    message = str(caught.value)
    assert type(caught.value) is bad.error, f"{type(caught.value).__name__}: {message}"
    assert bad.name in message, f"{bad.name!r} is not named: {message}"
    assert re.search(bad.rule, message), f"rule {bad.rule!r} is not in: {message}"
    if (
        isinstance(bad.value, Tensor)
        and "gets no gradient" not in message
        and bad.value.numel() != 1
    ):
        got = f"shape {tuple(bad.value.shape)}, {bad.value.dtype}, on {bad.value.device}"
        assert got in message, f"{got!r} is not in: {message}"
    elif not isinstance(bad.value, Tensor) and bad.value is not None:
        given = bad.got or summary(bad.value)[:12]
        assert given in message, f"{given!r} is not in: {message}"


def ints(*shape: int) -> Tensor:
    """An integer tensor."""
    return torch.zeros(shape, dtype=torch.int64)


def meta(value: Tensor) -> Tensor:
    """The same tensor on another device."""
    return value.to("meta")


# Mistakes that every per-token float argument [B, T] must refuse; nothing is ever broadcast (N28).
def bad_per_token(name: str, **given: Any) -> list[Bad]:
    """A list instead of a tensor, integers, four wrong shapes, another device, a tensor that wants a gradient."""
    floats = "float16, bfloat16, float32 or float64 tensor"
    shape = r"must have shape \(2, 3\)"
    return [
        Bad(name, [[0.0] * T] * B, TypeError, f"must be a {floats}", given),
        Bad(name, ints(B, T), TypeError, f"must be a {floats}", given),
        Bad(name, torch.zeros(B, T, dtype=torch.complex64), TypeError, f"must be a {floats}", given),
        Bad(name, torch.zeros(B, 1), ValueError, shape, given),
        Bad(name, torch.zeros(T), ValueError, shape, given),
        Bad(name, torch.zeros(B, T + 1), ValueError, shape, given),
        Bad(name, torch.zeros(T, B), ValueError, shape, given),
        Bad(name, torch.zeros(B, T, 1), ValueError, shape, given),
        Bad(name, meta(torch.zeros(B, T)), ValueError, r"must be on the device of .*\(cpu\)", given),
        Bad(name, torch.zeros(B, T, requires_grad=True), ValueError, "gets no gradient and must not require", given),
    ]  # fmt: skip


# Mistakes that every number > 0 must refuse.
def bad_positive(name: str, rule: str = "> 0 and finite", **given: Any) -> list[Bad]:
    """Zero, negative, NaN, infinite, text, a bool, a list."""
    values = [0, 0.0, -1.0, float("nan"), float("inf"), float("-inf")]
    wrong_types: list[Any] = ["1", True, [1.0]]
    return [
        *(Bad(name, value, ValueError, f"must be .*{re.escape(rule)}", given) for value in values),
        *(Bad(name, value, TypeError, "must be a number", given) for value in wrong_types),
    ]


BAD_MASKS = [
    Bad("mask", [[1] * T] * B, TypeError, "must be a bool or integer tensor"),
    Bad("mask", torch.ones(B, T), TypeError, "must be a bool or integer tensor"),
    Bad("mask", torch.full((B, T), 0.5), TypeError, "must be a bool or integer tensor", label="halves"),
    Bad("mask", -torch.ones(B, T, dtype=torch.int64), ValueError, "must hold 0 and 1 only", label="-1"),
    Bad("mask", 2 * torch.ones(B, T, dtype=torch.int64), ValueError, "must hold 0 and 1 only", label="2"),
    Bad("mask", torch.ones(B, T + 1, dtype=torch.bool), ValueError, r"must have shape \(2, 3\)"),
    Bad("mask", torch.ones(B, 1, dtype=torch.bool), ValueError, r"must have shape \(2, 3\)"),
    Bad("mask", torch.ones(T, dtype=torch.bool), ValueError, r"must have shape \(2, 3\)"),
    Bad("mask", meta(torch.ones(B, T, dtype=torch.bool)), ValueError, r"must be on the device of .*\(cpu\)"),
]  # fmt: skip

BAD_HEADS = [
    Bad("logits", [[1.0]], TypeError, "must be a float16, bfloat16, float32 or float64 tensor"),
    Bad("logits", ints(B, T, V), TypeError, "must be a float16"),
    Bad("logits", torch.ones(B, T, V, dtype=torch.bool), TypeError, "must be a float16"),
    Bad("logits", torch.ones(B, T, V, dtype=torch.complex64), TypeError, "must be a float16"),
    Bad("logits", torch.ones(B, T, V).to(torch.float8_e4m3fn), TypeError, "must be a float16"),
    Bad("logits", torch.randn(B, T, 0), ValueError, r"must have shape \[..., V\] with V >= 1"),
    Bad("logits", torch.tensor(1.0), ValueError, r"must have shape \[..., V\] with V >= 1"),
    Bad("token_ids", [[0] * T] * B, TypeError, "must be an integer tensor"),
    Bad("token_ids", torch.zeros(B, T), TypeError, "integer tensor"),
    Bad("token_ids", torch.zeros(B, T, dtype=torch.bool), TypeError, "integer tensor"),
    Bad("token_ids", ints(B, T + 1), ValueError, r"must have shape \(2, 3\)"),
    Bad("token_ids", ints(T), ValueError, r"must have shape \(2, 3\)"),
    Bad("token_ids", ints(B, T, 1), ValueError, r"must have shape \(2, 3\)"),
    Bad("token_ids", meta(ints(B, T)), ValueError, r"must be on the device of logits \(cpu\)"),
    *bad_positive("temperature"),
    Bad("temperature", None, TypeError, "must be a number"),
    Bad("temperature", ints(B, T), TypeError, "must be a float16"),
    Bad("temperature", torch.ones(T), ValueError, r"must have shape \(2, 3\)"),
    Bad("temperature", torch.ones(B, 1), ValueError, r"must have shape \(2, 3\)"),
    Bad("temperature", torch.ones(B, T, requires_grad=True), ValueError, "gets no gradient"),
    Bad("temperature", meta(torch.ones(B, T)), ValueError, r"must be on the device of .*\(cpu\)"),
    Bad("temperature", torch.zeros(B, T), ValueError, "must be > 0 and finite", label="zeros"),
    Bad("temperature", torch.full((B, T), float("nan")), ValueError, "must be > 0 and finite", label="NaN"),
    *bad_positive("logit_scale"),
    *bad_positive("logit_softcap"),
    Bad("with_entropy", "yes", TypeError, "must be True or False"),
    Bad("with_entropy", 1, TypeError, "must be True or False"),
    Bad("overwrite_logits", 1, TypeError, "must be True or False"),
]  # fmt: skip


def overwrite_of(logits: Tensor, label: str) -> Bad:
    """Logits that cannot be overwritten."""
    rule = "overwrite_logits=True needs logits whose rows lie apart in memory at one common stride"
    return Bad("logits", logits, ValueError, rule, {"overwrite_logits": True}, label)


BAD_OVERWRITES = [
    overwrite_of(torch.randn(B, T + 1, V)[:, :-1], "logits[:, :-1]"),
    overwrite_of(torch.randn(B, V, T).transpose(1, 2), "transposed"),
    overwrite_of(torch.randn(B, T, 2 * V)[..., ::2], "every second column"),
    overwrite_of(torch.randn(1, 1, V).expand(B, T, V), "expanded rows"),
    overwrite_of(torch.randn(B * T + V).as_strided((B, T, V), (T, 1, 1)), "overlapping rows"),
]
