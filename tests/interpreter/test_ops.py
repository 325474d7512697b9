"""The public functions with CPU tensors sent to the launchers: argument order, autograd, and what serves what."""

import pytest
import torch
from interpreter_helpers import accumulate, assert_close
from torch import Tensor

import fastgrpo
from fastgrpo.kernels import surrogates
from fastgrpo.objective import Objective
from fastgrpo.testing import make_inputs


def _gold(logits: Tensor, inputs, epsilon: float, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 3 of DeepSeekMath written down with autograd: loss, log-prob, entropy."""
    log_p = logits.log_softmax(-1)
    logprob = log_p.gather(-1, inputs.token_ids[..., None])[..., 0]
    ratio = (logprob - inputs.old_logprob.double()).exp()
    advantage = inputs.advantage.double()[:, None]
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage)
    delta = inputs.ref_logprob.double() - logprob
    token_loss = torch.where(inputs.mask, beta * (delta.exp() - 1 - delta) - surrogate, 0.0)
    loss = (token_loss.sum(1) / inputs.mask.sum(1)).mean()
    return loss, torch.where(inputs.mask, logprob, 0.0), -(log_p.exp() * log_p).sum(-1)


@pytest.fixture
def inputs():
    return make_inputs(2, 5, 40)


def test_triton_serves_cpu_tensors():
    served = fastgrpo.backend_report().ops
    for op in (
        "token_logprob_fwd",
        "token_logprob_bwd",
        "policy_loss",
        "grpo_loss",
        "kl_estimate",
        "scale_gradient_",
    ):
        assert served[op]["cpu"].name == "Triton interpreter", op


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_grpo_loss(inputs, dtype):
    logits = inputs.logits.to(dtype).requires_grad_()
    gold_logits = logits.detach().double().requires_grad_()
    acc = accumulate(dtype)
    arguments = {
        k: v.to(acc) if v.is_floating_point() else v for k, v in inputs.loss_arguments().items()
    }
    result = fastgrpo.grpo_loss(
        logits, inputs.token_ids, objective=Objective.grpo(beta=0.04), **arguments
    )
    (3 * result.loss).backward()
    loss, logprob, _ = _gold(gold_logits, inputs, 0.2, 0.04)
    (3 * loss).backward()
    tolerance = 1e-5 if acc == torch.float32 else 1e-12
    assert_close(result.loss.detach(), loss.detach(), tolerance)
    assert_close(result.logprob, logprob.detach(), tolerance)
    assert_close(logits.grad, gold_logits.grad, tolerance, rtol=2 * torch.finfo(dtype).eps)


def test_token_logprob_then_policy_loss(inputs):
    logits = inputs.logits.clone().requires_grad_()
    gold_logits = inputs.logits.double().requires_grad_()
    logprob, entropy = fastgrpo.token_logprob(
        logits, inputs.token_ids, mask=inputs.mask, with_entropy=True
    )
    result = fastgrpo.policy_loss(
        logprob, objective=Objective.grpo(beta=0.04), **inputs.loss_arguments()
    )
    (result.loss + 0.1 * entropy.sum()).backward()
    loss, _, gold_entropy = _gold(gold_logits, inputs, 0.2, 0.04)
    (loss + 0.1 * torch.where(inputs.mask, gold_entropy, 0.0).sum()).backward()
    assert_close(result.loss.detach(), loss.detach(), 1e-5)
    assert_close(logits.grad, gold_logits.grad, 1e-5)


def test_kl_estimate(inputs):
    logprob = inputs.old_logprob.clone().requires_grad_()
    fastgrpo.kl_estimate(logprob, inputs.ref_logprob).sum().backward()
    delta = (inputs.ref_logprob - inputs.old_logprob).double()
    assert_close(logprob.grad, -torch.expm1(delta), 1e-6)


def test_a_registered_function_agrees_with_its_expression(monkeypatch):
    from test_grpo_loss import _smooth_absolute, _smooth_absolute_expression

    monkeypatch.setitem(surrogates.SURROGATES, "smooth", _smooth_absolute)
    log_ratio, advantage = torch.randn(300), torch.randn(300)
    got = surrogates.evaluate("smooth", log_ratio, advantage, torch.zeros(8))
    want = _smooth_absolute_expression(log_ratio, advantage, None)
    torch.testing.assert_close(got, want)
