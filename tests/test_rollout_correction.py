"""Importance weights, gates and masks for the mismatch between trainer, old policy and sampler, by plain formulas."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastgrpo import Objective, policy_loss
from fastgrpo.choices import KL, Correction, Gate, Reduce
from tests import formulas as f
from tests.formulas import Batch, make_batch
from tests.test_losses import Layout, check, close, reduced

NAN = float("nan")


def mismatch(seed: int = 0, *, unscored: bool = True, scale: float = 1.0) -> Batch:
    """A batch whose sampler disagrees with the old policy, tokens it could not score among them (NaN)."""
    b = make_batch(seed=seed, noise=0.15)
    logprob = b.logprob.clamp(min=-3.0)  # test_losses exercises the clamps
    old, rollout = (
        (logprob + size * torch.randn(logprob.shape, dtype=torch.float64)).clamp(max=-1e-4)
        for size in (0.05, 0.15 * scale)
    )
    b = replace(b, logprob=logprob, old=old)
    if unscored:
        rollout[0, 2] = rollout[3, 0] = NAN
    return replace(b, rollout=rollout)


def behaviour(b: Batch) -> Tensor:
    return torch.where(b.rollout.isnan(), b.old, b.rollout)


def importance_weight(b: Batch, level: str, mode: str, low: float, high: float) -> Tensor:
    u = b.old - behaviour(b)
    pooled = {"token": u, "seq_sum": f.total(u, b.mask), "seq_mean": f.mean(u, b.mask)}[level]
    w = pooled.exp().expand_as(u)
    if mode == "truncate":
        return w.clamp(low, high)
    return torch.where((w >= low) & (w <= high), w, 0.0)


@pytest.mark.parametrize("applies_to", ["policy", "policy_and_kl"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "seq_sum", "seq_mean"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_correction(level, mode, applies_to, packed):
    """TIS, IcePop / MIS and their sequence forms; the KL term is weighted only on request."""
    batch = mismatch()
    low, high = 0.9, 1.15
    correction = Correction(level=level, mode=mode, low=low, high=high, applies_to=applies_to)
    objective = Objective.grpo(beta=0.1).replace(correction=correction)

    def token_loss(b: Batch) -> Tensor:
        w = importance_weight(b, level, mode, low, high)
        pull = 0.1 * f.kl(b, "k3", "path", torch.ones_like(w))
        return w * f.ppo(b) + (w if applies_to == "policy_and_kl" else 1.0) * pull

    check(batch, objective, reduced(token_loss, "sequence"), packed=packed)


@pytest.mark.parametrize("level", ["token", "seq_sum", "seq_mean"])
def test_normalised_weights_have_mean_one(level):
    """Over tokens at token level, over sequences (one weight each) at sequence level, as verl counts them."""
    batch = mismatch(1)
    correction = Correction(level=level, low=0.0, high=1.1, normalize=True)

    def token_loss(b: Batch) -> Tensor:
        w = importance_weight(b, level, "truncate", 0.0, 1.1)
        live = b.mask.any(1)
        average = w[b.mask].mean() if level == "token" else w[live, 0].mean()
        return w / average * f.ppo(b)

    check(batch, Objective.grpo().replace(correction=correction), reduced(token_loss, "sequence"))


def test_normalised_weights_that_are_all_zero_stay_zero():
    batch = mismatch(2, unscored=False)
    correction = Correction(mode="mask", low=1e6, high=1e7, normalize=True)
    check(
        batch,
        Objective.grpo().replace(correction=correction),
        reduced(lambda b: torch.zeros_like(b.logprob) * b.logprob, "sequence"),
    )


def test_log_ratio_of_the_weights_is_clamped_unless_told_otherwise():
    batch = mismatch(3, unscored=False)
    rollout = batch.rollout.clone()
    rollout[0, 0], rollout[2, 0] = batch.old[0, 0] - 25.0, batch.old[2, 0] - 25.0
    batch = replace(batch, rollout=rollout)
    for limit in (20.0, None):
        correction = Correction(high=math.inf, log_clamp=limit)

        def token_loss(b: Batch, limit: float | None = limit) -> Tensor:
            u = b.old - b.rollout
            return (u if limit is None else u.clamp(-limit, limit)).exp() * f.ppo(b)

        objective = Objective.grpo().replace(correction=correction)
        check(batch, objective, reduced(token_loss, "sequence"))


def test_bypass_takes_the_sampler_as_the_old_policy():
    batch = mismatch(4)
    objective = Objective.dapo().replace(correction=Correction(bypass=True))
    two_policies = replace(batch, old=behaviour(batch), ref=batch.ref)

    def expected(b: Batch) -> tuple[Tensor, Tensor]:
        return reduced(lambda x: f.ppo(x, 0.2, 0.28), "token")(two_policies.with_logprob(b.logprob))

    check(batch, objective, expected)


@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "seq_sum"])
def test_vespo_folds_the_weight_into_its_ratio(level, mode):
    """log W = sum of log-ratios + log weight (each token's, or the sequence's once), not a factor on the loss."""
    batch = mismatch(5, scale=0.5)
    correction = Correction(level=level, mode=mode, low=0.8, high=1.25)

    def token_loss(b: Batch) -> Tensor:
        log_weight = importance_weight(b, level, mode, 0.8, 1.25).log().clamp(min=math.log(1e-8))
        if level != "token":
            log_weight = log_weight / b.mask.sum(1, keepdim=True).clamp(min=1)
        return f.vespo(b, log_weight)

    check(batch, Objective.vespo().replace(correction=correction), reduced(token_loss, "token"))


# Gates ---------------------------------------------------------------------------------------------------------------

STATS = {
    "ratio": lambda p, q: (p - q).exp(),
    "k1": lambda p, q: p - q,
    "k2": lambda p, q: (p - q) ** 2 / 2,
    "k3": lambda p, q: (p - q).exp() - 1 - (p - q),
    "tv": lambda p, q: p.exp() - q.exp(),
    "binary_kl": lambda p, q: (
        (p - q).sign() * (q.exp() * (q - p) + (1 - q.exp()) * ((1 - q.exp()) / (1 - p.exp())).log())
    ),
}


def statistic(b: Batch, stat: str, between: str, pool: str) -> Tensor:
    p, q = {
        "theta_old": (b.logprob, b.old),
        "theta_rollout": (b.logprob, torch.where(b.rollout.isnan(), b.logprob, b.rollout)),
        "old_rollout": (b.old, behaviour(b)),
    }[between]
    value = STATS[stat](p.detach(), q)
    if pool == "seq_sum":
        return f.total(value, b.mask).expand_as(value)
    if pool == "seq_mean":
        return f.mean(value, b.mask).expand_as(value)
    if pool == "seq_max":
        return torch.where(b.mask, value, -math.inf).amax(1, keepdim=True).expand_as(value)
    return value


def middle_bounds(b: Batch, stat: str, between: str, pool: str) -> tuple[float, float]:
    """Bounds half-way between neighbouring values of the statistic, that close some tokens on each side."""
    values = statistic(b, stat, between, pool)[b.mask].unique()
    cut = max(len(values) // 4, 1)
    low, high = (float(values[k - 1 : k + 1].mean()) for k in (cut, len(values) - cut))
    return low, high


def closed(b: Batch, gate: Gate) -> Tensor:
    value = statistic(b, gate.stat, gate.between, gate.pool)
    shut = (value < gate.low) | (value > gate.high)
    if gate.when == "positive":
        shut &= b.advantage > 0
    if gate.when == "negative":
        shut &= b.advantage < 0
    return shut & b.mask


def gated(objective: Objective, gate: Gate) -> "tuple[Objective, object]":
    """The objective with the gate, and the plain formula of GRPO + KL under it."""

    def expected(b: Batch) -> tuple[Tensor, Tensor]:
        shut = closed(b, gate)
        assert bool(shut.any()), "the case is void: the gate closes nothing"
        assert not bool(shut[b.mask].all()), "the case is void: the gate closes everything"
        policy = torch.where(shut, 0.0, f.ppo(b))
        pull = 0.1 * f.kl(b, "k3", "path", torch.ones_like(b.old))
        if gate.scope != "policy":
            pull = torch.where(shut, 0.0, pull)
        tokens = policy + pull
        mask = b.mask & ~shut if gate.scope == "mask" else b.mask
        return torch.where(mask, tokens, 0.0), f.reduce_tokens(tokens, mask, "sequence")

    return objective.replace(gates=(gate,)), expected


# Only gates between stored log-probs may touch the mask: denominators are fixed before the policy is scored.
SCOPES = [
    (between, scope)
    for between in ("theta_old", "theta_rollout", "old_rollout")
    for scope in ("policy", "policy_and_kl", "mask")
    if scope != "mask" or between == "old_rollout"
]


@pytest.mark.parametrize(("between", "scope"), SCOPES)
@pytest.mark.parametrize("pool", ["token", "seq_sum", "seq_mean", "seq_max"])
@pytest.mark.parametrize("stat", STATS)
def test_gate(stat, pool, between, scope):
    number = list(STATS).index(stat) + len(pool)
    when = ("always", "positive", "negative")[number % 3] if pool == "token" else "always"
    batch = mismatch(6)
    low, high = middle_bounds(batch, stat, between, pool)
    gate = Gate(stat=stat, low=low, high=high, between=between, pool=pool, when=when, scope=scope)
    objective, expected = gated(Objective.grpo(beta=0.1), gate)
    check(batch, objective, expected, packed=number % 2 == 0)


def test_off_policy_sequence_mask():
    """DeepSeek-V3.2, Eq. 9: drop bad sequences whose mean log(sampler / policy) exceeds the threshold."""
    batch = mismatch(7, unscored=False)
    threshold = 0.02
    gate = Gate(
        stat="k1", low=-threshold, between="theta_rollout", pool="seq_mean", when="negative"
    )

    def token_loss(b: Batch) -> Tensor:
        drift = f.mean((b.rollout - b.logprob).detach(), b.mask)
        drop = (drift > threshold) & (b.advantage < 0)
        assert bool(drop.any())
        return torch.where(drop, 0.0, f.ppo(b))

    check(batch, Objective.grpo().replace(gates=(gate,)), reduced(token_loss, "sequence"))


def test_prime_ipo_gate_and_quadratic_pull():
    """prime-rl's IPO: the ratio to the sampler inside a symmetric total-variation gate, plus tau d^2 on all tokens."""
    batch = mismatch(8, unscored=False)
    gate = Gate(stat="tv", low=-0.03, high=0.03, between="theta_rollout")
    objective = Objective(
        gates=(gate,),
        correction=Correction(bypass=True),
        kl=KL(beta=2e-3, estimator="k2", target="old"),
        reduce=Reduce(per="token"),
    )

    def token_loss(b: Batch) -> Tensor:
        d = b.logprob - b.rollout
        keep = (b.logprob.exp() - b.rollout.exp()).abs() <= 0.03
        assert bool(keep[b.mask].any())
        assert not bool(keep[b.mask].all())
        return torch.where(keep, -b.advantage * d.exp(), 0.0) + 1e-3 * d**2

    check(batch, objective, reduced(token_loss, "token"))


