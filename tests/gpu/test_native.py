"""Every op on a real GPU against float64; the same file rehearses on a CPU through Triton's interpreter.

pytest tests/gpu                                          on a machine with an NVIDIA GPU
FASTGRPO_REHEARSE=1 FASTGRPO_BACKEND=triton TRITON_INTERPRET=1 pytest tests/gpu       without one, at small sizes
"""

import pytest
import torch

from fastgrpo import Objective, group_advantage, grpo_loss, kl_estimate, policy_loss, token_logprob
from fastgrpo.linear_losses import linear_grpo_loss
from fastgrpo.testing import assert_matches_reference, logprob_tolerance, make_inputs
from tests.gpu.common import DEVICE, REHEARSAL, double, leaf, needs_device, on_device

pytestmark = needs_device

# 1 and 31: smaller than a tile; 1001: unaligned; 1024: whole tiles; 50,257: odd and real; 151,936: common.
VOCABULARIES = (1, 31, 1001) if REHEARSAL else (1, 31, 1001, 1024, 50_257, 151_936)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BATCH, LENGTH = (2, 2) if REHEARSAL else (8, 64)
SOME_V = 129 if REHEARSAL else 1001  # odd: unaligned rows
# One preset per code path: levels, pooled gradients, surrogates, gates, reductions.
PRESETS = ("grpo", "gspo", "gspo_token", "cispo", "sapo", "vespo", "gmpo", "dppo_tv", "rloo", "topr")  # fmt: skip
# The interpreter has run every combination in tests/interpreter: the rehearsal takes each value once.
EVERY = [(v, d, t) for v in VOCABULARIES for d in DTYPES for t in (1.0, 0.7)]
ONCE = [(1, torch.float32, 0.7), (31, torch.float16, 1.0), (1001, torch.bfloat16, 0.7)]


@pytest.mark.parametrize(("vocabulary", "dtype", "temperature"), ONCE if REHEARSAL else EVERY)
def test_token_logprob(vocabulary, dtype, temperature):
    x = make_inputs(BATCH, LENGTH, vocabulary, dtype, scale=5.0)
    logits, wide = leaf(x.logits), x.logits.double().requires_grad_()
    options = {"temperature": temperature, "with_entropy": True}
    out = token_logprob(logits, x.token_ids.to(DEVICE), mask=x.mask.to(DEVICE), **options)
    want = token_logprob(wide, x.token_ids, mask=x.mask, **options)
    atol = logprob_tolerance(x.logits, temperature)
    assert_matches_reference(out.logprob, want.logprob, atol=atol)
    assert_matches_reference(out.entropy, want.entropy, atol=8 * atol)
    (out.logprob.sum() + 0.1 * out.entropy.sum()).backward()
    (want.logprob.sum() + 0.1 * want.entropy.sum()).backward()
    assert_matches_reference(logits.grad, wide.grad, atol=8 * atol / temperature)


@pytest.mark.parametrize("logit_softcap", [None, 30.0])
@pytest.mark.parametrize("overwrite", [False, True])
def test_in_place_strided_and_softcapped(overwrite, logit_softcap):
    x = make_inputs(BATCH, LENGTH, SOME_V, torch.bfloat16)
    store = torch.full((BATCH, LENGTH, SOME_V + 3), 1e4, dtype=torch.bfloat16, device=DEVICE)
    logits = store[..., :SOME_V].copy_(x.logits).detach().requires_grad_()
    wide = x.logits.double().requires_grad_()
    temperature = 0.5 + torch.rand(BATCH, LENGTH)  # one per token
    out = token_logprob(
        logits, x.token_ids.to(DEVICE), temperature=temperature.to(DEVICE), logit_softcap=logit_softcap,
        overwrite_logits=overwrite,
    )  # fmt: skip
    want = token_logprob(
        wide, x.token_ids, temperature=temperature.double(), logit_softcap=logit_softcap
    )
    atol = logprob_tolerance(x.logits, 0.5)
    assert_matches_reference(out.logprob, want.logprob, atol=atol)
    out.logprob.sum().backward()
    want.logprob.sum().backward()
    assert_matches_reference(logits.grad, wide.grad, atol=16 * atol)
    assert bool((store[..., SOME_V:] == 1e4).all()), "wrote beyond the end of a row"


