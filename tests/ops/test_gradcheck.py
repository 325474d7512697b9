"""Every hand-written backward against finite differences in float64, through the public functions.

Objectives whose gradient is by definition not the derivative of their value (detached weights, straight-through KL,
GSPO-token) are compared with autograd of printed formulas instead, in `test_reference.py` and `test_losses.py`.
"""

import itertools

import pytest
import torch
from torch.autograd import gradcheck

from fastgrpo import Objective, group_advantage, grpo_loss, kl_estimate, policy_loss, token_logprob
from fastgrpo.choices import KL, Gate, Reduce, Sigmoid

B, T, V = 3, 4, 6


def normal(*shape, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64) * scale


IDS = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))
MASK = torch.arange(T) < torch.tensor([[4], [2], [3]])
ADVANTAGE = torch.tensor([0.8, -1.1, 0.0], dtype=torch.float64)
PER_ROW = 0.5 + torch.rand(B, T, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
LOGPROB = -normal(B, T, seed=3).abs() - 0.1


@pytest.mark.parametrize("temperature", [1.0, 0.7, PER_ROW], ids=["T=1", "T=.7", "T per row"])
@pytest.mark.parametrize("scale", [1.0, 0.6])
@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_token_logprob(temperature, scale, softcap, with_entropy, mask):
    def scored(logits):
        out = token_logprob(
            logits, IDS, temperature=temperature, logit_scale=scale, logit_softcap=softcap, mask=mask,
            with_entropy=with_entropy,
        )  # fmt: skip
        return (out.logprob, out.entropy) if with_entropy else out.logprob

    assert gradcheck(scored, normal(B, T, V, seed=4, scale=2.0).requires_grad_())


def test_token_logprob_entropy_alone():
    """The log-prob's upstream gradient is absent, not zero."""

    def entropy(logits):
        return token_logprob(logits, IDS, with_entropy=True).entropy

    assert gradcheck(entropy, normal(B, T, V, seed=5).requires_grad_())


KLS = [KL()] + [
    KL(beta=0.3, estimator=e, gradient=g)
    for e in ("k1", "k2", "k3", "abs")
    for g in ("path", "ratio")
]
SHAPES = {
    "free": {},
    "clip": {"positive": (-torch.inf, 1.2), "negative": (0.8, 3.0)},
    "sigmoid": {"shape": Sigmoid()},
    "log_clip": {"log_clip": (-0.3, 0.3)},
}
LEVELS = ("token", "seq_mean", "seq_sum")


def objectives():
    """3 levels x 4 shapes x 9 KL terms, with reductions, entropy bonus and gates rotating through them: 108."""
    reduces = itertools.cycle(
        [
            Reduce(),
            Reduce(per="token"),
            Reduce(power=0.0),
            Reduce(per="constant", length=5),
            Reduce(per="prompt"),
        ]
    )
    sequence_gate = Gate(stat="k3", high=0.3, pool="seq_max", scope="policy_and_kl")
    gates = itertools.cycle([(), (), (Gate(stat="k2", high=0.4),), (sequence_gate,)])
    cases = []
    for level, shape, kl in itertools.product(LEVELS, SHAPES, KLS):
        reduce = next(reduces)
        objective = Objective(
            level=level, kl=kl, reduce=reduce, gates=next(gates), entropy_coef=0.2, **SHAPES[shape]
        )
        name = f"{level}-{shape}-{kl.estimator}-{kl.gradient if kl.beta else 'off'}"
        cases.append(pytest.param(objective, id=name))
    return cases


def loss_options(objective):
    old = LOGPROB + normal(B, T, seed=6, scale=0.3)
    return {
        "old_logprob": old,
        "ref_logprob": LOGPROB + normal(B, T, seed=7, scale=0.3),
        "token_weight": torch.rand(
            B, T, generator=torch.Generator().manual_seed(8), dtype=torch.float64
        ),
        "kl_weight": torch.rand(
            B, T, generator=torch.Generator().manual_seed(9), dtype=torch.float64
        ),
        "group_size": 1,
        "objective": objective,
    }


@pytest.mark.parametrize("objective", objectives())
def test_policy_loss_through_loss_and_token_loss(objective):
    options = loss_options(objective)

    def losses(logprob, entropy):
        out = policy_loss(logprob, ADVANTAGE, MASK, entropy=entropy, **options)
        return out.loss, out.token_loss

    entropy = normal(B, T, seed=10).abs()
    assert gradcheck(losses, (LOGPROB.clone().requires_grad_(), entropy.requires_grad_()))


@pytest.mark.parametrize("objective", objectives())
def test_grpo_loss(objective):
    options = loss_options(objective)

    def loss(logits):
        out = grpo_loss(logits, IDS, ADVANTAGE, MASK, temperature=0.8, logit_softcap=4.0, **options)
        return out.loss

    logits = normal(B, T, V, seed=11)
    # One directional derivative through all entries: 108 objectives times 72 entries would take half a minute.
    assert gradcheck(loss, logits.requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
@pytest.mark.parametrize("gradient", ["path", "ratio"])
@pytest.mark.parametrize("with_old", [False, True])
def test_kl_estimate(estimator, gradient, with_old):
    ref = LOGPROB + normal(B, T, seed=12, scale=0.5)
    old = LOGPROB + normal(B, T, seed=13, scale=0.5) if with_old else None

    def kl(logprob):
        return kl_estimate(logprob, ref, estimator, gradient=gradient, old_logprob=old)

    if gradient == "ratio" and not with_old:  # the ratio is exactly 1 with the gradient of a ratio
        frozen = LOGPROB.clone()

        def kl(logprob):
            return kl_estimate(logprob, ref, estimator, gradient=gradient, old_logprob=frozen)

    assert gradcheck(kl, LOGPROB.clone().requires_grad_())


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "none"])
def test_group_advantage(scale, baseline):
    def advantage(reward):
        return group_advantage(reward, group_size=3, scale=scale, baseline=baseline).advantage

    assert gradcheck(advantage, normal(6, 2, seed=14).requires_grad_())