def test_sequence_mask_with_token_weights():
    """seq-mask-TIS: keep a sequence by its geometric mean ratio, weight its tokens by their raw ratios."""
    batch = mismatch(9, unscored=False)
    gate = Gate(
        stat="k1",
        low=math.log(0.97),
        high=math.log(1.05),
        between="old_rollout",
        pool="seq_mean",
    )
    correction = Correction(high=math.inf)

    def token_loss(b: Batch) -> Tensor:
        u = b.old - b.rollout
        geometric = f.mean(u, b.mask).exp()
        keep = (geometric >= 0.97) & (geometric <= 1.05)
        assert bool(keep.any())
        return keep * u.exp() * f.ppo(b)

    objective = Objective.grpo().replace(gates=(gate,), correction=correction)
    check(batch, objective, reduced(token_loss, "sequence"))


def test_entropy_gate_keeps_the_high_entropy_tokens():
    batch = make_batch(seed=10)
    entropy = torch.rand(batch.mask.shape, dtype=torch.float64)
    gate = Gate(stat="entropy", low=0.4)

    def token_loss(b: Batch) -> Tensor:
        return torch.where(entropy >= 0.4, f.ppo(b), 0.0)

    objective = Objective.grpo().replace(gates=(gate,))
    check(batch, objective, reduced(token_loss, "sequence"), entropy=entropy)


