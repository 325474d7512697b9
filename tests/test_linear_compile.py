"""torch.compile: one graph, few compiles over changing sizes and numbers, and the same results as eager."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from fastgrpo import linear_grpo_loss, linear_token_logprob, plan_rows
from fastgrpo.functional.linear import opaque
from tests.linear_cases import OBJECTIVES, B, H, T, V, make_batch


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def assert_same(compiled, eager):
    for x, y in zip(compiled, eager, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("capacity", [None, B * T])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_token_logprob_in_one_graph(with_entropy, capacity):
    batch = make_batch()

    def step(hidden, weight, bias):
        out = linear_token_logprob(
            hidden * 1.0, weight, batch.token_ids, bias=bias, mask=batch.mask, with_entropy=with_entropy,
            temperature=0.7, capacity=capacity,
        )  # fmt: skip
        total = (out.logprob * batch.old_logprob).sum()
        return total if out.entropy is None else total + out.entropy.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    outcomes = []
    for run in (compiled, step):
        leaves = batch.leaves()
        value = run(*leaves)
        outcomes.append([value, *torch.autograd.grad(value, leaves)])
    assert_same(*outcomes)


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("name", ["grpo", "gspo, kl", "entropy bonus"])
def test_loss_in_one_graph(name, planned):
    batch, objective = make_batch(), OBJECTIVES[name]
    plan = plan_rows(batch.mask, batch.advantage, objective=objective) if planned else None

    def step(hidden, weight, bias):
        out = linear_grpo_loss(
            hidden * 1.0, weight, batch.token_ids, batch.advantage, batch.mask, bias=bias, plan=plan,
            objective=objective, **batch.options(),
        )  # fmt: skip
        return 2 * out.loss, out.logprob, out.metrics["kl"]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    outcomes = []
    for run in (compiled, step):
        leaves = batch.leaves()
        values = run(*leaves)
        outcomes.append([*values, *torch.autograd.grad(values[0], leaves)])
    assert_same(*outcomes)


def test_bfloat16_autocast_and_frozen_head():
    batch = make_batch(torch.float32)

    def step(hidden, weight):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return linear_grpo_loss(
                hidden, weight, batch.token_ids, batch.advantage, batch.mask, **batch.options()
            ).loss  # fmt: skip

    results = []
    for run in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
        hidden = batch.hidden.clone().requires_grad_()
        loss = run(hidden, batch.weight)
        results.append([loss, torch.autograd.grad(loss, hidden)[0]])
    assert_same(*results)


def test_few_compiles_over_lengths():
    """Dynamic batch and length: at most two compiles over 12 shapes."""
    counter = CompileCounterWithBackend("aot_eager")
    weight = torch.randn(V, H, requires_grad=True)

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def step(hidden, ids, advantage, mask, old):
        return linear_grpo_loss(hidden, weight, ids, advantage, mask, old_logprob=old).loss

    for length in range(3, 15):
        batch = 2 + length % 3
        hidden = torch.randn(batch, length, H, requires_grad=True)
        ids, mask = torch.randint(V, (batch, length)), torch.rand(batch, length) > 0.2
        loss = step(hidden, ids, torch.randn(batch), mask, -torch.rand(batch, length))
        loss.backward()
    assert counter.frame_count <= 2


def test_without_grad():
    counter = CompileCounter()
    batch = make_batch()
    compiled = torch.compile(
        lambda h: linear_token_logprob(h, batch.weight, batch.token_ids).logprob, backend=counter, fullgraph=True
    )  # fmt: skip
    with torch.no_grad():
        out = compiled(batch.hidden)
    assert torch.equal(
        out, linear_token_logprob(batch.hidden, batch.weight, batch.token_ids).logprob
    )


def test_what_tracing_lacks_runs_eagerly():
    """A caller's buffer: the graph breaks in front of the call."""
    batch = make_batch()
    buffers = [torch.zeros(V, H, dtype=torch.float64) for _ in range(2)]

    def step(weight, buffer):
        return linear_token_logprob(
            batch.hidden, weight, batch.token_ids, weight_grad_buffer=buffer
        ).logprob.sum()

    for run, buffer in zip((torch.compile(step, backend="eager"), step), buffers, strict=True):
        run(batch.weight.clone().requires_grad_(), buffer).backward()
    assert buffers[0].any()
    assert_same(*([b] for b in buffers))
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(step, backend="eager", fullgraph=True)(batch.weight, buffers[0])


@pytest.mark.parametrize("needs", [[True, True, True], [True, False, False]])
def test_opcheck(needs):
    batch = make_batch(torch.float32)
    hidden, ids, mask = batch.hidden.view(-1, H), batch.token_ids.view(-1), batch.mask.view(-1)
    one, absent = torch.ones(1), torch.empty(0)
    head = (hidden, batch.weight, batch.bias, ids)
    cut = (torch.float32, "auto", None, None)
    forward = (*head, mask, one, absent, True, *cut)
    torch.library.opcheck(opaque.token_logprob_fwd, forward)
    stats = opaque.token_logprob_fwd(*forward)
    backward = (*head, mask, one, absent, *stats, torch.ones(B * T), absent, needs, *cut)
    torch.library.opcheck(opaque.token_logprob_bwd, backward)
    objective = OBJECTIVES["grpo, kl"]
    weight = mask.float() / mask.sum()
    per_token = [
        torch.ones(B * T),
        mask,
        weight,
        *(p.reshape(-1) for p in batch.options().values()),
    ]
    per_token += [absent] * (10 - len(per_token))
    loss = (
        *head, one, absent, per_token, mask, None, None, torch.arange(B + 1, dtype=torch.int32) * T,
        torch.tensor(objective.params()), absent, objective.spec(), "", True, False, True, needs, *cut,
    )  # fmt: skip
    torch.library.opcheck(opaque.grpo_loss, loss)
