"""CUDA C++ against the CPU kernels of the same arithmetic, on a GPU: values, lists, gradients, no sync, repeatable."""

import itertools

import pytest
import torch
from torch import Tensor

from fastgrpo.advantages import group_advantage, segment_scan
from tests.test_group_advantage import CHOICES, draw

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("baseline", "scale"), CHOICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cuda_equals_cpu(baseline: str, scale: str, dtype: torch.dtype) -> None:
    """Groups below, at and above the 8 and 32 lanes of a team; more rows than the 1024 threads of the list."""
    for size, ids in itertools.product((1, 3, 8, 9, 32, 100), (False, True)):
        rows = size * (2500 // size)
        reward = draw(rows, 2).to(dtype)
        shuffled = (torch.arange(rows) // size)[torch.randperm(rows)]
        lengths = torch.randint(0, 50, (rows,)) if baseline == "length_weighted" else None
        upstream = torch.randn(rows, dtype=dtype)

        def run(device: str, given: Tensor = reward, size: int = size) -> list[Tensor]:
            values = given.to(device).detach().requires_grad_()
            out = group_advantage(
                values,
                group_size=None if ids else size,  # noqa: B023
                group_ids=shuffled.to(device) if ids else None,  # noqa: B023
                baseline=baseline,
                scale=scale,
                lengths=None if lengths is None else lengths.to(device),  # noqa: B023
            )
            (out.advantage * upstream.to(device)).sum().backward()  # noqa: B023
            return [t.detach().cpu() for t in (*out, values.grad)]

        tolerance = 1e-5 if dtype == torch.float32 else 1e-9
        for a, b in zip(run("cuda"), run("cpu"), strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_cuda_infinite_reward_is_flagged_in_its_group() -> None:
    reward = torch.rand(1000, device="cuda")
    reward[5] = float("inf")
    out = group_advantage(reward, group_size=4, scale="batch")
    assert out.num_fault == 4
    assert out.advantage.isnan().nonzero().flatten().tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize("reverse", [True, False])
def test_cuda_segment_scan_equals_cpu(reverse: bool) -> None:
    """Lengths around the 32 tokens of a step; empty sequences; tokens outside all of them."""
    lengths = torch.tensor([0, 1, 31, 32, 33, 64, 0, 1000, 4097])
    ends = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    tokens = int(lengths.sum()) + 5
    x, decay = torch.randn(tokens).double(), torch.rand(tokens).double()
    decay[torch.rand(tokens) < 0.1] = 0
    expected = segment_scan(x, decay, cu_seqlens=ends, reverse=reverse)
    out = segment_scan(x.cuda(), decay.cuda(), cu_seqlens=ends.cuda(), reverse=reverse)
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-12, atol=1e-12)


def test_cuda_no_sync_and_repeatable() -> None:
    reward, ids = torch.rand(5000, 2, device="cuda"), torch.randint(0, 300, (5000,), device="cuda")
    once = group_advantage(reward, group_ids=ids, scale="batch", reward_weights=[1.0, 2.0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            again = group_advantage(reward, group_ids=ids, scale="batch", reward_weights=[1.0, 2.0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
