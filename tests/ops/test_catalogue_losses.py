"""Failure catalogue N16-N23 and N29: extreme log-ratios, KL, hyper-parameters, clip edges, long sums, entropy."""

import math

import pytest
import torch

from fastgrpo import Objective, kl_estimate, policy_loss, token_logprob
from fastgrpo.choices import KL
from fastgrpo.testing import assert_matches_reference, make_inputs
from tests.ops.common import INF, NAN, OBJECTIVES, PATHS, PRESETS, bitwise_equal, score


def loss_and_grad(logprob, advantage, **options):
    """Loss, gradient of the log-probs and metrics of a [B, T] batch without masked slots."""
    leaf = logprob.detach().clone().requires_grad_()
    mask = options.pop("mask", torch.ones(logprob.shape, dtype=torch.bool))
    out = policy_loss(leaf, advantage, mask, **options)
    out.loss.backward()
    return out.loss.detach(), leaf.grad, out.metrics


# Far beyond what exp can take, both ways, and infinite: every preset clamps at +-20, says so, and stays finite (N16).
@pytest.mark.parametrize("log_ratio", [1e2, -1e2, 1e4, -1e4, INF, -INF])
@pytest.mark.parametrize("name", PRESETS)
def test_N16_extreme_log_ratio(name, log_ratio):
    logprob = torch.full((3, 2), -1.0)
    old = torch.full((3, 2), -1.0)
    old[:, 0] -= log_ratio
    advantage = torch.tensor([1.0, -1.0, 0.0])
    loss, grad, metrics = loss_and_grad(
        logprob, advantage, old_logprob=old, ref_logprob=logprob, objective=PRESETS[name]
    )
    assert float(metrics.sum("clamp_log_ratio")) == 3
    assert float(metrics.sum("fault")) == (3 if math.isinf(log_ratio) else 0)
    if name == "dro" and math.isinf(log_ratio):
        assert not bool(loss.isfinite()), "DRO's square is not clamped: its true value is infinite"
        return
    assert bool(loss.isfinite())
    assert bool(grad.isfinite().all())
    assert float(metrics.max("ratio")) <= math.exp(20) * (1 + 1e-6)
    if PRESETS[name].kl.beta == 0:
        assert bool((grad[2] == 0).all()), "an advantage of 0 has exactly no gradient"


def test_N16_zero_advantage_removes_an_overflowing_ratio():
    """Without the clamp the ratio is infinite; 0 * inf must not reach the loss."""
    objective = Objective.grpo().replace(d_clamp=None)
    logprob = torch.tensor([[100.0, -1.0]])
    loss, grad, _ = loss_and_grad(
        logprob, torch.zeros(1), old_logprob=logprob - 200.0, objective=objective
    )
    assert float(loss) == 0.0
    assert bool((grad == 0).all())


@pytest.mark.parametrize("fault", [None, NAN])
def test_N16_extremes_of_infinite_and_nan_metrics(fault):
    """Both infinities among the log-ratios: minimum and maximum show them; NaN, if there is one, shows everywhere."""
    logprob = torch.full((3, 5), -1.0)
    old = logprob.clone()
    old[0, 1], old[2, 4] = INF, -INF
    if fault is not None:
        old[1, 2] = fault
    metrics = policy_loss(
        logprob, torch.ones(3), torch.ones(3, 5, dtype=torch.bool), old_logprob=old
    ).metrics
    low, high = float(metrics.min("log_ratio")), float(metrics.max("log_ratio"))
    if fault is None:
        assert (low, high) == (-INF, INF)
    else:
        assert math.isnan(low)
        assert math.isnan(high)
    assert math.isnan(float(metrics["log_ratio"]))
    assert float(metrics.sum("clamp_log_ratio")) == 2
    assert float(metrics.sum("fault")) == (2 if fault is None else 3)


@pytest.mark.parametrize("name", PRESETS)
def test_N16_nan_old_logprob_is_a_visible_fault_of_its_sequence(name):
    objective = PRESETS[name]
    logprob, old = torch.full((2, 3), -1.0), torch.full((2, 3), -1.1)
    clean = loss_and_grad(
        logprob, torch.ones(2), old_logprob=old, ref_logprob=old, objective=objective
    )
    old = old.clone()
    old[0, 1] = NAN
    loss, grad, metrics = loss_and_grad(
        logprob,
        torch.ones(2),
        old_logprob=old,
        ref_logprob=torch.full((2, 3), -1.1),
        objective=objective,
    )
    assert bool(loss.isnan())
    assert bool(grad[0, 1].isnan())
    assert bitwise_equal(grad[1], clean[1][1]), "the other sequence is untouched"
    assert float(metrics.sum("fault")) >= 1


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
@pytest.mark.parametrize("delta", [100.0, -100.0, 1e4, INF, -INF])
def test_N17_extreme_kl(estimator, delta):
    logprob = torch.tensor([[-1.0, -2.0]])
    ref = logprob + torch.tensor([[delta, 0.5]])
    objective = Objective.grpo().replace(kl=KL(beta=0.04, estimator=estimator))
    loss, grad, metrics = loss_and_grad(
        logprob, torch.ones(1), ref_logprob=ref, objective=objective
    )
    assert bool(loss.isfinite())
    assert float(metrics.sum("clamp_kl")) == 1
    no_kl = loss_and_grad(logprob, torch.ones(1))[1]
    assert float(grad[0, 0]) == float(no_kl[0, 0]), "a clamped KL has no gradient"
    assert float(grad[0, 1]) != float(no_kl[0, 1])
    leaf = logprob.clone().requires_grad_()
    value = kl_estimate(leaf, ref, estimator)
    value.sum().backward()
    assert bool(value.isfinite().all())
    assert float(leaf.grad[0, 0]) == 0.0


