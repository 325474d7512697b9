"""Dtypes: autocast, half precision against float64 of the same stored inputs, gradients against the rounding floor."""

import pytest
import torch

from fastgrpo import Objective, linear_grpo_loss, linear_token_logprob
from fastgrpo.functional.linear import inputs as linear_inputs
from fastgrpo.ops.head_products import is_native
from tests.linear_cases import B, H, T, V, make_batch

HALF = (torch.float16, torch.bfloat16)


def floor_error(actual, exact):
    """Relative error in units of what rounding the exact result to the actual dtype costs."""
    rounded = exact.to(actual.dtype).double()
    return float((actual.double() - exact).norm() / (rounded - exact).norm())


class CaseHead:
    """A head in bfloat16 whose logits are of the size that trained models have, and its gradients in float64."""

    def __init__(self, tokens=256, hidden=64, vocabulary=512, scale=3.0) -> None:
        g = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(tokens, hidden, generator=g).bfloat16()
        self.weight = (
            torch.randn(vocabulary, hidden, generator=g) * scale / hidden**0.5
        ).bfloat16()
        logits = self.hidden.double() @ self.weight.double().t()
        self.ids = torch.distributions.Categorical(logits=logits).sample()
        self.logprob = logits.log_softmax(-1).gather(1, self.ids[:, None])[:, 0]
        self.upstream = torch.randn(tokens, generator=g)
        p = logits.softmax(-1)
        p[torch.arange(tokens), self.ids] -= 1
        dlogits = -p * self.upstream[:, None].double()
        self.dhidden, self.dweight = (
            dlogits @ self.weight.double(),
            dlogits.t() @ self.hidden.double(),
        )

    def run(self, **options):
        """Log-prob and gradients."""
        hidden, weight = self.hidden.clone().requires_grad_(), self.weight.clone().requires_grad_()
        out = linear_token_logprob(hidden, weight, self.ids, **options)
        (out.logprob * self.upstream).sum().backward()
        return out.logprob.double(), hidden.grad, weight.grad


@pytest.fixture(scope="module")
def head():
    torch.manual_seed(0)
    return CaseHead()


@pytest.mark.parametrize("rows", [256, 64, 1])  # 1, 4 and 256 chunks
def test_float32_logits_are_exact(head, rows):
    """bf16 inputs: log-prob to 1e-5, gradients to 1.05 of the rounding floor, whatever the number of chunks."""
    logprob, dhidden, dweight = head.run(logits_precision="float32", workspace_bytes=rows * 512 * 4)
    assert (logprob - head.logprob).abs().max() <= 1e-5
    assert floor_error(dhidden, head.dhidden) <= 1.05
    assert floor_error(dweight, head.dweight) <= 1.05


@pytest.mark.skipif(not is_native(torch.device("cpu")), reason="auto rounds the logits on this CPU")
def test_auto_is_nearly_exact_on_the_compiled_products(head):
    """Gradients of logits are rounded once, their largest entries not: 1.04 of the floor, for any number of chunks."""
    errors = []
    for rows in (512, 64, 1):
        logprob, *gradients = head.run(workspace_bytes=rows * 512 * 2)
        assert (logprob - head.logprob).abs().max() <= 1e-5
        errors.append([
            floor_error(a, b) for a, b in zip(gradients, (head.dhidden, head.dweight), strict=True)
        ])  # fmt: skip
    assert max(max(pair) for pair in errors) <= 1.1
    for pair in errors[1:]:
        assert pair == pytest.approx(errors[0], rel=0.01)


def test_input_precision_rounds_the_logits_only(head):
    """The stated bound of the fast mode: half a unit in the last place of the largest logit, 2^-9 of about 12."""
    logprob, dhidden, dweight = head.run(logits_precision="input")
    assert 1e-4 < (logprob - head.logprob).abs().max() <= 5e-2
    assert floor_error(dhidden, head.dhidden) <= 4
    assert floor_error(dweight, head.dweight) <= 4


def test_weight_gradient_of_many_rounded_chunks(head):
    """Summed in float32: 64 chunks are no worse than 1 (a bf16 sum would lose a factor of about 3)."""
    one = head.run(logits_precision="input")[2]
    many = head.run(logits_precision="input", workspace_bytes=4 * 512 * 2)[2]
    assert floor_error(many, head.dweight) <= 1.15 * floor_error(one, head.dweight)


def test_mixed_products(head, monkeypatch):
    """What a GPU runs (half operands, float32 sums), on CPU tensors: exact logits, gradients near the floor.

    The gradient of the logits is rounded to bf16 for its products; adding back what the sampled token's entry loses
    brings the error from 1.44 to within 1.1 of the floor.
    """
    from fastgrpo.functional.linear import gemm

    monkeypatch.setattr(linear_inputs, "choose_mode", lambda *_: "mixed")
    monkeypatch.setattr(linear_inputs, "is_native", lambda _: False)
    for rows in (256, 3):
        logprob, dhidden, dweight = head.run(workspace_bytes=rows * 512 * 6)
        assert (logprob - head.logprob).abs().max() <= 1e-5
        assert floor_error(dhidden, head.dhidden) <= 1.1
        assert floor_error(dweight, head.dweight) <= 1.1
    assert gemm.choose_mode("auto", torch.bfloat16, torch.device("cuda")) == "mixed"
    assert gemm.choose_mode("input", torch.bfloat16, torch.device("cuda")) == "direct"
    assert gemm.choose_mode("auto", torch.float32, torch.device("cuda")) == "direct"


