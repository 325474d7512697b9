"""What the interpreter tests share: the guard, inputs, and tolerances derived from what a kernel computes."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
import triton
from torch import Tensor

from fastgrpo.kernels import numerics

if isinstance(numerics.exp, triton.runtime.JITFunction):
    pytest.skip(
        "Triton was imported without TRITON_INTERPRET=1: run tests/interpreter in a process of its own",
        allow_module_level=True,
    )

EMPTY = torch.empty(0)


def accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty(dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=accumulate(dtype))


def logits_and_ids(
    rows: int, vocabulary: int, dtype: torch.dtype, scale: float = 4.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed + 7 * vocabulary)
    logits = (scale * torch.randn(rows, vocabulary, generator=generator)).to(dtype)
    return logits, torch.randint(0, vocabulary, (rows,), generator=generator)


def statistic_atol(logits: Tensor, temperature: Tensor) -> float:
    """4 eps max|x|: the rounding of x = z / T and of its difference to the row's reference."""
    finite = logits.double().abs()
    finite = finite[finite.isfinite()]
    largest = float(finite.max()) / float(temperature.min()) if finite.numel() else 1.0
    return 4 * torch.finfo(accumulate(logits.dtype)).eps * max(largest, 1.0)


def assert_close(got: Tensor, want: Tensor, atol: float, rtol: float | None = None) -> None:
    """`want` is float64; NaN and infinities must agree in place and sign."""
    rtol = torch.finfo(got.dtype).eps if rtol is None else rtol
    torch.testing.assert_close(got.double(), want, atol=atol, rtol=rtol, equal_nan=True)
