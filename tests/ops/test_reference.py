"""The eager reference, called directly, against torch's own softmax and autograd: it is what all kernels are held to.

`test_backends.py` runs the catalogue, every gradcheck and every printed loss formula on it as well.
"""

import pytest
import torch

from fastgrpo import reference
from fastgrpo.spec import Estimator, KLGrad
from fastgrpo.testing import assert_matches_reference
from tests.ops.common import NAN, OBJECTIVES, plain_logprob

N, V = 6, 9
EPS64 = torch.finfo(torch.float64).eps


def normal(*shape, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64) * scale


IDS = torch.arange(N) % V
ALL = torch.empty(0, dtype=torch.bool)
NOTHING = torch.empty(0, dtype=torch.float64)
PER_ROW = torch.linspace(0.3, 2.0, N, dtype=torch.float64)
LIVE = torch.tensor([True, True, False, True, False, True])


@pytest.mark.parametrize(
    "temperature", [torch.tensor([0.7]).double(), PER_ROW], ids=["scalar", "per row"]
)
@pytest.mark.parametrize(
    "numbers", [(), (0.6,), (1.0, 3.0), (0.6, 3.0)], ids=["plain", "scale", "cap", "scale+cap"]
)
@pytest.mark.parametrize("mask", [ALL, LIVE], ids=["all", "masked"])
@pytest.mark.parametrize("upstream", ["both", "logprob", "entropy"])
def test_token_logprob_and_gradient(temperature, numbers, mask, upstream):
    logits = normal(N, V, seed=1, scale=3.0).requires_grad_()
    params = torch.tensor(numbers, dtype=torch.float64)
    keep = mask if mask.numel() else torch.ones(N, dtype=torch.bool)
    scale, softcap = (*numbers, None, None)[:2]
    want = plain_logprob(logits, IDS, temperature.expand(N), scale or 1.0, softcap)
    want = [torch.where(keep, value, 0.0) for value in want]
    logprob, entropy, lse = reference.token_logprob_fwd(
        logits.detach(), IDS, mask, temperature, params, True
    )
    for actual, expected in zip((logprob, entropy), want, strict=True):
        assert_matches_reference(actual, expected, atol=100 * EPS64)

    dlogprob, dentropy = normal(N, seed=2), normal(N, seed=3)
    dlogprob[0] = dentropy[1] = 0.0  # rows where one of the two is absent
    dlogprob, dentropy = dlogprob.where(keep, 0.0), dentropy.where(keep, 0.0)
    (grad,) = torch.autograd.grad(
        [
            w
            for w, name in zip(want, ("logprob", "entropy"), strict=True)
            if upstream in ("both", name)
        ],
        logits,
        [
            g
            for g, name in ((dlogprob, "logprob"), (dentropy, "entropy"))
            if upstream in ("both", name)
        ],
    )
    dlogits = reference.token_logprob_bwd(
        logits.detach(), IDS, temperature, params, logprob, entropy, lse,
        dlogprob if upstream != "entropy" else NOTHING, dentropy if upstream != "logprob" else NOTHING,
    )  # fmt: skip
    assert_matches_reference(dlogits, grad, atol=1000 * EPS64)
    assert bool((dlogits[~keep] == 0).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_float32_reference_is_close_to_float64(dtype):
    """The reference serves float32 and below too (no compiler, no Triton): same algorithm, accumulated in float32."""
    logits = normal(N, V, seed=4, scale=3.0).to(dtype)
    one = torch.ones(1)
    low = reference.token_logprob_fwd(logits, IDS, ALL, one, torch.empty(0), True)
    high = reference.token_logprob_fwd(logits.double(), IDS, ALL, one.double(), NOTHING, True)
    for actual, expected in zip(low, high, strict=True):
        assert actual.dtype == torch.float32
        assert_matches_reference(actual, expected, atol=2e-6)


@pytest.mark.parametrize("estimator", [Estimator.K1, Estimator.K2, Estimator.K3, Estimator.ABS])
@pytest.mark.parametrize("gradient", [KLGrad.K2, KLGrad.RATIO_DETACHED])
def test_kl_with_detached_parts(estimator, gradient):
    """The two modes whose gradient is not the derivative of the value: by autograd with the part detached."""
    logprob = normal(N, seed=5).requires_grad_()
    ref, old = normal(N, seed=6), normal(N, seed=7)
    delta = ref - logprob
    value = {
        Estimator.K1: -delta,
        Estimator.K2: delta**2 / 2,
        Estimator.K3: torch.exp(delta) - 1 - delta,
        Estimator.ABS: delta.abs(),
    }[estimator]
    cap = 1.3
    if gradient == KLGrad.RATIO_DETACHED:
        value = torch.exp(logprob - old).clamp(max=cap).detach() * value
        expected = value
    else:
        square = delta**2 / 2
        expected = value.detach() + square - square.detach()
    (slope,) = torch.autograd.grad(expected.sum(), logprob)
    limits = torch.tensor([20.0, torch.inf, cap], dtype=torch.float64)
    actual = reference.kl_estimate(logprob.detach(), ref, old, limits, estimator, gradient)
    assert_matches_reference(actual[0], value, atol=1e-14)
    assert_matches_reference(actual[1], slope, atol=1e-14)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("scale", [None, 4.0])
def test_one_pass_is_the_composition_and_works_in_place(name, scale):
    objective = OBJECTIVES[name]
    logits = normal(N, V, seed=8, scale=2.0)
    cu_seqlens = torch.tensor([0, 2, 6], dtype=torch.int32)
    weight = torch.rand(N, dtype=torch.float64).where(LIVE, 0.0)
    side = normal(N, seed=9, scale=0.1)
    dead = side.masked_fill(~LIVE, NAN)
    head = (IDS, torch.tensor([0.7]).double(), NOTHING)
    logprob, entropy, lse = reference.token_logprob_fwd(logits, IDS, LIVE, *head[1:], True)
    sides = (logprob + dead, logprob - dead, logprob + 0.5 * dead, NOTHING, NOTHING, NOTHING)
    bonus = weight * objective.entropy_coef if objective.entropy_coef else NOTHING
    params = torch.tensor(objective.params(), dtype=torch.float64)
    codes = (objective.spec(), "")
    policy = reference.policy_loss(
        logprob, dead, LIVE, weight, *sides, entropy, bonus, cu_seqlens, params, *codes
    )
    factor = NOTHING if scale is None else torch.tensor([scale]).double()
    want = reference.token_logprob_bwd(
        logits,
        IDS,
        *head[1:],
        logprob,
        entropy,
        lse,
        policy[2] * (scale or 1.0),
        -bonus * (scale or 1.0),
    )
    for in_place in (False, True):
        memory = logits.clone()
        dlogits = memory if in_place else torch.full_like(logits, NAN)
        out = reference.grpo_loss(
            memory,
            *head,
            dead,
            LIVE,
            weight,
            *sides,
            bonus,
            cu_seqlens,
            params,
            factor,
            *codes,
            True,
            dlogits,
        )
        assert torch.equal(dlogits, want)
        assert torch.equal(out[0], policy[0])
        assert torch.equal(out[4], policy[2]), "dlogprob is returned unscaled"
        assert torch.equal(out[5], policy[3])
    assert bool((want[~LIVE] == 0).all())
