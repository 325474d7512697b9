"""kl_estimate and scale_gradient_ in C++."""

import itertools

import pytest
import torch

from fastgrpo import reference
from fastgrpo.ops.kl_estimate import kl_estimate
from fastgrpo.ops.scale_gradient import scale_gradient_
from fastgrpo.spec import Estimator, KLGrad
from tests.cpu.inputs import DTYPES, INF, NAN, require_compiled

require_compiled("kl_estimate")

ESTIMATORS = [estimator for estimator in Estimator if estimator != Estimator.NONE]


# One rounding of the result in float32, a few of exp in float64.
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float32, 2e-7), (torch.float64, 1e-12)], ids=["f32", "f64"]
)
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: e.name)
def test_matches_float64(estimator, dtype, rtol):
    g = torch.Generator().manual_seed(int(estimator))
    for count, gradient, with_old, bounds in itertools.product(
        (0, 1, 7, 8, 9, 65), KLGrad, (False, True), ((INF, INF, INF), (0.4, 0.1, 1.1))
    ):
        logprob = (-torch.rand(count, generator=g, dtype=torch.float64) * 5).to(dtype)
        ref, old = (
            logprob + (0.5 * torch.randn(count, generator=g, dtype=torch.float64)).to(dtype)
            for _ in range(2)
        )
        if count == 65:
            logprob[:4] = torch.tensor([-INF, -INF, NAN, -400.0])
            ref[:2] = torch.tensor([-INF, -1.0])
            ref[9] = logprob[9]
        old = old if with_old else logprob.new_empty(0)
        params = torch.tensor(bounds, dtype=dtype)
        got = kl_estimate(logprob, ref, old, params, int(estimator), int(gradient))
        wide = (value.double() for value in (logprob, ref, old, params))
        want = reference.kl_estimate(*wide, int(estimator), int(gradient))
        for value, gold in zip(got, want, strict=True):
            assert value.dtype == dtype
            close = (value.double() - gold).abs() <= 1e-14 + rtol * gold.abs()
            same = (value.double() == gold) | (value.isnan() & gold.isnan()) | (gold.abs() > 1e38)
            assert bool((close | same).all()), (gradient, value, gold)


def test_refuses_what_it_does_not_know():
    one, params = torch.zeros(3), torch.ones(3)
    with pytest.raises(RuntimeError, match="got NONE"):
        kl_estimate(one, one, one, params, 0, 0)
    with pytest.raises(RuntimeError, match=r"\(gradient\) must be in 0..3"):
        kl_estimate(one, one, one, params, 1, 4)
    with pytest.raises(RuntimeError, match="ref must have 3 elements, got 2"):
        kl_estimate(one, one[:2], one, params, 1, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_gradient(dtype):
    gradient = torch.linspace(-2, 2, 1001).to(dtype)
    scale = torch.tensor([0.3], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    want = (gradient.to(scale.dtype) * scale).to(dtype)
    own = gradient.clone()
    scale_gradient_(own, scale)
    assert torch.equal(own, want)
    scale_gradient_(own, torch.ones_like(scale))
    assert torch.equal(own, want)
    scale_gradient_(own, torch.full_like(scale, NAN))
    assert bool(own.isnan().all())
