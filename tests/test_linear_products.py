"""The compiled products of a head against float64, their layouts, and that a row's bits are its own."""

import pytest
import torch

from fastgrpo import Objective, host, linear_grpo_loss, linear_token_logprob
from fastgrpo.functional.linear.gemm import choose_mode
from fastgrpo.functional.linear.gemm_mixed import NativeHead
from fastgrpo.ops import head_products as ops
from tests.linear_cases import OBJECTIVES, Products, make_batch

NOTHING = torch.empty(0)
# (rows, vocabulary, hidden): one of each; odd everything; exactly a tile; just over tile, panel and block; many blocks
SHAPES = [(1, 1, 1), (7, 70, 33), (6, 64, 512), (13, 130, 513), (600, 96, 70), (25, 1500, 66)]
needs_native = pytest.mark.skipif(
    not ops.is_native(torch.device("cpu")), reason="no compiled products for this CPU"
)  # fmt: skip


def half(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def error(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("rows", "vocabulary", "hidden"), SHAPES)
def test_logits(rows, vocabulary, hidden):
    x, w = half(rows, hidden + 3, seed=1)[:, :hidden], half(vocabulary, hidden + 1, seed=2)[:, 1:]
    memory = torch.full((rows, vocabulary + 5), 7.0)
    ops.head_logits(x, w, memory[:, :vocabulary])
    assert error(memory[:, :vocabulary], x.double() @ w.double().t()) < 1e-6
    assert (memory[:, vocabulary:] == 7).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize(("rows", "vocabulary", "hidden"), SHAPES)
def test_gradients(rows, vocabulary, hidden, corrected, split, dtype):
    g = torch.Generator().manual_seed(3)
    dlogits = torch.randn(rows, vocabulary + 3, generator=g).to(dtype)[:, :vocabulary]
    x, w, ids = (
        half(rows, hidden, seed=1),
        half(vocabulary, hidden, seed=2),
        torch.randint(vocabulary, (rows,), generator=g),
    )
    residual = torch.randn(rows, generator=g) if corrected else NOTHING
    exact = ops.rounded(dlogits.float(), split).double()
    dhidden, dweight = exact @ w.double(), exact.t() @ x.double()
    if corrected:
        dhidden += residual[:, None].double() * w[ids].double()
        dweight.index_put_((ids,), residual[:, None].double() * x.double(), accumulate=True)
    extra = (residual, ids, split)
    wide, narrow = torch.empty(rows, hidden), torch.empty(rows, hidden, dtype=torch.bfloat16)
    ops.head_hidden_gradient(dlogits, w, *extra, wide)
    ops.head_hidden_gradient(dlogits, w, *extra, narrow)
    assert error(wide, dhidden) < 2e-6
    assert torch.equal(narrow, wide.bfloat16())  # rounded once
    total, written = torch.ones(vocabulary, hidden), torch.empty(vocabulary, hidden)
    narrow = torch.empty(vocabulary, hidden, dtype=torch.bfloat16)
    ops.head_weight_gradient(dlogits, x, *extra, True, total)
    ops.head_weight_gradient(dlogits, x, *extra, False, written)
    ops.head_weight_gradient(dlogits, x, *extra, False, narrow)
    assert error(total - 1, dweight) < 1e-4  # float32 next to a 1
    assert error(written, dweight) < 2e-6
    assert torch.equal(narrow, written.bfloat16())


def test_split_keeps_sixteen_bits():
    dlogits = torch.randn(40, 300, generator=torch.Generator().manual_seed(0))
    w = half(300, 64, seed=2)
    out = torch.empty(40, 64)
    ops.head_hidden_gradient(dlogits, w, NOTHING, NOTHING.long(), True, out)
    assert error(out, dlogits.double() @ w.double()) < 2e-5
    ops.head_hidden_gradient(dlogits, w, NOTHING, NOTHING.long(), False, out)
    assert 5e-4 < error(out, dlogits.double() @ w.double()) < 5e-3


@needs_native
def test_rows_do_not_depend_on_their_neighbours():
    """The same bits for any number of rows, at any position."""
    x, w = half(50, 90, seed=1), half(130, 90, seed=2)
    whole = torch.empty(50, 130)
    ops.head_logits(x, w, whole)
    for rows in (slice(0, 1), slice(3, 10), slice(11, 50)):
        part = torch.empty(x[rows].shape[0], 130)
        ops.head_logits(x[rows], w, part)
        assert torch.equal(part, whole[rows])
    dhidden = torch.empty(50, 90)
    ops.head_hidden_gradient(whole, w, NOTHING, NOTHING.long(), False, dhidden)
    part = torch.empty(7, 90)
    ops.head_hidden_gradient(whole[20:27], w, NOTHING, NOTHING.long(), False, part)
    assert torch.equal(part, dhidden[20:27])


@needs_native
def test_threads_change_no_bit():
    x, w = half(50, 90, seed=1), half(9000, 90, seed=2)
    dlogits, ids = half(50, 9000, seed=3), torch.arange(50)
    residual = torch.ones(50)
    outcomes = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            logits, dhidden, dweight = (
                torch.empty(50, 9000),
                torch.empty(50, 90),
                torch.empty(9000, 90),
            )
            ops.head_logits(x, w, logits)
            ops.head_hidden_gradient(dlogits, w, residual, ids, False, dhidden)
            ops.head_weight_gradient(dlogits, x, residual, ids, False, False, dweight)
            outcomes.append((logits, dhidden, dweight))
    finally:
        torch.set_num_threads(threads)
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, outcomes[0], strict=True))


