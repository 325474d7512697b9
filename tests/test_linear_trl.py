"""Parity with the fused head of TRL: its own autograd function, the same call, the same values and gradients."""

import pytest
import torch

from fastgrpo.functional.linear_token_statistics import linear_token_statistics
from tests.linear_cases import Products

trl_utils = pytest.importorskip("trl.trainer.utils")
if not hasattr(trl_utils, "_ChunkedLogProbFunction"):
    pytest.skip("this TRL has no fused head", allow_module_level=True)

N, H, V = 60, 16, 203
ALL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def inputs(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*s, generator=g).to(dtype) for s in ((N, H), (V, H), (V,)))
    ids = torch.randint(V, (N,), generator=g)
    ids[:20] = (hidden[:20].float() @ weight.float().t() + bias.float()).argmax(
        -1
    )  # some are the most likely token
    return hidden, weight, bias, ids, torch.randn(2, N, generator=g)


def theirs(hidden, weight, bias, ids, temperature, softcap, scale):
    return trl_utils._ChunkedLogProbFunction.apply(
        hidden, weight, bias, ids, temperature, 64, softcap, scale, ALL
    )


def ours(hidden, weight, bias, ids, temperature, softcap, scale):
    return linear_token_statistics(
        hidden, weight, ids, bias=bias, temperature=temperature, logit_softcap=softcap, logit_scale=scale
    )  # fmt: skip


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(
    ("temperature", "softcap", "scale"), [(1.0, None, 1.0), (0.7, None, 0.5), (0.9, 5.0, 0.7)]
)
def test_values_and_gradients(temperature, softcap, scale, with_bias):
    hidden, weight, bias, ids, upstream = inputs()
    exact = [t.double().requires_grad_() for t in (hidden, weight, bias)]
    results, grads = [], []
    for run, tensors in (
        (theirs, (hidden, weight, bias)),
        (ours, (hidden, weight, bias)),
        (ours, exact),
    ):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        out = run(
            leaves[0], leaves[1], leaves[2] if with_bias else None, ids, temperature, softcap, scale
        )
        used = leaves if with_bias else leaves[:2]
        results.append(out)
        grads.append(
            torch.autograd.grad((out[0] * upstream[0]).sum() + (out[1] * upstream[1]).sum(), used)
        )
    trl, own, gold = results
    assert all(not value.requires_grad for value in (*trl[2:], *own[2:]))
    assert torch.equal(own[4], trl[4])
    for x, y, z in zip(own[:4], trl[:4], gold[:4], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            x.double(), z, rtol=1e-6, atol=2e-6 * float(hidden.abs().max()) * 20
        )
    for x, y in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_bfloat16_under_autocast():
    """As TRL calls it: float32 leaves, autocast around forward, backward outside. Both round the logits to bf16."""
    hidden, weight, bias, ids, upstream = inputs()
    outcomes = []
    for run in (theirs, ours):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = run(*leaves, ids, 1.0, None, 1.0)
        (out[0] * upstream[0]).sum().backward()
        outcomes.append([out[0].detach(), *(leaf.grad for leaf in leaves)])
    for x, y in zip(*outcomes, strict=True):
        assert x.dtype == y.dtype == torch.float32
        torch.testing.assert_close(x, y, rtol=5e-2, atol=6e-2)


def test_entropy_without_gradient_costs_nothing(monkeypatch):
    """set_materialize_grads(False): an entropy for the log alone adds no work to backward."""
    hidden, weight, bias, ids, _ = inputs()
    products = Products(monkeypatch)
    leaf = hidden.clone().requires_grad_()
    out = ours(leaf, weight, bias, ids, 1.0, None, 1.0)
    products.take()
    out.logprob[:7].sum().backward()
    assert products.take() == (7, 7, 0)


def test_masked_rows_hold_zeros():
    hidden, weight, bias, ids, _ = inputs()
    mask = torch.arange(N) % 3 > 0
    whole = ours(hidden, weight, bias, ids, 1.0, None, 1.0)
    for capacity in (None, N - 5):
        part = linear_token_statistics(
            hidden, weight, ids, bias=bias, mask=mask, capacity=capacity, workspace_bytes=9000
        )
        for x, y in zip(part, whole, strict=True):
            assert not x[~mask].any()
            torch.testing.assert_close(x[mask], y[mask], rtol=1e-5, atol=1e-5)
