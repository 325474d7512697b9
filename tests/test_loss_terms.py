"""KL term and entropy bonus: every estimator, gradient, clamp and reduction against plain formulas, in float64."""

import pytest
import torch
from torch import Tensor

from fastgrpo import Objective, policy_loss
from fastgrpo.choices import KL, Reduce
from tests import formulas as f
from tests.formulas import Batch, make_batch
from tests.test_losses import MAX_LENGTH, REDUCTIONS, check, close, reduced, soil

KL_CASES = [
    (e, g) for e in ("k1", "k2", "k3", "abs") for g in ("path", "k2", "ratio", "ratio_detached")
]


@pytest.mark.parametrize(
    "clamps", [(20.0, None), (20.0, 10.0), (None, None)], ids=["in", "out", "off"]
)
@pytest.mark.parametrize("level", ["token", "seq_mean"])
@pytest.mark.parametrize(("estimator", "gradient"), KL_CASES)
def test_kl_term(estimator, gradient, level, clamps):
    batch = make_batch(seed=5, noise=0.3)
    clamp_in, clamp_out = clamps
    kl = KL(beta=0.04, estimator=estimator, gradient=gradient, clamp_in=clamp_in, clamp_out=clamp_out,
            ratio_cap=1.2)  # fmt: skip
    objective = Objective.grpo().replace(level=level, kl=kl)
    kl_weight = torch.linspace(1.5, 0.0, batch.mask.numel()).view(batch.mask.shape).double()

    def token_loss(b: Batch) -> Tensor:
        own = f.log_ratio(b)
        r = (own if level == "token" else f.mean(own, b.mask)).exp().expand_as(own)
        pull = f.kl(b, estimator, gradient, r, clamp_in=clamp_in, clamp_out=clamp_out, cap=1.2)
        return f.clipped(r, b.advantage, 0.2, 0.2) + kl_weight * 0.04 * pull

    check(batch, objective, reduced(token_loss, "sequence"), kl_weight=kl_weight)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_kl_towards_the_old_policy(estimator):
    batch = make_batch(seed=6)
    kl = KL(beta=0.1, estimator=estimator, target="old")

    def token_loss(b: Batch) -> Tensor:
        r = f.log_ratio(b).exp()
        return f.ppo(b) + 0.1 * f.kl(b, estimator, "path", r, target=b.old)

    check(batch, Objective.grpo().replace(kl=kl), reduced(token_loss, "sequence"))


# The four KL gradients in expectation on a categorical (losses.md 2.5): what each estimator really descends.
@pytest.mark.parametrize(
    ("estimator", "gradient", "descends"),
    [
        ("k1", "path", "nothing"),
        ("k2", "path", "reverse"),
        ("k3", "path", "forward"),
        ("k1", "k2", "reverse"),
        ("k3", "k2", "reverse"),
        ("k1", "ratio", "reverse"),
        ("k3", "ratio", "reverse"),
        ("k2", "ratio", "neither"),
    ],
)
def test_expected_kl_gradient_on_a_categorical(estimator, gradient, descends):
    g = torch.Generator().manual_seed(0)
    theta = torch.randn(5, generator=g, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(5, generator=g, dtype=torch.float64).log_softmax(-1)
    logprob = theta.log_softmax(-1)
    kl = KL(beta=1.0, estimator=estimator, gradient=gradient, clamp_in=None)
    objective = Objective(d_clamp=None, kl=kl, reduce=Reduce(per="token"))
    p = logprob.exp().detach()  # the expectation over all outcomes, exactly
    out = policy_loss(
        logprob[:, None], torch.zeros(5, dtype=torch.float64), torch.ones(5, 1, dtype=torch.bool),
        old_logprob=logprob.detach()[:, None], ref_logprob=ref[:, None], kl_weight=p[:, None],
        objective=objective, normalizer=1.0,
    )  # fmt: skip
    (got,) = torch.autograd.grad(out.loss, theta)
    log_p = theta.log_softmax(-1)
    reverse = torch.autograd.grad((log_p.exp() * (log_p - ref)).sum(), theta)[0]
    log_p = theta.log_softmax(-1)
    forward = torch.autograd.grad((ref.exp() * (ref - log_p)).sum(), theta)[0]
    same = {
        "nothing": torch.zeros_like(got),
        "reverse": reverse,
        "forward": forward,
    }
    if descends == "neither":
        assert all((got - other).abs().max() > 1e-3 for other in same.values())
    else:
        assert torch.allclose(got, same[descends], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("reduction", ["token", "sequence", "prompt-ids", "constant", "external"])
def test_entropy_bonus(reduction):
    batch = make_batch(seed=7)
    reduce, needs, extra = REDUCTIONS[reduction]
    entropy = torch.rand(batch.mask.shape, dtype=torch.float64) * 3
    ours = soil(entropy, batch.mask, 0).requires_grad_()
    plain = entropy.clone().requires_grad_()
    objective = Objective.grpo().replace(reduce=reduce, entropy_coef=0.05)

    def expected(b: Batch) -> tuple[Tensor, Tensor]:
        tokens = f.ppo(b)
        loss = f.reduce_tokens(tokens, b.mask, reduce.per, **needs)
        return tokens, loss - 0.05 * f.reduce_tokens(plain, b.mask, reduce.per, **needs)

    check(batch, objective, expected, entropy=ours, **extra)
    bonus = expected(batch)[1]
    (gradient,) = torch.autograd.grad(bonus, plain)
    close(ours.grad, torch.where(batch.mask, gradient, 0.0), "entropy gradient")


def test_entropy_bonus_with_a_reduction_of_its_own():
    """TRL's bonus is a mean over tokens whatever the policy term's reduction and normaliser are."""
    batch = make_batch(seed=7)
    entropy = torch.rand(batch.mask.shape, dtype=torch.float64)
    objective = Objective.dr_grpo(MAX_LENGTH).replace(
        entropy_coef=0.05, entropy_reduce=Reduce(per="token")
    )

    def expected(b: Batch) -> tuple[Tensor, Tensor]:
        tokens = f.ppo(b)
        loss = f.reduce_tokens(tokens, b.mask, "constant", length=MAX_LENGTH, normalizer=13.0)
        return tokens, loss - 0.05 * entropy[b.mask].mean()

    check(batch, objective, expected, entropy=entropy, normalizer=13.0)
