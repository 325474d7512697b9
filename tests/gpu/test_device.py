"""What only a real GPU can show: no hidden synchronisation, graph capture, offsets beyond 32 bits, memory, launches."""

import pytest
import torch

from fastgrpo import (
    Objective,
    global_normalizer,
    group_advantage,
    grpo_loss,
    policy_loss,
    token_logprob,
)
from fastgrpo.linear_losses import linear_grpo_loss
from fastgrpo.reference import token_logprob_fwd
from fastgrpo.row_plan import plan_rows
from fastgrpo.testing import assert_matches_reference, logprob_tolerance, make_inputs
from tests.gpu.common import DEVICE, double, on_device, real_gpu

pytestmark = real_gpu


def _step(vocabulary=32_000, batch=8, length=64):
    """A whole step from logits to their gradient, without arguments."""
    x = make_inputs(batch, length, vocabulary, torch.bfloat16, device=DEVICE)
    objective = Objective.dapo(beta=0.04)
    total = global_normalizer(x.mask, objective)
    logits = x.logits.clone().requires_grad_()

    def step():
        logits.grad = None
        sides = x.loss_arguments()
        out = grpo_loss(logits, x.token_ids, **sides, objective=objective, normalizer=total)
        out.loss.backward()
        return out.loss

    return step


def test_no_hidden_sync_and_capturable():
    step = _step()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            eager = step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, eager)


def test_linear_loss_with_a_plan_does_not_sync():
    x = make_inputs(8, 64, 1024)
    hidden = torch.randn(8, 64, 256, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(1024, 256, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    objective = Objective.dapo()
    plan = plan_rows(x.mask, x.advantage, objective=objective).to(DEVICE)
    sides, ids = on_device(x.loss_arguments()), x.token_ids.to(DEVICE)
    total = global_normalizer(sides["mask"], objective)

    def step():
        out = linear_grpo_loss(
            hidden, weight, ids, **sides, objective=objective, normalizer=total, plan=plan
        )
        out.loss.backward()

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("name", "most"), [("group_advantage", 2), ("policy_loss", 3), ("token_logprob", 1)]
)
def test_number_of_kernels(name, most):
    """The small ops are bound by launches: their kernels are counted, without PyTorch's own."""
    x = make_inputs(64, 64, 1024, torch.bfloat16, device=DEVICE)
    reward = torch.rand(512, device=DEVICE)
    with torch.no_grad():
        logprob = token_logprob(x.logits, x.token_ids).logprob
        total = global_normalizer(x.mask, Objective.dapo())
        calls = {
            "group_advantage": lambda: group_advantage(reward, group_size=8),
            "policy_loss": lambda: policy_loss(
                logprob, **x.loss_arguments(), objective=Objective.dapo(), normalizer=total
            ),
            "token_logprob": lambda: token_logprob(x.logits, x.token_ids, with_entropy=True),
        }
        calls[name]()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            calls[name]()
            torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    ours = [kernel for kernel in kernels if "at::native" not in kernel and "Mem" not in kernel]
    assert len(ours) <= most, kernels


def test_in_place_gradient_takes_no_second_logits():
    x = make_inputs(8, 64, 32_000, torch.bfloat16, device=DEVICE)
    logits = x.logits.clone().requires_grad_()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = grpo_loss(logits, x.token_ids, **x.loss_arguments(), overwrite_logits=True)
    out.loss.backward()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 0.1 * logits.numel() * logits.element_size()


def test_more_than_two_to_the_31_elements():
    """14,200 rows of 151,936 bf16 logits: the last row lies beyond a 32-bit offset."""
    rows, vocabulary = 14_200, 151_936
    logits = torch.randn(rows, vocabulary, device=DEVICE, dtype=torch.bfloat16)
    ids = torch.randint(0, vocabulary, (rows,), device=DEVICE)
    got = token_logprob(logits, ids).logprob[-1:]
    empty = torch.empty(0, dtype=torch.float64)
    want, _, _ = token_logprob_fwd(
        logits[-1:].double().cpu(), ids[-1:].cpu(), empty.bool(), empty.new_ones(1), empty, False
    )
    assert_matches_reference(got, want, atol=logprob_tolerance(logits[-1:]))


def test_a_sequence_longer_than_the_second_grid_axis():
    x = make_inputs(1, 70_000, 64, torch.bfloat16)
    got = grpo_loss(x.logits.to(DEVICE), x.token_ids.to(DEVICE), **on_device(x.loss_arguments()))
    want = grpo_loss(x.logits.double(), x.token_ids, **double(x.loss_arguments()))
    assert_matches_reference(got.loss, want.loss, atol=1e-5)


def test_compiles_without_a_graph_break():
    x = make_inputs(4, 16, 1024, torch.bfloat16, device=DEVICE)

    @torch.compile(fullgraph=True)
    def scored(logits):
        return token_logprob(logits * 1.0, x.token_ids, with_entropy=True).logprob.sum()

    logits = x.logits.clone().requires_grad_()
    scored(logits).backward()
    eager = x.logits.clone().requires_grad_()
    token_logprob(eager, x.token_ids).logprob.sum().backward()
    assert_matches_reference(logits.grad, eager.grad.double(), atol=1e-3)