@pytest.mark.parametrize("beta", [0.04] if REHEARSAL else [0.0, 0.04])
@pytest.mark.parametrize("preset", PRESETS)
def test_losses_of_every_shape_of_objective(preset, beta):
    x = make_inputs(BATCH, LENGTH, 31 if REHEARSAL else SOME_V, torch.float32)
    objective = getattr(Objective, preset)()
    objective = objective.replace(kl=type(objective.kl)(beta=beta))
    arguments, gold = on_device(x.loss_arguments()), double(x.loss_arguments())
    logits, wide = leaf(x.logits), x.logits.double().requires_grad_()
    got = grpo_loss(logits, x.token_ids.to(DEVICE), **arguments, objective=objective)
    want = grpo_loss(wide, x.token_ids, **gold, objective=objective)
    assert_matches_reference(got.loss, want.loss, atol=1e-5)
    assert_matches_reference(got.token_loss, want.token_loss, atol=1e-4, rtol=1e-4)
    got.loss.backward()
    want.loss.backward()
    largest = float(wide.grad.abs().max())
    assert_matches_reference(logits.grad, wide.grad, atol=1e-4 * largest, rtol=1e-4)

    two_step = policy_loss(leaf(got.logprob), **arguments, objective=objective)
    assert_matches_reference(two_step.loss, want.loss, atol=1e-5)
    live = want.metrics.data[:, 1]
    assert_matches_reference(two_step.metrics.data[:, 1], live, atol=0.0)


@pytest.mark.parametrize("precision", ["float32", "input"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
def test_linear_loss(precision, frozen):
    """bf16 products against float64 of the same tensors: 2^-8 per rounding of a gradient, 0.1 for rounded logits."""
    hidden_size = 16 if REHEARSAL else 896
    x = make_inputs(BATCH, LENGTH, 31 if REHEARSAL else SOME_V)
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(BATCH, LENGTH, hidden_size, generator=g).bfloat16()
    weight = (
        torch.randn(x.logits.shape[-1], hidden_size, generator=g) * 3 / hidden_size**0.5
    ).bfloat16()
    logprob = (
        (hidden.float() @ weight.float().T)
        .log_softmax(-1)
        .gather(-1, x.token_ids[..., None])[..., 0]
    )
    sides = x.loss_arguments() | {"old_logprob": logprob, "ref_logprob": logprob - 0.1}
    sides["advantage"][0] = 0.0  # a row without gradient and, without KL, without its products
    wide = [t.double().requires_grad_() for t in (hidden, weight)]
    want = grpo_loss(wide[0] @ wide[1].T, x.token_ids, **double(sides))
    want.loss.backward()
    head = weight.to(DEVICE, copy=True) if frozen else leaf(weight)
    got_hidden = leaf(hidden)
    got = linear_grpo_loss(
        got_hidden, head, x.token_ids.to(DEVICE), **on_device(sides), logits_precision=precision
    )
    got.loss.backward()
    assert_matches_reference(
        got.logprob, want.logprob, atol=2e-5 if precision == "float32" else 0.1
    )
    for mine, gold in zip((got_hidden, head), wide, strict=True):
        if mine.requires_grad:
            norm = torch.linalg.vector_norm
            error = norm(mine.grad.double().cpu() - gold.grad) / norm(gold.grad)
            assert float(error) < (0.02 if precision == "float32" else 0.05)


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
    x = make_inputs(BATCH, LENGTH, SOME_V, torch.bfloat16)

    def run(poison):
        logits, ids, args = x.logits.clone(), x.token_ids.clone(), x.loss_arguments()
        if poison:
            logits[~x.mask] = float("nan")
            ids[~x.mask] = -100
            for name in ("old_logprob", "ref_logprob"):
                args[name] = torch.where(x.mask, args[name], float("inf"))
        logits = leaf(logits)
        objective = Objective.grpo(beta=0.04)
        out = grpo_loss(logits, ids.to(DEVICE), **on_device(args), objective=objective)
        out.loss.backward()
        return out.loss, out.token_loss, logits.grad

    for clean, poisoned in zip(run(False), run(True), strict=True):
        assert torch.equal(clean, poisoned)


def test_faults_stay_in_their_row():
    """A NaN logit and a bad token id: NaN for those tokens, the gradients of all others unchanged."""
    x = make_inputs(1, 4, SOME_V)
    mask = torch.ones(1, 4, dtype=torch.bool, device=DEVICE)

    def run(fault):
        logits, ids = x.logits.clone(), x.token_ids.clone()
        if fault:
            logits[0, 1, 5] = float("nan")
            ids[0, 2] = SOME_V
        logits = leaf(logits)
        out = token_logprob(logits, ids.to(DEVICE), mask=mask)
        out.logprob.sum().backward()
        return out.logprob.detach(), logits.grad

    (clean, clean_grad), (faulty, faulty_grad) = run(False), run(True)
    assert faulty[0].isnan().tolist() == [False, True, True, False]
    for row in (0, 3):
        assert torch.equal(clean[0, row], faulty[0, row])
        assert torch.equal(clean_grad[0, row], faulty_grad[0, row])


def test_repeats_bit_for_bit():
    x = make_inputs(BATCH, LENGTH, SOME_V, torch.bfloat16)
    args = on_device(x.loss_arguments())
    runs = []
    for _ in range(2 if REHEARSAL else 100):
        logits = leaf(x.logits)
        out = grpo_loss(logits, x.token_ids.to(DEVICE), **args, objective=Objective.gspo())
        out.loss.backward()
        runs.append((out.loss.detach(), logits.grad))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
