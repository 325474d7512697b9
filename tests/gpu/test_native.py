"""Every op on a real GPU against float64; the same file rehearses on a CPU through Triton's interpreter.

pytest tests/gpu                                          on a machine with an NVIDIA GPU
FASTGRPO_REHEARSE=1 FASTGRPO_BACKEND=triton TRITON_INTERPRET=1 pytest tests/gpu       without one, at small sizes
"""

import os

import pytest
import torch

from fastgrpo import (
    Objective,
    global_normalizer,
    group_advantage,
    grpo_loss,
    kl_estimate,
    policy_loss,
    token_logprob,
)
from fastgrpo.reference import token_logprob_fwd
from fastgrpo.testing import assert_matches_reference, logprob_tolerance, make_inputs

REHEARSAL = os.environ.get("FASTGRPO_REHEARSE") == "1"
DEVICE = "cpu" if REHEARSAL else "cuda"
HAS_GPU = torch.cuda.is_available()

pytestmark = pytest.mark.skipif(not (REHEARSAL or HAS_GPU), reason="no CUDA device")
real_gpu = pytest.mark.skipif(
    not HAS_GPU, reason="needs a real GPU: the interpreter cannot show it"
)

# 1 and 31: smaller than a tile; 1001: unaligned rows; 50,257: odd and real; 151,936: the largest common vocabulary.
VOCABULARIES = (1, 31, 1001) if REHEARSAL else (1, 31, 1001, 32_000, 50_257, 151_936)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BATCH, LENGTH = (2, 3) if REHEARSAL else (8, 64)
PRESETS = (
    "grpo",
    "gspo",
    "gspo_token",
    "cispo",
    "sapo",
    "vespo",
    "gmpo",
    "dppo_tv",
    "rloo",
    "topr",
)


