"""Failure catalogue N31, N32 and N40: second derivatives, torch.func, checkpointing, no gradient, odd upstreams."""

import gc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastgrpo import Objective, group_advantage, grpo_loss, policy_loss, token_logprob
from fastgrpo.testing import assert_matches_reference
from tests.ops.common import INF, NAN, bitwise_equal
from tests.ops.graphs import (
    ADVANTAGE,
    DATA,
    IDS,
    MASK,
    NAMES,
    ONE_PASS,
    B,
    T,
    gradient,
    leaf,
    scalar,
)


# 8. Second derivatives do not exist here: asking for them raises, before a gradient penalty could lose a term.
@pytest.mark.parametrize("name", [*NAMES, "group_advantage"])
@pytest.mark.parametrize("upstream", ["constant", "differentiable"])
def test_N31_create_graph_raises(name, upstream):
    logits = leaf()
    if name == "group_advantage":
        loss = group_advantage(logits[:, 0, 0], group_size=2).advantage[0]
    else:
        loss = scalar(name, logits)
    if upstream == "differentiable":
        loss = loss.square()
    with pytest.raises(
        RuntimeError, match="no second derivative; call backward without create_graph"
    ):
        torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        loss.backward(create_graph=True)


# 9. torch.func: what works is right, what does not raises (never a missing term).
def functional_transforms(function, x):
    """Each transform, and what it must give if it gives anything."""
    leaf_x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(leaf_x), leaf_x)
    direction = torch.ones_like(x)
    yield "grad", lambda: torch.func.grad(function)(x), grad
    yield "vjp", lambda: torch.func.vjp(function, x)[1](torch.ones(()))[0], grad
    yield "jacrev", lambda: torch.func.jacrev(function)(x), grad
    yield "jvp", lambda: torch.func.jvp(function, (x,), (direction,))[1], (grad * direction).sum()
    batch = torch.stack([x, x + 0.5])
    each = torch.stack([function(batch[0]), function(batch[1])])
    yield "vmap", lambda: torch.func.vmap(function)(batch), each
    yield "hessian", lambda: torch.func.hessian(function)(x), None


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", NAMES)
def test_N31_functional_transforms(name):
    def function(logits):
        return scalar(name, logits)

    outcome = {}
    for transform, call, expected in functional_transforms(function, DATA.logits):
        try:
            actual = call()
        except (RuntimeError, NotImplementedError) as error:
            outcome[transform] = str(error)
            continue
        assert expected is not None, f"{transform} must raise"
        assert_matches_reference(actual, expected.double(), atol=1e-6, rtol=1e-5)
        outcome[transform] = "right"
    for transform in ("grad", "vjp", "jacrev"):
        assert "no second derivative" in outcome[transform] or "functorch" in outcome[transform]
    assert outcome["jvp"] != "right", "there is no forward-mode formula"
    if name != ONE_PASS:
        assert outcome["vmap"] == "right"


def test_N31_forward_mode_tangent_of_a_constant_argument_raises():
    import torch.autograd.forward_ad as forward_ad

    with forward_ad.dual_level():
        advantage = forward_ad.make_dual(ADVANTAGE, torch.ones_like(ADVANTAGE))
        with pytest.raises(ValueError, match="advantage gets no gradient"):
            policy_loss(DATA.old_logprob, advantage, MASK)


# 10. Activation checkpointing recomputes to the same bits.
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_N32_checkpointing(name, reentrant):
    logits = leaf()
    checkpoint(lambda x: scalar(name, x), logits, use_reentrant=reentrant).backward()
    assert bitwise_equal(logits.grad, gradient(name))