def test_four_gates_together():
    batch = mismatch(11, unscored=False)
    gates = (
        Gate(stat="tv", high=0.04, when="positive"),
        Gate(stat="tv", low=-0.04, when="negative"),
        Gate(stat="k2", high=0.01, between="theta_rollout", scope="policy_and_kl"),
        Gate(stat="k3", high=0.02, pool="seq_max"),
    )
    objective = Objective.grpo(beta=0.1).replace(gates=gates)

    def token_loss(b: Batch) -> Tensor:
        shut = torch.stack([closed(b, gate) for gate in gates])
        pull = torch.where(shut[2], 0.0, 0.1 * f.kl(b, "k3", "path", torch.ones_like(b.old)))
        return torch.where(shut.any(0), 0.0, f.ppo(b)) + pull

    check(batch, objective, reduced(token_loss, "sequence"))


# Metrics -------------------------------------------------------------------------------------------------------------


def test_mismatch_metrics():
    """Mismatch over the tokens that the sampler scored, weights over all; ESS and chi-square by their definitions."""
    batch = mismatch(12)
    objective = Objective.grpo().replace(correction=Correction(high=1.1))
    arguments = Layout(batch, False, False).arguments(batch)
    m = policy_loss(batch.logprob, objective=objective, **arguments).metrics
    u = (batch.old - batch.rollout)[batch.mask & ~batch.rollout.isnan()]
    w = (batch.old - behaviour(batch))[batch.mask].exp().clamp(max=1.1)
    assert len(u) == len(w) - 2
    close(m["rollout_k1"], -u.mean(), "k1")
    close(m["rollout_corr/kl"], -u.mean(), "kl")
    close(m["rollout_k3"], (u.exp() - 1 - u).mean(), "k3")
    close(m["sampling/sampling_logp_difference/max"], u.abs().max(), "max difference")
    close(m["sampling/importance_sampling_ratio/min"], w.min(), "min weight")
    ess = m["rollout_corr/rollout_is_eff_sample_size"]
    close(ess, 1 / ((w / w.mean()) ** 2).mean(), "ess")
    close(m["rollout_corr/rollout_is_std"], w.std(correction=0), "std")
    outside = (batch.old - behaviour(batch))[batch.mask] > math.log(1.1)
    close(m["rollout_outside"], outside.double().mean(), "outside")
    close(m["rollout_corr/chi2_token"], ((2 * u).exp()).mean() - 1, "chi-square")


def test_missing_tensors_are_named():
    b = make_batch(seed=13)
    corrected = Objective.grpo().replace(correction=Correction())
    gated_by_rollout = Objective.grpo().replace(
        gates=(Gate(stat="k1", high=1.0, between="theta_rollout"),)
    )
    for objective in (corrected, gated_by_rollout):
        with pytest.raises(ValueError, match="rollout_logprob is required"):
            policy_loss(b.logprob, b.advantage, b.mask, old_logprob=b.old, objective=objective)
    with pytest.raises(ValueError, match="old_logprob is required"):
        policy_loss(b.logprob, b.advantage, b.mask, rollout_logprob=b.rollout, objective=corrected)
