"""Failure catalogue N30: second backwards, shared logits, hooks, overwriting. Right, or autograd's error."""

import pytest
import torch

from fastgrpo.testing import assert_matches_reference
from tests.ops.graphs import DATA, NAMES, ONE_PASS, OVERWRITERS, B, T, V, gradient, leaf, scalar


# 1. A second backward without retain_graph is refused.
@pytest.mark.parametrize("name", NAMES)
def test_N30_second_backward_without_retained_graph(name):
    loss = scalar(name, leaf())
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


# 2. With retain_graph every further backward is right, and earlier results stay what they were; or it raises.
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factors", [(1.0, 1.0, 1.0), (1.0, 2.0, 3.0), (0.5, 1.0, 2.0)], ids=str)
def test_N30_retained_graph(name, factors):
    expected = gradient(name).double()
    logits = leaf()
    loss = scalar(name, logits)
    held = []
    for factor in factors:
        try:
            held.append(torch.autograd.grad(factor * loss, logits, retain_graph=True)[0])
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)  # noqa: PT017
            assert name == ONE_PASS, "only the one-pass loss scales what it stored"
            assert factors[0] != 1.0
            break
    for factor, grad in zip(factors, held, strict=False):
        assert_matches_reference(grad, factor * expected, atol=1e-9, rtol=1e-6)


def test_N30_accumulating_into_a_leaf_twice():
    for name in NAMES:
        logits = leaf()
        loss = scalar(name, logits)
        loss.backward(retain_graph=True)
        loss.backward()
        assert_matches_reference(logits.grad, 2 * gradient(name).double(), atol=1e-9, rtol=1e-6)


# 3. Two losses that share the logits, in both orders and in one backward.
@pytest.mark.parametrize("name", NAMES)
def test_N30_two_losses_on_one_logits(name):
    def regulariser(logits):
        return 1e-2 * torch.logsumexp(logits, -1).square().sum()

    expected = gradient(name).double()
    logits = leaf()
    expected = expected + torch.autograd.grad(regulariser(logits), logits)[0].double()
    for order in (1, -1):
        logits = leaf()
        terms = [scalar(name, logits), regulariser(logits)][::order]
        (terms[0] + terms[1]).backward()
        assert_matches_reference(logits.grad, expected, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("name", OVERWRITERS)
def test_N30_overwriting_logits_that_another_loss_saved(name):
    logits = leaf()
    other = torch.logsumexp(logits, -1).sum()
    loss = scalar(name, logits, overwrite_logits=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()


@pytest.mark.parametrize("name", OVERWRITERS)
def test_N30_two_overwriting_losses(name):
    logits = leaf()
    first = scalar("token_logprob", logits)
    second = scalar(name, logits, overwrite_logits=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (first + second).backward()


# 4. The producer of the logits saved its output (tanh): right, or the version error, never 57 % off.
@pytest.mark.parametrize("name", NAMES)
def test_N30_producer_that_saved_its_output(name):
    hidden = (DATA.logits / 4).requires_grad_()
    logits = torch.tanh(hidden) * 1.0
    (expected,) = torch.autograd.grad(torch.tanh(hidden), hidden, gradient_of_tanh_input(name))
    scalar(name, logits).backward()
    assert_matches_reference(hidden.grad, expected, atol=1e-7, rtol=1e-6)


def gradient_of_tanh_input(name):
    logits = torch.tanh(DATA.logits / 4).requires_grad_()
    return torch.autograd.grad(scalar(name, logits), logits)[0]


@pytest.mark.parametrize("name", OVERWRITERS)
def test_N30_overwriting_a_saved_output(name):
    hidden = leaf()
    loss = scalar(name, torch.tanh(hidden), overwrite_logits=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# 5. Hooks see the gradient and may replace it.
@pytest.mark.parametrize("name", NAMES)
def test_N30_hooks(name):
    expected = gradient(name)
    logits = leaf()
    seen, after = [], []
    logits.register_hook(lambda grad: (seen.append(grad.clone()), grad * 3)[1])
    logits.register_post_accumulate_grad_hook(lambda value: after.append(value.grad.clone()))
    scalar(name, logits).backward()
    assert torch.equal(seen[0], expected)
    assert torch.equal(after[0], expected * 3)


# 6. Overwriting: on leaves, views of leaves and intermediates; the version moves and no second buffer is made.
@pytest.mark.parametrize("name", OVERWRITERS)
@pytest.mark.parametrize("kind", ["leaf", "view of a leaf", "part of a leaf", "intermediate"])
def test_N30_overwrite_is_right_and_counted(name, kind):
    expected = gradient(name)
    base = DATA.logits.clone()
    if kind == "part of a leaf":
        base = torch.cat([base, base])
    base.requires_grad_()
    logits = {
        "leaf": lambda: base,
        "view of a leaf": lambda: base.view(B * T, V).view(B, T, V),
        "part of a leaf": lambda: base[:B],
        "intermediate": lambda: base + 0.0,
    }[kind]()
    version = logits._version
    scalar(name, logits, overwrite_logits=True).backward()
    grad = base.grad[:B] if kind == "part of a leaf" else base.grad
    assert torch.equal(grad, expected)
    assert logits._version > version
    if kind == "leaf":
        assert base.grad.data_ptr() == base.data_ptr(), (
            "the gradient lives in the memory of the logits"
        )


@pytest.mark.parametrize("name", OVERWRITERS)
def test_N30_overwrite_then_second_backward(name):
    logits = leaf()
    loss = scalar(name, logits + 0.0, overwrite_logits=True)
    first = torch.autograd.grad(0.5 * loss, logits, retain_graph=True)[0].clone()
    assert_matches_reference(first, 0.5 * gradient(name).double(), atol=1e-9, rtol=1e-6)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, logits)


# 7. Inputs changed between forward and backward.
@pytest.mark.parametrize("name", ["token_logprob", "entropy"])
def test_N30_logits_changed_before_backward(name):
    logits = DATA.logits.clone().requires_grad_() + 0.0
    loss = scalar(name, logits)
    with torch.no_grad():
        logits.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_N30_one_pass_does_not_need_the_logits_again():
    base = leaf()
    logits = base + 0.0
    loss = scalar(ONE_PASS, logits)
    with torch.no_grad():
        logits.add_(1.0)
    loss.backward()
    assert torch.equal(base.grad, gradient(ONE_PASS))
