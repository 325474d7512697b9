"""`linear_grpo_loss` against the losses from logits, for every objective and every way to cut the work."""

import pytest
import torch
from torch.autograd import gradcheck

from fastgrpo import (
    LinearGRPOLoss,
    Objective,
    backend_report,
    grpo_loss,
    linear_grpo_loss,
    linear_token_logprob,
    policy_loss,
    register_surrogate,
)
from tests.linear_cases import OBJECTIVES, ROW_BYTES, B, H, Products, T, V, make_batch

BUDGETS = {
    "one chunk": None,
    "8 rows": 8 * ROW_BYTES,  # several sequences a chunk: the longest, of 7 tokens, fits
    "3 rows": 3
    * ROW_BYTES,  # no sequence fits: sequence-level objectives are scored, then recomputed
}


def gradients(loss, leaves):
    return torch.autograd.grad(loss, leaves)


def from_logits(batch, leaves, **options):
    hidden, weight, bias = leaves
    return grpo_loss(
        hidden @ weight.t() + bias, batch.token_ids, batch.advantage, batch.mask, **batch.options(), **options
    )  # fmt: skip


def from_hidden(batch, leaves, **options):
    hidden, weight, bias = leaves
    return linear_grpo_loss(
        hidden, weight, batch.token_ids, batch.advantage, batch.mask, bias=bias, **batch.options(), **options
    )  # fmt: skip