class Launches(TorchDispatchMode):
    """Records every op of the package with its arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().startswith("fastgrpo::"):
            self.calls.append(
                (func.name().removeprefix("fastgrpo::").removesuffix(".default"), args)
            )
        return func(*args, **(kwargs or {}))


# 11. No gradient wanted (disabled, inference, frozen input): no gradient buffer, no backward op.
@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "frozen"])
def test_N32_no_gradient_work(mode):
    context = {
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "frozen": torch.enable_grad,
    }[mode]
    logits = DATA.logits.clone().requires_grad_(mode == "no_grad")
    with context(), Launches() as launches:
        one_pass = grpo_loss(logits, IDS, ADVANTAGE, MASK)
        two_step = token_logprob(logits, IDS)
        loss = policy_loss(two_step.logprob, ADVANTAGE, MASK).loss
    names = [name for name, _ in launches.calls]
    assert names == ["grpo_loss", "token_logprob_fwd", "policy_loss"]
    assert launches.calls[0][1][-1].numel() == 0, "a gradient buffer was passed to the op"
    assert not any(x.requires_grad for x in (one_pass.loss, two_step.logprob, loss))
    with torch.enable_grad():
        same = grpo_loss(leaf(), IDS, ADVANTAGE, MASK)
    assert bitwise_equal(one_pass.loss.clone(), same.loss.detach())


def test_N32_inference_tensors_do_not_poison_later_training():
    with torch.inference_mode():
        old = token_logprob(DATA.logits, IDS).logprob
    logits = leaf()
    grpo_loss(
        logits, IDS, ADVANTAGE, MASK, old_logprob=old, objective=Objective.gspo()
    ).loss.backward()
    assert bool(logits.grad.isfinite().all())


def test_N32_only_loss_carries_gradient_in_one_pass():
    out = grpo_loss(leaf(), IDS, ADVANTAGE, MASK)
    assert out.loss.requires_grad
    assert not any(x.requires_grad for x in (out.token_loss, out.logprob, out.entropy))


def test_no_reference_cycle_keeps_the_logits_alive():
    """A cycle would hold gigabytes until the collector runs."""
    import weakref

    gc.collect()
    gc.disable()
    try:
        for name in NAMES:
            logits = leaf()
            alive = weakref.ref(logits)
            scalar(name, logits).backward()
            del logits
            assert alive() is None, name
    finally:
        gc.enable()


# 12. Upstream gradients of every kind.
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factor", [0.0, -2.0, 1024.0, 1e-3])
def test_N40_scaled_upstream(name, factor):
    logits = leaf()
    (factor * scalar(name, logits)).backward()
    expected = factor * gradient(name).double()
    largest = float(
        expected.abs().max()
    )  # entries that cancel are as exact as those they are made of
    assert_matches_reference(logits.grad, expected, atol=2e-7 * largest, rtol=4e-7)
    if factor == 0:
        assert bool((logits.grad == 0).all())


@pytest.mark.parametrize("factor", [0.0, 3.0])
def test_N40_scaled_upstream_of_the_entropy_bonus(factor):
    """loss = policy - coefficient * mean over sequences of token means of the entropy."""
    entropy = torch.rand(B, T, requires_grad=True)
    mask = MASK.clone()
    mask[1, 2] = False
    objective = Objective(entropy_coef=0.25)
    out = policy_loss(DATA.old_logprob, ADVANTAGE, mask, entropy=entropy, objective=objective)
    (factor * out.loss).backward()
    expected = -0.25 * factor / B * mask / mask.sum(1, keepdim=True)
    assert_matches_reference(entropy.grad, expected.double(), atol=1e-8)
    both = policy_loss(
        DATA.old_logprob, ADVANTAGE, mask, entropy=entropy.detach(), objective=objective
    )
    assert float(out.loss.detach()) == float(both.loss)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factor", [NAN, INF])
def test_N40_bad_upstream_is_visible(name, factor):
    logits = leaf()
    (scalar(name, logits) * factor).backward()
    assert not bool(logits.grad.isfinite().all())


def test_N40_upstream_layouts_per_token():
    rows = torch.randn(B, T)
    for upstream in (
        rows,
        rows.t().contiguous().t(),
        torch.ones(()).expand(B, T),
        rows[:, :1].expand(B, T),
    ):
        logits, plain = leaf(), DATA.logits.double().requires_grad_()
        token_logprob(logits, IDS).logprob.backward(upstream)
        torch.log_softmax(plain, -1).gather(-1, IDS[..., None])[..., 0].backward(upstream.double())
        assert_matches_reference(logits.grad, plain.grad, atol=4e-6)


def test_N40_nan_upstream_stays_in_its_row_and_out_of_masked_rows():
    logits = leaf()
    mask = MASK.clone()
    mask[1, 0] = False
    upstream = torch.ones(B, T)
    upstream[0, 1] = upstream[1, 0] = NAN
    token_logprob(logits, IDS, mask=mask).logprob.backward(upstream)
    assert bool(logits.grad[0, 1].isnan().all())
    assert bool((logits.grad[1, 0] == 0).all()), "masked"
    others = torch.ones(B, T, dtype=torch.bool)
    others[0, 1] = others[1, 0] = False
    assert bool(logits.grad[others].isfinite().all())


def test_anomaly_mode_is_quiet_on_valid_input():
    with torch.autograd.detect_anomaly(check_nan=True):
        for name in NAMES:
            scalar(name, leaf()).backward()
