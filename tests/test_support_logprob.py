"""Log-probs over a replayed top-k / top-p support, from logits and from hidden states."""

import pytest
import torch

from fastgrpo.functional.support_logprob import linear_support_logprob, support_logprob


def _case(n=7, v=23, h=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, dtype=torch.float64, generator=g)
    weight = torch.randn(v, h, dtype=torch.float64, generator=g)
    sizes = torch.randint(1, 6, (n,), generator=g).tolist()
    sizes[0] = 1  # only the sampled token was kept
    kept = [torch.randperm(v, generator=g)[:k] for k in sizes]
    ids = torch.stack([row[int(torch.randint(len(row), (1,), generator=g))] for row in kept])
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    return hidden, weight, ids, kept, torch.cat(kept), offsets


def _plain(logits, ids, kept, temperature=1.0):
    """Mask everything that was not kept with -inf, then a plain log-softmax."""
    allowed = torch.zeros_like(logits, dtype=torch.bool)
    for row, tokens in enumerate(kept):
        allowed[row, tokens] = True
    x = torch.where(allowed, logits / temperature, -torch.inf)
    return x.log_softmax(-1).gather(1, ids[:, None])[:, 0]


def test_values_and_gradients_equal_a_masked_softmax():
    hidden, weight, ids, kept, flat, offsets = _case()
    hidden.requires_grad_()
    weight.requires_grad_()
    want = _plain(hidden @ weight.T, ids, kept, 0.7)
    upstream = torch.arange(1.0, 8.0, dtype=torch.float64)
    want_grads = torch.autograd.grad(want @ upstream, (hidden, weight))
    from_logits = support_logprob(hidden @ weight.T, ids, flat, offsets, temperature=0.7)
    from_hidden = linear_support_logprob(
        hidden, weight, ids, flat, offsets, temperature=0.7, rows_per_chunk=4
    )
    for got in (from_logits, from_hidden):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
        for a, b in zip(
            torch.autograd.grad(got @ upstream, (hidden, weight)), want_grads, strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
    assert from_logits[0] == 0.0


def test_gradcheck():
    hidden, weight, ids, _, flat, offsets = _case(n=3, v=7, h=2)
    logits = (hidden @ weight.T).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: support_logprob(z, ids, flat, offsets, logit_scale=1.3, logit_softcap=4.0),
        (logits,),
    )


def test_confident_tokens_keep_a_gradient():
    logits = torch.tensor([[80.0, 0.0, 0.0]], requires_grad=True)
    got = support_logprob(logits, torch.tensor([0]), torch.tensor([0, 1]), torch.tensor([0, 2]))
    got.sum().backward()
    assert -1e-30 < float(got.detach()) < 0
    assert float(logits.grad[0, 1]) < 0
    assert float(logits.grad[0, 2]) == 0.0  # was not kept


def test_faults_and_masks_stay_in_their_row():
    logits = torch.randn(4, 9, requires_grad=True)
    ids = torch.tensor([0, 1, 2, 3])
    kept, offsets = torch.tensor([0, 4, 5, 6, 99]), torch.tensor([0, 2, 4, 5, 5])
    mask = torch.tensor([True, True, True, False])
    got = support_logprob(logits, ids, kept, offsets, mask=mask)
    assert got[0].isfinite()
    assert got[1:3].isnan().all()  # their tokens were not kept
    assert got[3] == 0.0  # masked, with an empty support
    got[0].backward()
    assert not logits.grad[1:].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"support_offsets": torch.tensor([0, 2])}, r"support_offsets must have shape \(8,\)"),
        (
            {"support_offsets": torch.arange(8)},
            r"support_offsets must rise from 0 to the number of support_ids",
        ),
        ({"support_ids": torch.zeros(3)}, r"support_ids must be an integer tensor.*float32"),
        ({"temperature": 0.0}, "temperature must be > 0"),
    ],
)
def test_bad_arguments_are_named(change, message):
    hidden, weight, ids, _, flat, offsets = _case()
    arguments = {"support_ids": flat, "support_offsets": offsets} | change
    with pytest.raises((TypeError, ValueError), match=message):
        support_logprob(hidden @ weight.T, ids, **arguments)