def assert_same(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_equals_the_loss_from_logits(objective, budget):
    batch = make_batch()
    a, b = batch.leaves(), batch.leaves()
    options = {"objective": objective, "temperature": 0.8, "logit_softcap": 6.0}
    expected = from_logits(batch, a, **options)
    actual = from_hidden(batch, b, workspace_bytes=budget, **options)
    for name in ("loss", "token_loss", "logprob", "entropy"):
        assert_same(getattr(actual, name), getattr(expected, name))
    assert actual.metrics.names == expected.metrics.names
    assert_same(actual.metrics.data, expected.metrics.data)
    for x, y in zip(
        gradients(1.7 * actual.loss, b), gradients(1.7 * expected.loss, a), strict=True
    ):
        assert_same(x, y)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_one_pass_equals_two_steps(objective):
    batch = make_batch()
    a, b = batch.leaves(), batch.leaves()
    scored = linear_token_logprob(
        a[0], a[1], batch.token_ids, bias=a[2], mask=batch.mask, with_entropy=True
    )
    two = policy_loss(
        scored.logprob, batch.advantage, batch.mask, entropy=scored.entropy, objective=objective, **batch.options()
    )  # fmt: skip
    one = from_hidden(batch, b, objective=objective)
    assert_same(one.loss, two.loss)
    assert_same(one.metrics.data, two.metrics.data)
    for x, y in zip(gradients(one.loss, b), gradients(two.loss, a), strict=True):
        assert_same(x, y)


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("name", ["grpo, kl", "gspo, kl", "luspo", "rloo", "sapo", "entropy bonus"])
def test_gradcheck(name, budget):
    """Objectives whose gradient is the derivative of their value; others are compared in the tests above."""
    batch = make_batch(noise=0.01)  # away from the clip's edges

    def loss(hidden, weight, bias):
        return from_hidden(
            batch, (hidden, weight, bias), objective=OBJECTIVES[name], workspace_bytes=budget
        ).loss

    assert gradcheck(loss, tuple(batch.leaves()), fast_mode=True)


@pytest.mark.parametrize("name", ["grpo", "gspo, kl", "cispo"])
def test_packed_equals_padded(name):
    """The same bits: rows are compacted before anything is multiplied."""
    batch, objective = make_batch(torch.float32), OBJECTIVES[name]
    a = batch.leaves()
    padded = from_hidden(batch, a, objective=objective)
    keep = torch.arange(T) < torch.tensor([7, 4, 0, 6, 5])[:, None]
    b = batch.leaves()
    packed = linear_grpo_loss(
        b[0][keep], b[1], batch.token_ids[keep], batch.advantage, batch.mask[keep], bias=b[2],
        old_logprob=batch.old_logprob[keep], ref_logprob=batch.ref_logprob[keep], objective=objective,
        cu_seqlens=torch.tensor([0, 7, 11, 11, 17, 22], dtype=torch.int32),
    )  # fmt: skip
    assert torch.equal(packed.loss, padded.loss)
    for name in ("token_loss", "logprob", "entropy"):
        assert torch.equal(getattr(packed, name), getattr(padded, name)[keep])
    for x, y in zip(gradients(packed.loss, b), gradients(padded.loss, a), strict=True):
        assert torch.equal(x, y)


def test_per_token_results_do_not_depend_on_the_micro_batch():
    """To the rounding of the product: torch sums in an order that may depend on the number of rows."""
    batch = make_batch(torch.float32)
    whole = from_hidden(batch, batch.leaves(), objective=Objective.grpo())
    for rows in (1, 3, 5):
        split = from_hidden(
            batch, batch.leaves(), objective=Objective.grpo(), workspace_bytes=rows * ROW_BYTES // 2
        )
        for name in ("logprob", "entropy", "token_loss"):
            assert_same(getattr(split, name), getattr(whole, name), 1e-5)


def test_merged_micro_batches_are_the_batch():
    """With the batch's normalizer, losses and gradients of micro-batches add up."""
    batch, objective = make_batch(), Objective.dapo(beta=0.1)
    a, b = batch.leaves(), batch.leaves()
    whole = from_hidden(batch, a, objective=objective)
    parts = []
    for rows in (slice(0, 2), slice(2, 5)):
        part = linear_grpo_loss(
            b[0][rows], b[1], batch.token_ids[rows], batch.advantage[rows], batch.mask[rows], bias=b[2],
            old_logprob=batch.old_logprob[rows], ref_logprob=batch.ref_logprob[rows], objective=objective,
            normalizer=float(batch.mask.sum()),
        )  # fmt: skip
        part.loss.backward()
        parts.append(part)
    assert_same(parts[0].loss + parts[1].loss, whole.loss)
    assert_same(parts[0].metrics.merge(parts[1].metrics).data, whole.metrics.data)
    for x, y in zip([t.grad for t in b], gradients(whole.loss, a), strict=True):
        assert_same(x, y)


def test_work_that_is_not_done(monkeypatch):
    """Rows per product: masked tokens in none, zero advantage in the first alone, clipped ones in the first alone."""
    batch, objective = make_batch(), Objective.grpo()
    products = Products(monkeypatch)
    out = from_hidden(batch, batch.leaves(), objective=objective)
    live, active = int(batch.mask.sum()), int(out.metrics.sum("active"))
    assert (
        active < int(out.metrics.count() - batch.mask[3].sum()) < live
    )  # some are clipped, sequence 3 has A = 0
    assert products.take() == (live, active, active)
    from_hidden(batch, batch.leaves(), objective=objective, score_inactive=False)
    assert products.take() == (live - int(batch.mask[3].sum()), active, active)
    hidden, weight, bias = batch.leaves()
    from_hidden(batch, (hidden, weight.detach(), bias.detach()), objective=objective)
    assert products.take() == (live, active, 0)  # a frozen head: two products
    from_hidden(batch, (hidden.detach(), weight, bias), objective=objective)
    assert products.take() == (live, 0, active)
    with torch.no_grad():
        from_hidden(batch, batch.leaves(), objective=objective)
    assert products.take() == (live, 0, 0)


def test_sequences_that_fit_take_three_products(monkeypatch):
    batch = make_batch()
    objective = OBJECTIVES["rloo"].replace(
        positive=(-torch.inf, 1e9), negative=(0.0, 1e9)
    )  # nothing is clipped
    products = Products(monkeypatch)
    from_hidden(batch, batch.leaves(), objective=objective, workspace_bytes=8 * ROW_BYTES)
    live, idle = int(batch.mask.sum()), int(batch.mask[3].sum())
    assert products.take() == (live, live - idle, live - idle)
    assert "recomputed" not in backend_report().paths["linear_grpo_loss"]
    from_hidden(batch, batch.leaves(), objective=objective, workspace_bytes=6 * ROW_BYTES)
    assert products.take() == (
        live + int(batch.mask[0].sum()),
        live - idle,
        live - idle,
    )  # 7 tokens do not fit
    assert (
        "1 piece(s) of whole sequences above that, scored and then recomputed"
        in backend_report().paths["linear_grpo_loss"]
    )


def test_dropped_rows_leave_loss_and_gradient_alone():
    batch, objective = make_batch(), Objective.grpo()
    a, b = batch.leaves(), batch.leaves()
    scored = from_hidden(batch, a, objective=objective)
    dropped = from_hidden(batch, b, objective=objective, score_inactive=False)
    assert torch.equal(dropped.loss, scored.loss)
    for x, y in zip(gradients(dropped.loss, b), gradients(scored.loss, a), strict=True):
        assert torch.equal(x, y)
    assert dropped.metrics.count() == scored.metrics.count() - batch.mask[3].sum()
    assert (dropped.logprob[3] == 0).all()


@pytest.mark.parametrize("name", ["grpo", "gspo, kl"])
def test_capacity(name):
    """A static number of rows gives the same results; one row too few makes loss and gradients NaN."""
    batch, objective = make_batch(), OBJECTIVES[name]
    a, b, c = (batch.leaves() for _ in range(3))
    live = int(batch.mask.sum())
    expected = from_hidden(batch, a, objective=objective)
    for capacity in (live, live + 3, B * T + 9):
        actual = from_hidden(
            batch, b, objective=objective, capacity=capacity, workspace_bytes=8 * ROW_BYTES
        )
        assert_same(actual.loss, expected.loss)
        assert_same(actual.logprob, expected.logprob)
        assert_same(actual.metrics.data, expected.metrics.data)
        for x, y in zip(gradients(actual.loss, b), gradients(expected.loss, a), strict=True):
            assert_same(x, y)
        expected = from_hidden(batch, a, objective=objective)
    short = from_hidden(batch, c, objective=objective, capacity=live - 1)
    assert short.loss.isnan()
    assert all(x.isnan().all() for x in gradients(short.loss, c)[1:])


@pytest.mark.parametrize("name", ["grpo, kl", "gspo"])
def test_nothing_to_do_is_a_differentiable_zero(name):
    batch = make_batch()
    for mask in (torch.zeros_like(batch.mask), batch.mask):
        rows = (
            slice(0, 0) if mask is batch.mask else slice(None)
        )  # an empty batch, and one without a live token
        leaves = batch.leaves()
        out = linear_grpo_loss(
            leaves[0][rows], leaves[1], batch.token_ids[rows], batch.advantage[rows], mask[rows], bias=leaves[2],
            old_logprob=batch.old_logprob[rows], ref_logprob=batch.ref_logprob[rows], objective=OBJECTIVES[name],
        )  # fmt: skip
        assert out.loss == 0
        out.loss.backward()
        assert all((leaf.grad == 0).all() for leaf in leaves)
        assert out.metrics.count() == 0
        assert out.metrics.min("kl") == torch.inf


@pytest.mark.parametrize("name", ["grpo, kl", "gspo"])
@pytest.mark.parametrize("capacity", [None, B * T])
def test_masked_garbage_has_no_influence(name, capacity):
    batch, objective = make_batch(torch.float32), OBJECTIVES[name]
    a = batch.leaves()
    clean = from_hidden(batch, a, objective=objective, capacity=capacity)
    dirty = batch._replace(
        hidden=torch.where(batch.mask[..., None], batch.hidden, torch.nan),
        token_ids=torch.where(batch.mask, batch.token_ids, -100),
        old_logprob=torch.where(batch.mask, batch.old_logprob, torch.inf),
        ref_logprob=torch.where(batch.mask, batch.ref_logprob, torch.nan),
    )
    b = dirty.leaves()
    out = from_hidden(dirty, b, objective=objective, capacity=capacity)
    assert torch.equal(out.loss, clean.loss)
    assert torch.equal(out.metrics.data, clean.metrics.data)
    for x, y in zip(gradients(out.loss, b), gradients(clean.loss, a), strict=True):
        assert torch.equal(x, y)


def test_a_faulty_row_stays_alone():
    """NaN in one row: its own results and hidden gradient; sums over rows (loss, weight gradient) say so too."""
    batch = make_batch(torch.float32)
    leaves = batch.leaves()
    clean = from_hidden(batch, leaves, objective=Objective.grpo())
    expected = gradients(clean.loss, leaves)[0]
    hidden = batch.hidden.clone()
    hidden[1, 2, 0] = torch.nan
    broken = batch._replace(hidden=hidden)
    leaves = broken.leaves()
    out = from_hidden(broken, leaves, objective=Objective.grpo())
    others = torch.ones(B, T, dtype=torch.bool)
    others[1, 2] = False
    assert torch.equal(out.logprob[others], clean.logprob[others])
    assert out.logprob[1, 2].isnan()
    assert out.loss.isnan()
    assert out.metrics.sum("fault") == 1
    dhidden, dweight, _ = gradients(out.loss, leaves)
    assert torch.equal(dhidden[others], expected[others])
    assert dhidden[1, 2].isnan().all()
    assert dweight.isnan().all()


def test_a_faulty_row_without_gradient_harms_nothing():
    """Zero advantage: the row is scored (and counted as a fault), but 0 * NaN never enters a product."""
    batch = make_batch(torch.float32)
    a = batch.leaves()
    expected = gradients(from_hidden(batch, a, objective=Objective.grpo()).loss, a)
    hidden = batch.hidden.clone()
    hidden[3, 0] = torch.nan  # sequence 3 has advantage 0
    broken = batch._replace(hidden=hidden)
    leaves = broken.leaves()
    out = from_hidden(broken, leaves, objective=Objective.grpo())
    assert out.metrics.sum("fault") == 1
    for x, y in zip(gradients(out.loss, leaves), expected, strict=True):
        assert torch.equal(x, y)


def test_registered_surrogate():
    name = "linear_test_quadratic"
    register_surrogate(name, None, lambda s, a, p: (-a * s + p[0] * s * s, -a + 2 * p[0] * s))
    objective = Objective(name="custom", surrogate=name, surrogate_params=(0.5,))
    batch = make_batch()
    a, b = batch.leaves(), batch.leaves()
    expected = from_logits(batch, a, objective=objective)
    actual = from_hidden(batch, b, objective=objective, workspace_bytes=4 * ROW_BYTES)
    assert_same(actual.loss, expected.loss)
    for x, y in zip(gradients(actual.loss, b), gradients(expected.loss, a), strict=True):
        assert_same(x, y)


def test_weight_grad_buffer():
    batch, objective = make_batch(), Objective.grpo()
    a, b = batch.leaves(), batch.leaves()
    expected = gradients(from_hidden(batch, a, objective=objective).loss, a)
    buffer = torch.ones(V, H, dtype=torch.float64)
    out = from_hidden(
        batch, b, objective=objective, weight_grad_buffer=buffer, workspace_bytes=3 * ROW_BYTES
    )
    out.loss.backward()
    assert_same(buffer, 1 + expected[1])
    assert b[1].grad is None
    assert_same(b[0].grad, expected[0])
    out = from_hidden(batch, batch.leaves(), objective=objective, weight_grad_buffer=buffer)
    with pytest.raises(ValueError, match="upstream gradient of 1"):
        (2 * out.loss).backward()


def test_second_backward_is_right_or_raises():
    batch = make_batch()
    leaves = batch.leaves()
    out = from_hidden(batch, leaves, objective=Objective.grpo())
    first = torch.autograd.grad(out.loss, leaves, retain_graph=True)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(3 * out.loss, leaves, retain_graph=True)
    for x, y, z in zip(first, kept, second, strict=True):
        assert torch.equal(x, y)
        assert_same(z, 3 * y)
    out = from_hidden(batch, leaves, objective=Objective.grpo())
    torch.autograd.grad(3 * out.loss, leaves, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.loss, leaves)


def test_double_backward_raises():
    batch = make_batch()
    leaves = batch.leaves()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(from_hidden(batch, leaves).loss, leaves, create_graph=True)


def test_module():
    batch = make_batch()
    objective = Objective.dapo(beta=0.1)
    module = LinearGRPOLoss(objective, temperature=0.7, logit_softcap=5.0)
    out = module(
        batch.hidden, batch.weight, batch.token_ids, batch.advantage, batch.mask, bias=batch.bias, **batch.options()
    )  # fmt: skip
    expected = from_hidden(
        batch, batch[:3], objective=objective, temperature=0.7, logit_softcap=5.0
    )
    assert torch.equal(out.loss, expected.loss)
    assert not out.loss.requires_grad
    assert not list(module.parameters())