def test_faults_stay_in_their_row():
    x, w = half(8, 40, seed=1), half(70, 40, seed=2)
    x[3, 5] = torch.nan
    out = torch.empty(8, 70)
    ops.head_logits(x, w, out)
    assert out[3].isnan().all()
    assert out[[0, 1, 2, 4, 5, 6, 7]].isfinite().all()


@needs_native
def test_narrow_in_place():
    """Rows become half as long within their own memory; every other row is left out."""
    memory = torch.randn(6 * 64 + 64)
    wide = memory[: 6 * 64].view(6, 64)
    expected = wide[[0, 2, 5]].bfloat16()
    narrow = memory.view(torch.bfloat16)[: 3 * 64].view(3, 64)
    ops.narrow_rows(wide, torch.tensor([0, 2, 5]), narrow)
    assert torch.equal(narrow, expected)
    with pytest.raises(RuntimeError, match="must not run ahead"):
        ops.narrow_rows(wide, torch.tensor([0]), memory.view(torch.bfloat16)[8:72].view(1, 64))
    with pytest.raises(RuntimeError, match="index must rise"):
        ops.narrow_rows(wide, torch.tensor([2, 1]), narrow[:2])


@needs_native
@pytest.mark.parametrize("name", ["head_logits", "head_hidden_gradient", "head_weight_gradient"])
def test_shapes_are_checked_where_they_would_read_outside(name):
    d, x, w = torch.empty(3, 7), half(3, 4, seed=0), half(6, 4, seed=0)
    extra = (NOTHING, NOTHING.long(), False)
    arguments = {
        "head_logits": (x, w, d),
        "head_hidden_gradient": (d, w, *extra, torch.empty(3, 4)),
        "head_weight_gradient": (d, x, *extra, False, torch.empty(6, 4)),
    }[name]
    with pytest.raises(RuntimeError, match="must be"):
        getattr(ops, name)(*arguments)


@needs_native
@pytest.mark.parametrize("name", ["grpo, kl", "gspo, kl", "entropy bonus"])
def test_bits_do_not_depend_on_padding_or_micro_batches(name):
    """bfloat16 on the compiled products: per-token results of any split and layout are the same bits."""
    batch, objective = make_batch(torch.bfloat16), OBJECTIVES[name]
    options = {"objective": objective, "bias": batch.bias}
    whole = linear_grpo_loss(
        batch.hidden, batch.weight, batch.token_ids, batch.advantage, batch.mask, **options, **batch.options()
    )  # fmt: skip
    for rows in (slice(0, 1), slice(1, 4)):
        part = linear_grpo_loss(
            batch.hidden[rows], batch.weight, batch.token_ids[rows], batch.advantage[rows], batch.mask[rows],
            old_logprob=batch.old_logprob[rows], ref_logprob=batch.ref_logprob[rows], **options,
        )  # fmt: skip
        for field in ("logprob", "entropy", "token_loss"):
            assert torch.equal(getattr(part, field), getattr(whole, field)[rows])
    for budget in (1, 400, 4000):
        cut = linear_grpo_loss(
            batch.hidden, batch.weight, batch.token_ids, batch.advantage, batch.mask, workspace_bytes=budget,
            **options, **batch.options(),
        )  # fmt: skip
        for field in ("loss", "logprob", "entropy", "token_loss"):
            assert torch.equal(getattr(cut, field), getattr(whole, field))


@needs_native
def test_a_narrowing_workspace_multiplies_active_rows_once(monkeypatch):
    """Rows wait in bfloat16 and are multiplied together; clipped and masked ones never."""
    products = Products(monkeypatch, NativeHead)
    batch = make_batch(torch.bfloat16)
    for budget in (
        None,
        32 * 2 * 12,
    ):  # all at once; 12 units of a half-precision row: 6 rows of logits
        leaves = batch.leaves()
        out = linear_grpo_loss(
            leaves[0], leaves[1], batch.token_ids, batch.advantage, batch.mask, workspace_bytes=budget,
            objective=Objective.grpo(), **batch.options(),
        )  # fmt: skip
        active = int(out.metrics.sum("active"))
        assert 0 < active < int(batch.mask.sum())
        assert products.take() == (int(batch.mask.sum()), active, active)


def test_modes():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    native = host.cpu_capability() == "avx512_bf16" and ops.is_native(cpu)
    assert choose_mode("auto", torch.bfloat16, cpu) == ("mixed" if native else "direct")
    assert choose_mode("float32", torch.bfloat16, cpu) == ("split" if native else "upcast")
    assert choose_mode("input", torch.bfloat16, cpu) == "direct"
    assert {choose_mode(p, torch.float16, cpu) for p in ("auto", "float32", "input")} == {"upcast"}
    assert choose_mode("auto", torch.bfloat16, cuda) == "mixed"
    assert choose_mode("float32", torch.float16, cuda) == "split"
    assert choose_mode("input", torch.bfloat16, cuda) == "direct"
    assert choose_mode("float32", torch.float32, cuda) == "direct"


def test_transposed_weight_and_strided_hidden():
    batch = make_batch(torch.bfloat16)
    expected = linear_token_logprob(batch.hidden, batch.weight, batch.token_ids).logprob
    strided = torch.stack([batch.hidden, batch.hidden], dim=-1)[..., 0]
    out = linear_token_logprob(strided, batch.weight.t().contiguous().t(), batch.token_ids).logprob
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
