"""`linear_token_logprob` against `token_logprob` of the logits, and what its backward leaves undone."""

import logging

import pytest
import torch
from torch.autograd import gradcheck

from fastgrpo import backend_report, checks, linear_token_logprob, token_logprob
from fastgrpo.ops.report import note_path
from tests.linear_cases import ROW_BYTES, B, H, Products, T, V, make_batch

PER_TOKEN = 0.5 + torch.rand(B, T, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
OPTIONS = {
    "plain": {},
    "entropy, T": {"with_entropy": True, "temperature": 0.7},
    "T per token": {"temperature": PER_TOKEN},
    "scale": {"logit_scale": 0.6, "with_entropy": True},
    "softcap": {"logit_scale": 0.6, "logit_softcap": 3.0, "with_entropy": True},
}


def upstream(seed=2):
    return torch.randn(2, B, T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def total(out, weights):
    value = (out.logprob * weights[0]).sum()
    return value if out.entropy is None else value + (out.entropy * weights[1]).sum()


def score(batch, leaves, **options):
    return linear_token_logprob(
        leaves[0], leaves[1], batch.token_ids, bias=leaves[2], mask=batch.mask, **options
    )


@pytest.mark.parametrize(
    "rows", [None, 1, 4]
)  # all at once, the smallest chunk, an uneven last chunk
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_token_logprob(options, rows):
    batch = make_batch()
    a, b = batch.leaves(), batch.leaves()
    budget = rows if rows is None else rows * ROW_BYTES
    actual = score(batch, a, workspace_bytes=budget, **options)
    logits = b[0] @ b[1].t() + b[2]
    expected = token_logprob(logits, batch.token_ids, mask=batch.mask, **options)
    weights = upstream()
    for x, y in zip(actual, expected, strict=True):
        if y is not None:
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
            assert (x[~batch.mask] == 0).all()
    found = torch.autograd.grad(total(actual, weights), a)
    for x, y in zip(found, torch.autograd.grad(total(expected, weights), b), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck(options):
    batch = make_batch()

    def scored(*leaves):
        out = score(batch, leaves, workspace_bytes=4 * ROW_BYTES, **options)
        return out.logprob if out.entropy is None else (out.logprob, out.entropy)

    assert gradcheck(scored, tuple(batch.leaves()), fast_mode=True)


def test_only_rows_with_an_upstream_gradient_are_recomputed(monkeypatch):
    batch, products = make_batch(), Products(monkeypatch)
    leaves = batch.leaves()
    out = score(batch, leaves, with_entropy=True)
    live = int(batch.mask.sum())
    assert products.take() == (live, 0, 0)
    weights = torch.zeros(B, T, dtype=torch.float64)
    weights[0, :3] = torch.tensor([1.0, -1.0, 0.0])
    weights[2] = 1.0  # masked: no gradient whatever arrives
    torch.autograd.grad((out.logprob * weights).sum(), leaves, retain_graph=True)
    assert products.take() == (2, 2, 2)
    torch.autograd.grad((out.entropy * weights).sum(), leaves, retain_graph=True)
    assert products.take() == (2, 2, 2)
    torch.autograd.grad((out.entropy * weights).sum() + out.logprob[1, 0], leaves)
    assert products.take() == (3, 3, 3)


def test_frozen_tensors_get_no_product(monkeypatch):
    batch, products = make_batch(), Products(monkeypatch)
    hidden, weight, bias = batch.leaves()
    live = int(batch.mask.sum())
    score(batch, (hidden, weight.detach(), bias.detach())).logprob.sum().backward()
    assert products.take() == (2 * live, live, 0)
    score(batch, (hidden.detach(), weight, bias.detach())).logprob.sum().backward()
    assert products.take() == (2 * live, 0, live)
    score(batch, (hidden.detach(), weight.detach(), bias)).logprob.sum().backward()
    assert products.take() == (2 * live, 0, 0)
    assert bias.grad is not None
    with torch.no_grad():
        assert not score(batch, batch.leaves()).logprob.requires_grad
    assert products.take() == (live, 0, 0)


def test_layouts_of_weight_and_hidden():
    """Transposed, strided, expanded and tied tensors give the same values and full-size gradients."""
    batch = make_batch()
    a = batch.leaves()
    expected = torch.autograd.grad(score(batch, a).logprob.sum(), a)
    transposed = batch.weight.t().contiguous().t().requires_grad_()
    padded = torch.zeros(V, 2 * H, dtype=torch.float64)
    padded[:, ::2] = batch.weight
    strided = padded[:, ::2].requires_grad_()
    for weight in (transposed, strided):
        leaves = [
            batch.hidden.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(),
            weight,
            a[2],
        ]
        found = torch.autograd.grad(score(batch, leaves).logprob.sum(), leaves)
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    tied = batch.weight.clone().requires_grad_()
    (score(batch, (batch.hidden, tied, batch.bias)).logprob.sum() + tied.sum()).backward()
    torch.testing.assert_close(tied.grad, expected[1] + 1)


def test_no_rows():
    """N = 0, in every leading shape, with a graph."""
    for shape in ((0,), (3, 0)):
        hidden = torch.zeros(*shape, H, requires_grad=True)
        weight = torch.ones(V, H, requires_grad=True)
        ids = torch.zeros(shape, dtype=torch.int64)
        out = linear_token_logprob(hidden, weight, ids, with_entropy=True)
        assert out.logprob.shape == out.entropy.shape == shape
        (out.logprob.sum() + out.entropy.sum()).backward()
        assert (weight.grad == 0).all()
        assert hidden.grad.shape == hidden.shape


def test_all_masked_is_a_differentiable_zero():
    batch = make_batch()
    leaves = batch.leaves()
    nothing = torch.zeros(B, T, dtype=torch.bool)
    out = linear_token_logprob(leaves[0], leaves[1], batch.token_ids, bias=leaves[2], mask=nothing)
    assert (out.logprob == 0).all()
    out.logprob.sum().backward()
    assert all((leaf.grad == 0).all() for leaf in leaves)


def test_masked_garbage_and_faulty_rows():
    batch = make_batch(torch.float32)
    a = batch.leaves()
    clean = score(batch, a)
    expected = torch.autograd.grad(clean.logprob.sum(), a)
    dirty = batch._replace(
        hidden=torch.where(batch.mask[..., None], batch.hidden, torch.nan),
        token_ids=torch.where(batch.mask, batch.token_ids, V),
    )
    b = dirty.leaves()
    out = score(dirty, b)
    assert torch.equal(out.logprob, clean.logprob)
    for x, y in zip(torch.autograd.grad(out.logprob.sum(), b), expected, strict=True):
        assert torch.equal(x, y)
    for bad in (V, -1, -100):
        ids = batch.token_ids.clone()
        ids[0, 1] = bad
        leaves = batch.leaves()
        out = score(batch._replace(token_ids=ids), leaves)
        assert out.logprob[0, 1].isnan()
        others = torch.ones(B, T, dtype=torch.bool)
        others[0, 1] = False
        assert torch.equal(out.logprob[others], clean.logprob[others])
        dhidden = torch.autograd.grad(out.logprob.sum(), leaves[0])[0]
        assert dhidden[0, 1].isnan().all()
        assert torch.equal(dhidden[others], expected[0][others])
    with checks("strict"), pytest.raises(ValueError, match=r"token_ids\[0, 1\] must be in"):
        score(batch._replace(token_ids=ids), leaves)


def test_confident_tokens_keep_their_gradient():
    """p = 1 - 1e-10 in float32: a normaliser that includes the token would give log-prob 0 and gradient 0."""
    hidden = torch.tensor([[1.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[23.0, 0.0], [0.0, 0.0]])
    out = linear_token_logprob(hidden, weight, torch.tensor([0]))
    expected = -torch.log1p(torch.exp(torch.tensor(-23.0, dtype=torch.float64)))
    assert out.logprob.item() == pytest.approx(expected.item(), rel=1e-5)
    out.logprob.sum().backward()
    assert hidden.grad[0, 0].item() == pytest.approx(23 * 1.026e-10, rel=1e-3)


def test_capacity():
    batch = make_batch()
    a, live = batch.leaves(), int(batch.mask.sum())
    weights = upstream() * (torch.rand(B, T, generator=torch.Generator().manual_seed(3)) > 0.5)
    expected = score(batch, a, with_entropy=True)
    grads = torch.autograd.grad(total(expected, weights), a)
    for capacity in (live, live + 2, B * T + 1):
        b = batch.leaves()
        out = score(batch, b, with_entropy=True, capacity=capacity, workspace_bytes=4 * ROW_BYTES)
        for x, y in zip(out, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
        for x, y in zip(torch.autograd.grad(total(out, weights), b), grads, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)
    short = score(batch, a, capacity=live - 1)
    assert short.logprob[batch.mask].isnan().all()
    assert (short.logprob[~batch.mask] == 0).all()


def test_weight_grad_buffer():
    batch = make_batch()
    a, b = batch.leaves(), batch.leaves()
    weights = upstream()
    expected = torch.autograd.grad(total(score(batch, a), weights), a)
    buffer = torch.ones(V, H, dtype=torch.float64)
    total(
        score(batch, b, weight_grad_buffer=buffer, workspace_bytes=4 * ROW_BYTES), weights
    ).backward()
    torch.testing.assert_close(buffer, 1 + expected[1])
    assert b[1].grad is None
    torch.testing.assert_close(b[0].grad, expected[0])


def test_misuse_of_autograd():
    batch = make_batch()
    leaves = batch.leaves()
    out = score(batch, leaves)
    first = torch.autograd.grad(out.logprob.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(out.logprob.sum(), leaves)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(score(batch, leaves).logprob.sum(), leaves, create_graph=True)
    out = score(batch, leaves)
    with torch.no_grad():
        leaves[1].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.logprob.sum().backward()


def test_paths_are_reported_and_logged_once(caplog):
    batch = make_batch(torch.bfloat16)
    with caplog.at_level(logging.INFO, logger="fastgrpo"):
        note_path("some op", "some path")
        note_path("some op", "some path")
        score(batch, batch[:3])
    assert [r.getMessage() for r in caplog.records].count("some op: some path") == 1
    assert backend_report().paths["linear_token_logprob"].startswith("cpu, bfloat16 products")