# k3 = d^2 / 2 + d^3 / 6 + ...: exp(d) - 1 - d in float32 has no digit left at d = 1e-4.
@pytest.mark.parametrize("size", [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("sign", [1, -1])
def test_N18_small_k3_keeps_its_digits(size, sign):
    logprob = torch.tensor([-0.75], requires_grad=True)
    ref = (logprob + sign * size).detach()
    exact = ref.double() - logprob.detach().double()  # the delta that float32 really holds
    value = kl_estimate(logprob, ref)
    value.backward()
    series = exact**2 / 2 + exact**3 / 6 + exact**4 / 24
    want = series if size < 1e-2 else torch.expm1(exact) - exact
    # expm1(d) and d are each rounded once: an error of eps |d| in a value of d^2 / 2
    assert_matches_reference(value, want, atol=2**-24 * size, rtol=1e-6)
    assert_matches_reference(logprob.grad, -torch.expm1(exact), atol=0.0, rtol=1e-6)
    if size >= 1e-4:
        assert float((value.detach() - want).abs() / want) <= 1.5e-3


@pytest.mark.parametrize("path", PATHS)
def test_N19_beta_zero_never_lets_the_reference_in(path):
    data = make_inputs(3, 4, 19, seed=1)
    args = (path, data.logits, data.token_ids, data.advantage, data.mask)
    without = score(*args, old_logprob=data.old_logprob)
    for ref in (data.ref_logprob, torch.full((3, 4), NAN), torch.full((3, 4), INF)):
        given = score(*args, old_logprob=data.old_logprob, ref_logprob=ref)
        for name in ("loss", "token_loss", "dlogits"):
            assert bitwise_equal(given.tensors()[name], without.tensors()[name])
    assert float(score(*args, ref_logprob=data.ref_logprob).metrics["kl"]) > 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_N19_beta_needs_its_target(name):
    objective = OBJECTIVES[name]
    if not objective.kl.beta or objective.kl.target != "ref":
        objective = objective.replace(kl=KL(beta=0.04))
    with pytest.raises(
        ValueError, match=r"ref_logprob is required by objective\.kl\.beta = 0\.\d+, got None"
    ):
        policy_loss(
            torch.zeros(1, 1), torch.ones(1), torch.ones(1, 1, dtype=torch.bool), entropy=torch.zeros(1, 1),
            rollout_logprob=torch.zeros(1, 1), old_logprob=torch.zeros(1, 1), objective=objective,
        )  # fmt: skip


BAD_HYPERPARAMETERS = [
    (lambda: Objective.grpo(epsilon=-0.5), r"epsilon must be in \[0, 1\), got -0.5"),
    (lambda: Objective.grpo(epsilon=1.5), r"epsilon must be in \[0, 1\), got 1.5"),
    (lambda: Objective.grpo(epsilon=NAN), r"epsilon must be in \[0, 1\), got nan"),
    (lambda: Objective.grpo(epsilon_high=-0.1), "epsilon_high must be >= 0, got -0.1"),
    (lambda: Objective.grpo(epsilon_high=NAN), "epsilon_high must be >= 0, got nan"),
    (lambda: Objective.grpo(beta=-1), "beta must be finite and >= 0, got -1"),
    (lambda: Objective.grpo(beta=NAN), "beta must be finite and >= 0, got nan"),
    (lambda: Objective.grpo(beta=INF), "beta must be finite and >= 0, got inf"),
    (lambda: Objective.grpo(delta=0.0), "delta must be > .*, got 0.0"),
    (lambda: Objective.grpo(delta=NAN), "delta must be > .*, got nan"),
    (lambda: Objective.dr_grpo(0), "length must be > 0, got 0"),
    (lambda: Objective.sapo(tau_positive=0.0), "positive must be > 0, got 0.0"),
    (lambda: Objective.vespo(positive=(-1.0, 2.0)), "must be two numbers > 0"),
    (lambda: Objective.grpo().replace(d_clamp=0.0), "d_clamp must be None or > 0, got 0.0"),
    (lambda: Objective.grpo().replace(d_clamp=NAN), "d_clamp must be None or > 0, got nan"),
]


@pytest.mark.parametrize(("build", "message"), BAD_HYPERPARAMETERS)
def test_N20_bad_hyperparameters(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# bf16-like noise in the last bits: whatever the log-prob, its ratio with itself is 1.
@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "luspo", "cispo", "rloo", "ppo"])
def test_N21_no_old_policy_means_ratio_exactly_one(name):
    logprob = -torch.rand(3, 5) * 20
    advantage = torch.tensor([0.7, -1.3, 0.0])
    objective = PRESETS[name]
    _, grad, metrics = loss_and_grad(logprob, advantage, objective=objective)
    assert float(metrics.min("ratio")) == float(metrics.max("ratio")) == 1.0
    same = loss_and_grad(logprob, advantage, objective=objective, old_logprob=logprob.clone())
    assert bitwise_equal(grad, same[1]), "old_logprob=None and old_logprob=logprob are one case"
    weight = {"sequence": 1 / 15, "token": 1 / 15}[objective.reduce.per]
    if name in ("luspo", "rloo"):  # every token carries its sequence's whole ratio
        weight *= 5
    want = (-advantage.double() * weight)[:, None].expand(3, 5)
    assert_matches_reference(grad, want, atol=1e-9, rtol=3e-7)


def test_N21_gradient_is_exact_where_the_weight_is_a_power_of_two():
    advantage = torch.tensor([0.7, -1.3])
    _, grad, _ = loss_and_grad(-torch.rand(2, 4), advantage)
    assert torch.equal(grad, (-advantage / 8)[:, None].expand(2, 4))


# The convention at an edge, for both sides: bounds are inclusive, so a ratio exactly at its bound keeps its gradient.
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_N22_clip_edges(sign):
    logprob = torch.tensor(
        [[-0.8, -0.8]], dtype=torch.float64
    )  # bounds and metrics are float64 too: exact
    old = logprob - 0.1 * sign
    free = Objective(negative=(-INF, INF))
    ratio = float(
        loss_and_grad(logprob, torch.tensor([sign]), old_logprob=old, objective=free)[2].max(
            "ratio"
        )
    )
    beyond = math.nextafter(ratio, ratio - sign)
    for bound, kept in ((ratio, True), (beyond, False)):
        bounds = {"positive": (-INF, bound)} if sign > 0 else {"negative": (bound, INF)}
        _, grad, metrics = loss_and_grad(
            logprob, torch.tensor([sign]), old_logprob=old, objective=Objective(**bounds)
        )
        assert bool((grad != 0).all()) is kept
        assert float(metrics.sum("clip_region")) == (0 if kept else 2)


def test_N22_ratio_one_is_inside_bounds_of_zero_width():
    """epsilon = 0 and no old policy: ratio 1 lies on both bounds at once and still learns."""
    for advantage in (1.0, -1.0):
        _, grad, _ = loss_and_grad(
            torch.full((1, 2), -0.3),
            torch.tensor([advantage]),
            objective=Objective.grpo(epsilon=0.0),
        )
        assert torch.equal(grad, torch.full((1, 2), -advantage / 2))


# A bfloat16 sum of 32,768 log-ratios of 1e-6 has the wrong sign; float32 must keep it to a few units.
@pytest.mark.parametrize("packed", [False, True])
def test_N23_long_sequence_mean(packed):
    length = 32_768
    g = torch.Generator().manual_seed(23)
    old = -torch.rand(1, length, generator=g)
    logprob = old + (torch.randn(1, length, generator=g) * 1e-6 + 2e-6)
    exact = (logprob.double() - old.double()).mean().exp()
    options = {"objective": Objective.gspo()}
    if packed:
        options["cu_seqlens"] = torch.tensor([0, length], dtype=torch.int32)
        logprob, old = logprob[0], old[0]
    _, _, metrics = loss_and_grad(logprob, torch.ones(1), old_logprob=old, **options)
    assert float(metrics.max("ratio")) == pytest.approx(float(exact), abs=1.2e-7)
    assert float(metrics["log_ratio"]) > 0


# One token certain by 80 nats, and the uniform distribution over a real vocabulary (entropy log V = 11.93).
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_N29_entropy_extremes(dtype):
    vocabulary = 151_936
    peaked = torch.zeros(1, vocabulary, dtype=dtype)
    peaked[0, 77] = 80.0
    flat = torch.full((1, vocabulary), 3.0, dtype=dtype)
    logits = torch.cat([peaked, flat]).requires_grad_()
    logprob, entropy = token_logprob(logits, torch.tensor([77, 5]), with_entropy=True)
    tail = (vocabulary - 1) * math.exp(-80)
    # 81 * tail in exact arithmetic, of which log(1 + tail) is below the unit of float32
    assert float(entropy[0].detach()) == pytest.approx(80 * tail, rel=2e-2)
    assert float(logprob[0].detach()) == pytest.approx(-tail, rel=1e-4)
    assert float(entropy[1].detach()) == pytest.approx(math.log(vocabulary), abs=4e-6)
    assert float(logprob[1].detach()) == pytest.approx(-math.log(vocabulary), abs=4e-6)
    (grad,) = torch.autograd.grad(entropy[1], logits)
    assert float(grad.abs().max()) <= 1e-10, "the uniform distribution is stationary"