@pytest.mark.parametrize("dtype", HALF)
def test_autocast(dtype):
    """float32 tensors under autocast: products in autocast's dtype forward and backward, gradients in float32."""
    batch = make_batch(torch.float32)
    leaves = batch.leaves()
    with torch.autocast("cpu", dtype=dtype):
        out = linear_grpo_loss(
            leaves[0], leaves[1], batch.token_ids, batch.advantage, batch.mask, bias=leaves[2], **batch.options()
        )  # fmt: skip
        scored = linear_token_logprob(leaves[0], leaves[1], batch.token_ids, bias=leaves[2])
    found = torch.autograd.grad(out.loss, leaves)
    two = torch.autograd.grad(
        scored.logprob.sum(), leaves
    )  # backward outside of autocast, as trainers do it
    low = [t.to(dtype) for t in batch[:2]]
    expected = linear_token_logprob(low[0], low[1], batch.token_ids, bias=batch.bias)
    assert torch.equal(scored.logprob, expected.logprob)
    assert {g.dtype for g in (*found, *two)} == {torch.float32}
    with torch.autocast("cpu", dtype=dtype):
        inside = torch.autograd.grad(
            linear_token_logprob(leaves[0], leaves[1], batch.token_ids, bias=leaves[2]).logprob.sum(), leaves
        )  # fmt: skip
    assert all(torch.equal(x, y) for x, y in zip(two, inside, strict=True))


def test_autocast_leaves_float64_alone():
    batch = make_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = linear_token_logprob(batch.hidden, batch.weight, batch.token_ids)
    assert torch.equal(
        inside.logprob, linear_token_logprob(batch.hidden, batch.weight, batch.token_ids).logprob
    )


@pytest.mark.parametrize(
    ("hidden", "weight"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_mixed_dtypes_follow_hidden(hidden, weight):
    batch = make_batch(torch.bfloat16)
    a, b = batch.hidden.to(hidden).requires_grad_(), batch.weight.to(weight).requires_grad_()
    out = linear_token_logprob(a, b, batch.token_ids, workspace_bytes=1000)
    expected = linear_token_logprob(a.detach(), b.detach().to(hidden), batch.token_ids)
    assert torch.equal(out.logprob.argsort(), expected.logprob.argsort())
    torch.testing.assert_close(out.logprob.detach(), expected.logprob, rtol=1e-5, atol=1e-5)
    out.logprob.sum().backward()
    assert a.grad.dtype == hidden
    assert b.grad.dtype == weight


@pytest.mark.parametrize("scaling", [1.0, 2.0**16])  # without and with a GradScaler
def test_float16_gradients_do_not_underflow(scaling):
    """8192 tokens in the normaliser: a gradient of p / 8192 is below float16's range; the folded scale keeps it."""
    batch = make_batch(torch.float32)
    reference = [t.to(torch.float16).float().requires_grad_() for t in batch[:3]]
    low = [t.to(torch.float16).requires_grad_() for t in batch[:3]]
    options = {"objective": Objective.dapo(), "normalizer": 8192.0, **batch.options()}
    results = []
    for leaves in (reference, low):
        out = linear_grpo_loss(
            leaves[0], leaves[1], batch.token_ids, batch.advantage, batch.mask, bias=leaves[2], **options
        )  # fmt: skip
        (out.loss * scaling).backward()
        results.append([leaf.grad.double() / scaling for leaf in leaves])
    for name, exact, actual in zip(("hidden", "weight", "bias"), *results, strict=True):
        error = float((actual - exact).norm() / exact.norm())
        assert error <= (2e-3 if scaling > 1 else 5e-2), (
            name
        )  # unscaled results are themselves subnormal numbers


def test_float16_upstream_gradients_are_scaled_inside():
    batch = make_batch(torch.float16)
    leaves, exact = batch.leaves(), [t.detach().float().requires_grad_() for t in batch[:3]]
    tiny = 2.0**-14  # an upstream gradient whose products with probabilities underflow in float16
    for tensors in (leaves, exact):
        out = linear_token_logprob(
            tensors[0], tensors[1], batch.token_ids, bias=tensors[2], logits_precision="input"
        )
        (out.logprob.sum() * tiny).backward()
    error = (leaves[1].grad.float() - exact[1].grad).norm() / exact[1].grad.norm()
    assert error < 2e-2


def test_results_are_float32_for_half_and_float64_for_float64():
    for dtype, wide in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64,) * 2,
    ):
        batch = make_batch(dtype)
        out = linear_grpo_loss(
            batch.hidden, batch.weight, batch.token_ids, batch.advantage, batch.mask, old_logprob=batch.old_logprob
        )  # fmt: skip
        assert {out.loss.dtype, out.token_loss.dtype, out.logprob.dtype, out.entropy.dtype} == {
            wide
        }
        assert out.logprob.shape == (B, T)
    assert batch.weight.shape == (V, H)