def _double(inputs):
    """The same stored inputs in float64 on the CPU, where the reference serves."""
    return {
        name: x.double().cpu() if x.is_floating_point() else x.cpu() for name, x in inputs.items()
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprob(vocabulary, dtype, temperature):
    x = make_inputs(BATCH, LENGTH, vocabulary, dtype, scale=5.0)
    logits = x.logits.to(DEVICE).requires_grad_()
    out = token_logprob(
        logits,
        x.token_ids.to(DEVICE),
        temperature=temperature,
        mask=x.mask.to(DEVICE),
        with_entropy=True,
    )
    wide = x.logits.double().requires_grad_()
    want = token_logprob(wide, x.token_ids, temperature=temperature, mask=x.mask, with_entropy=True)
    atol = logprob_tolerance(x.logits, temperature)
    assert_matches_reference(out.logprob, want.logprob, atol=atol)
    assert_matches_reference(out.entropy, want.entropy, atol=8 * atol)
    (out.logprob.sum() + 0.1 * out.entropy.sum()).backward()
    (want.logprob.sum() + 0.1 * want.entropy.sum()).backward()
    assert_matches_reference(logits.grad, wide.grad, atol=8 * atol / temperature)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_losses_of_every_shape_of_objective(preset, beta):
    x = make_inputs(BATCH, LENGTH, VOCABULARIES[2], torch.float32)
    make = getattr(Objective, preset)
    objective = make()
    objective = objective.replace(kl=type(objective.kl)(beta=beta))
    on_device = {name: value.to(DEVICE) for name, value in x.loss_arguments().items()}
    logits = x.logits.to(DEVICE).requires_grad_()
    got = grpo_loss(logits, x.token_ids.to(DEVICE), **on_device, objective=objective)
    wide = x.logits.double().requires_grad_()
    want = grpo_loss(wide, x.token_ids, **_double(x.loss_arguments()), objective=objective)
    assert_matches_reference(got.loss, want.loss, atol=1e-5)
    assert_matches_reference(got.token_loss, want.token_loss, atol=1e-4, rtol=1e-4)
    got.loss.backward()
    want.loss.backward()
    largest = float(wide.grad.abs().max())
    assert_matches_reference(logits.grad, wide.grad, atol=1e-4 * largest, rtol=1e-4)

    logprob = got.logprob.clone().requires_grad_()
    two_step = policy_loss(logprob, **on_device, objective=objective)
    assert_matches_reference(two_step.loss, want.loss, atol=1e-5)
    assert_matches_reference(two_step.metrics.data[:, 1], want.metrics.data[:, 1], atol=0.0)


def test_kl_and_advantages():
    logprob = -torch.rand(BATCH, LENGTH)
    ref = logprob + 0.3 * torch.randn(BATCH, LENGTH)
    for estimator in ("k1", "k2", "k3", "abs"):
        got = kl_estimate(logprob.to(DEVICE), ref.to(DEVICE), estimator)
        want = kl_estimate(logprob.double(), ref.double(), estimator)
        assert_matches_reference(got, want, atol=2e-7)
    reward = torch.randint(0, 3, (BATCH * 8,)).float()
    got = group_advantage(reward.to(DEVICE), group_size=8)
    want = group_advantage(reward.double(), group_size=8)
    assert_matches_reference(got.advantage, want.advantage, atol=1e-6)
    assert torch.equal(got.is_degenerate.cpu(), want.is_degenerate)
    assert torch.equal(got.active_index.cpu(), want.active_index)


def test_garbage_in_masked_slots_changes_no_bit():
    x = make_inputs(BATCH, LENGTH, VOCABULARIES[2], torch.bfloat16)

    def run(poison):
        logits, ids, args = x.logits.clone(), x.token_ids.clone(), x.loss_arguments()
        if poison:
            logits[~x.mask] = float("nan")
            ids[~x.mask] = -100
            for name in ("old_logprob", "ref_logprob"):
                args[name] = torch.where(x.mask, args[name], float("inf"))
        logits = logits.to(DEVICE).requires_grad_()
        args = {name: value.to(DEVICE) for name, value in args.items()}
        out = grpo_loss(logits, ids.to(DEVICE), **args, objective=Objective.grpo(beta=0.04))
        out.loss.backward()
        return out.loss, out.token_loss, logits.grad

    for clean, poisoned in zip(run(False), run(True), strict=True):
        assert torch.equal(clean, poisoned)


def test_repeats_bit_for_bit():
    x = make_inputs(BATCH, LENGTH, VOCABULARIES[2], torch.bfloat16)
    args = {name: value.to(DEVICE) for name, value in x.loss_arguments().items()}
    runs = []
    for _ in range(3 if REHEARSAL else 100):
        logits = x.logits.to(DEVICE).requires_grad_()
        out = grpo_loss(logits, x.token_ids.to(DEVICE), **args, objective=Objective.gspo())
        out.loss.backward()
        runs.append((out.loss.detach(), logits.grad))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@real_gpu
def test_no_hidden_sync_and_capturable():
    x = make_inputs(BATCH, LENGTH, 32_000, torch.bfloat16, device=DEVICE)
    objective = Objective.dapo(beta=0.04)
    total = global_normalizer(x.mask, objective)
    logits = x.logits.clone().requires_grad_()

    def step():
        logits.grad = None
        out = grpo_loss(
            logits, x.token_ids, **x.loss_arguments(), objective=objective, normalizer=total
        )
        out.loss.backward()
        return out.loss

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


@real_gpu
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


@real_gpu
def test_a_sequence_longer_than_the_second_grid_axis():
    length = 70_000
    x = make_inputs(1, length, 64, torch.bfloat16)
    args = {name: value.to(DEVICE) for name, value in x.loss_arguments().items()}
    got = grpo_loss(x.logits.to(DEVICE), x.token_ids.to(DEVICE), **args)
    want = grpo_loss(x.logits.double(), x.token_ids, **_double(x.loss_arguments()))
    assert_matches_reference(got.loss, want.loss, atol=1e-5)
