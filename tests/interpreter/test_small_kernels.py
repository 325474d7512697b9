"""`kernels.scale_gradient` and the elementary functions of `kernels.numerics`."""

import pytest
import torch
import triton
import triton.language as tl
from interpreter_helpers import assert_close

from fastgrpo.kernels import numerics, scale_gradient


@triton.jit
def _apply(x_ptr, y_ptr, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, FUNCTION(tl.load(x_ptr + offsets)))


@triton.jit
def _tanh(x):
    tanh, _ = numerics.tanh_and_slope(x)
    return tanh


@triton.jit
def _tanh_slope(x):
    _, slope = numerics.tanh_and_slope(x)
    return slope


def _grid(low: float, high: float, dtype: torch.dtype) -> torch.Tensor:
    """512 points of every magnitude between two bounds."""
    return torch.logspace(low, high, 512, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("function", "gold", "high", "signs", "ulps"),
    [
        (numerics.log1p_unit, torch.log1p, 0.0, (1,), 4),
        (numerics.expm1, torch.expm1, 1.3, (1, -1), 40),  # |x| eps where x is scaled before exp2
        (numerics.exp, torch.exp, 1.3, (1, -1), 40),
        (_tanh, torch.tanh, 1.3, (1, -1), 8),
        (_tanh_slope, lambda x: 1 / torch.cosh(x) ** 2, 1.3, (1, -1), 80),
    ],
    ids=["log1p", "expm1", "exp", "tanh", "tanh slope"],
)  # fmt: skip
def test_relative_accuracy(function, gold, high, signs, ulps, dtype):
    lowest = -7.0 if function is _tanh and dtype == torch.float64 else -20.0
    for sign in signs:
        x = sign * _grid(lowest if function is not _tanh else max(lowest, -12.0), high, dtype)
        y = torch.empty_like(x)
        _apply[(1,)](x, y, FUNCTION=function, BLOCK=512)
        # float64 tanh is accurate to eps absolutely, relative to what it is added to
        atol = 1e-15 if function is _tanh and dtype == torch.float64 else 0.0
        assert_close(y, gold(x.double()), atol=atol, rtol=ulps * torch.finfo(dtype).eps)


def test_k3_is_relatively_accurate():  # N18: the plain form is 100 % wrong at 1e-4
    x = torch.cat([_grid(-15.0, 1.0, torch.float32), -_grid(-15.0, 1.0, torch.float32)])
    y = torch.empty_like(x)
    _apply[(1,)](x, y, FUNCTION=numerics.exp_minus_1_minus_x, BLOCK=1024)
    z = x.double()
    series = z * z * (0.5 + z * (1 / 6 + z * (1 / 24 + z / 120)))
    gold = torch.where(z.abs() < 1e-3, series, torch.expm1(z) - z)
    assert_close(y, gold, atol=0.0, rtol=64 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("factor", [0.0, 0.37, torch.nan], ids=str)
def test_scale_gradient(factor, dtype):
    grad = torch.randn(3, 3001).to(dtype)
    scale = torch.tensor([factor], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    want = (grad.to(scale.dtype) * scale).to(dtype)
    scale_gradient.scale_gradient_(grad, scale)
    rtol = 2**-7 if dtype == torch.bfloat16 else 0  # the interpreter truncates where a GPU rounds
    torch.testing.assert_close(grad, want, rtol=rtol, atol=0, equal_nan=True)


def test_scale_gradient_by_one_changes_no_bit():
    bits = torch.randint(-(2**15), 2**15, (5000,), dtype=torch.int16)
    grad = bits.view(torch.float16).clone()  # NaNs with payloads among them
    scale_gradient.scale_gradient_(grad, torch.ones(1))
    assert torch.equal(grad.view(torch.int16), bits)
    scale_gradient.scale_gradient_(torch.empty(0), torch.ones(1))


def test_scale_gradient_of_a_view_leaves_the_rest_alone():
    buffer = torch.ones(4, 8)
    scale_gradient.scale_gradient_(buffer[:, 1:5], torch.tensor([3.0]))
    assert (buffer[:, 1:5] == 3).all()
    assert (buffer[:, [0, 5, 6, 7]] == 1).all()


def test_scale_gradient_walks_with_a_stride(monkeypatch):
    monkeypatch.setattr(scale_gradient, "_PROGRAMS", 2)
    grad = torch.ones(5 * 4096 + 3)
    scale_gradient.scale_gradient_(grad, torch.tensor([2.0]))
    assert (grad == 2).all()
