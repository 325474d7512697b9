"""Failure catalogue N22, continued: every limit of an objective is inclusive; surrogates registered by the user."""

import math

import pytest
import torch

from fastgrpo import Objective, policy_loss, register_surrogate
from fastgrpo.choices import KL, Correction, Gate
from fastgrpo.reference import SURROGATES
from fastgrpo.testing import assert_matches_reference, make_inputs
from tests.ops.common import INF, PATHS, assert_same_bits, score

STEP = 0.5  # a log-ratio that every dtype holds exactly, like its square and its half


def lower(x):
    return math.nextafter(x, -INF)


def gradient(objective, sign, **options):
    """Gradient and metrics of two tokens whose log-ratio is sign * STEP, in float64 so that limits are exact."""
    logprob = torch.full((1, 2), -2.0, dtype=torch.float64, requires_grad=True)
    side = logprob.detach() - sign * STEP
    out = policy_loss(
        logprob, torch.tensor([sign * 1.0], dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool),
        old_logprob=side, ref_logprob=side, objective=objective, **options,
    )  # fmt: skip
    out.loss.backward()
    return logprob.grad, out.metrics


def ends(sign, limit):
    """An interval that ends at the limit on the side of the sign, given as a magnitude."""
    return (-INF, limit) if sign > 0 else (-limit, INF)


# name -> objective whose limit is `limit` for a log-ratio of sign * STEP, and the metric that counts beyond it.
LIMITS = {
    "d_clamp": (lambda sign, limit: Objective(d_clamp=limit), "clamp_log_ratio"),
    "log_clip": (lambda sign, limit: Objective(log_clip=ends(sign, limit)), None),
    "pool_bounds mean": (lambda sign, limit: Objective(level="seq_mean", pool_bounds=ends(sign, limit)), None),
    "pool_bounds sum": (
        lambda sign, limit: Objective(level="seq_sum", pool_bounds=ends(sign, 2 * limit)),
        None,
    ),
    "gate": (
        lambda sign, limit: Objective(gates=(Gate(stat="k1", low=ends(sign, limit)[0], high=ends(sign, limit)[1]),)),
        "gate_closed",
    ),
    "gate sum": (
        lambda sign, limit: Objective(
            gates=(Gate(stat="k1", pool="seq_sum", low=ends(sign, 2 * limit)[0], high=ends(sign, 2 * limit)[1]),)
        ),
        "gate_closed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("sign", [1, -1])
def test_N22_limits_of_the_policy_term_are_inclusive(name, sign):
    build, counter = LIMITS[name]
    for limit, beyond in ((STEP, False), (lower(STEP), True)):
        grad, metrics = gradient(build(sign, limit), sign)
        assert bool((grad == 0).all()) is beyond, f"limit {limit}"
        if counter:
            assert float(metrics.sum(counter)) == (2 if beyond else 0)


# k2 of a difference of STEP is STEP^2 / 2; the policy term is taken out by an advantage of 0.
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("field", "limit"), [("clamp_in", STEP), ("clamp_out", STEP**2 / 2)])
def test_N22_kl_limits_are_inclusive(field, limit, sign):
    for bound, beyond in ((limit, False), (lower(limit), True)):
        kl = KL(beta=1.0, estimator="k2", **{field: bound})
        grad, metrics = gradient(
            Objective(kl=kl), sign, token_weight=torch.zeros(1, 2, dtype=torch.float64)
        )
        assert bool((grad == 0).all()) is beyond
        assert float(metrics.sum("clamp_kl")) == (2 if beyond else 0)


def test_N22_ratio_cap_and_correction_limits():
    """exp(0) = 1 exactly: a weight on its limit is kept, one beyond is masked."""
    for high, kept in ((1.0, True), (lower(1.0), False)):
        objective = Objective(correction=Correction(mode="mask", high=high))
        rollout = torch.full((1, 2), -2.0 - STEP, dtype=torch.float64)
        grad, _ = gradient(objective, 1, rollout_logprob=rollout)
        assert bool((grad != 0).all()) is kept
    for cap, weight in ((2.0, math.exp(STEP)), (1.25, 1.25)):
        kl = KL(beta=1.0, estimator="k1", gradient="ratio_detached", ratio_cap=cap)
        grad, _ = gradient(Objective(kl=kl), 1, token_weight=torch.zeros(1, 2, dtype=torch.float64))
        assert_matches_reference(
            grad, torch.full((1, 2), weight / 2, dtype=torch.float64), atol=1e-15
        )


@pytest.fixture
def plain_ratio():
    """-A exp(log-ratio) * scale as a registered surrogate."""

    def expression(log_ratio, advantage, params):
        value = -advantage * torch.exp(log_ratio) * params[0]
        return value, value

    register_surrogate("plain_ratio", None, expression)
    yield "plain_ratio"
    del SURROGATES["plain_ratio"]


@pytest.mark.parametrize("path", PATHS)
def test_registered_surrogate_equals_the_built_in_one(path, plain_ratio):
    """With the formula of the unclipped ratio it gives that objective's bits, metrics included."""
    data = make_inputs(3, 4, 13, torch.float64, seed=22)
    args = (path, data.logits, data.token_ids, torch.tensor([1.5, -0.5, 0.0]).double(), data.mask)
    sides = {"old_logprob": data.old_logprob, "ref_logprob": data.ref_logprob}
    kl = KL(beta=0.1)
    mine = Objective(surrogate=plain_ratio, surrogate_params=(1.0,), kl=kl)
    actual, expected = (
        score(*args, objective=mine, **sides),
        score(*args, objective=Objective(kl=kl), **sides),
    )
    for name, value in expected.tensors().items():
        atol = 1e-13 if name == "metrics" else 1e-15
        assert_matches_reference(actual.tensors()[name], value, atol=atol, rtol=1e-13)
    twice = score(*args, objective=mine.replace(surrogate_params=(2.0,), kl=KL()), **sides)
    once = score(*args, objective=mine.replace(kl=KL()), **sides)
    assert_matches_reference(twice.dlogits, 2 * once.dlogits, atol=1e-15)
    assert float(twice.metrics.max("coefficient")) == pytest.approx(
        2 * float(once.metrics.max("coefficient"))
    )


@pytest.mark.parametrize("path", PATHS)
def test_registered_surrogate_ignores_masked_garbage(path, plain_ratio):
    data = make_inputs(3, 4, 13, seed=23)
    objective = Objective(surrogate=plain_ratio, surrogate_params=(1.0,), entropy_coef=0.1)
    args = (data.token_ids, data.advantage, data.mask)
    clean = score(path, data.logits, *args, old_logprob=data.old_logprob, objective=objective)
    old = data.old_logprob.masked_fill(~data.mask, float("nan"))
    logits = data.logits.masked_fill(~data.mask[..., None], float("nan"))
    assert_same_bits(score(path, logits, *args, old_logprob=old, objective=objective), clean)
