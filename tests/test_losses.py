"""Every preset, level, reduction, KL mode and layout against the published formulas of `formulas.py`, in float64.

Each configuration compares loss, token losses and gradient with autograd of an independent formula, elementwise to a
relative 1e-9, through the public function (whatever kernel serves it) and through the eager reference. Masked slots of
our inputs hold NaN, infinities and huge numbers; the formulas see finite ones.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastgrpo import Objective, policy_loss, reference
from fastgrpo.batch import LossInputs, prepare
from fastgrpo.choices import Reduce
from fastgrpo.functional.token_logprob import token_logprob
from fastgrpo.losses import grpo_loss
from tests import formulas as f
from tests.formulas import Batch, make_batch

GROUPS = torch.tensor(
    [4, 4, 7, 4, 7, 9]
)  # prompts of unequal size; the last answers alone and is fully masked
MAX_LENGTH = 9

# preset -> (objective, its printed token loss, the reduction it is published with)
PRESETS: dict[str, tuple[Objective, Callable[[Batch], Tensor]]] = {
    "grpo": (Objective.grpo(), f.ppo),
    "grpo-delta": (Objective.grpo(delta=1.5), lambda b: f.two_sided(b, 1.5)),
    "grpo-delta-below-clip": (Objective.grpo(delta=0.9), lambda b: f.two_sided(b, 0.9)),
    "dapo": (Objective.dapo(), lambda b: f.ppo(b, 0.2, 0.28)),
    "bnpo": (Objective.bnpo(epsilon=0.1, epsilon_high=0.3), lambda b: f.ppo(b, 0.1, 0.3)),
    "dr_grpo": (Objective.dr_grpo(MAX_LENGTH), f.ppo),
    "ppo": (Objective.ppo(epsilon=0.15), lambda b: f.ppo(b, 0.15, 0.15)),
    "ppo-dual-clip": (Objective.ppo(dual_clip=3.0), lambda b: f.dual_clip(b, 3.0)),
    "gspo": (Objective.gspo(), f.gspo),
    "gspo-wide": (
        Objective.gspo(epsilon=0.4, epsilon_high=0.6),
        lambda b: f.gspo(b, 0.4, 0.6),
    ),
    "gspo_token": (
        Objective.gspo_token(epsilon=0.4, epsilon_high=0.6),
        lambda b: f.gspo_token(b, 0.4, 0.6),
    ),
    "luspo": (Objective.luspo(epsilon=0.4, epsilon_high=0.6), lambda b: f.gspo(b, 0.4, 0.6)),
    "gmpo": (Objective.gmpo(epsilon=0.3, epsilon_high=0.5), lambda b: f.gmpo(b, 0.3, 0.5)),
    "cispo": (Objective.cispo(), f.cispo),
    "cispo-offset": (
        Objective.cispo(epsilon_low=0.8, epsilon_high=1.2),
        lambda b: f.cispo(b, 0.8, 1.2),
    ),
    "sapo": (Objective.sapo(), f.sapo),
    "vespo": (Objective.vespo(), f.vespo),
    "rloo": (Objective.rloo(), f.rloo),
    "reinforce": (Objective.reinforce(), f.reinforce),
    "gpg": (Objective.gpg(), f.reinforce),
    "topr": (Objective.topr(), f.topr),
    "dppo_tv": (Objective.dppo_tv(), f.dppo_tv),
    "dppo_kl": (Objective.dppo_kl(low=0.05, high=0.05), lambda b: f.dppo_kl(b, 0.05, 0.05)),
    "dro": (Objective.dro(beta=0.3), lambda b: f.dro(b, 0.3)),
}

# name -> (Reduce, what the plain formula needs, the keyword arguments of the loss)
REDUCTIONS: dict[str, tuple[Reduce, dict, dict]] = {
    "token": (Reduce(per="token"), {}, {}),
    "sequence": (Reduce(), {}, {}),
    "sequence-no-empty": (Reduce(count_empty=False), {"count_empty": False}, {}),
    "sequence-sum": (Reduce(power=0.0), {"power": 0.0}, {}),
    "sequence-sqrt": (Reduce(power=-0.5), {"power": -0.5}, {}),  # between GRPO and LUSPO
    "prompt-size": (
        Reduce(per="prompt"),
        {"groups": torch.arange(6) // 2},
        {"group_size": 2},
    ),
    "prompt-ids": (Reduce(per="prompt"), {"groups": GROUPS}, {"group_ids": GROUPS}),
    "prompt-ids-no-empty": (
        Reduce(per="prompt", count_empty=False),
        {"groups": GROUPS, "count_empty": False},
        {"group_ids": GROUPS},
    ),
    "constant": (Reduce(per="constant", length=MAX_LENGTH), {"length": MAX_LENGTH}, {}),
    "external": (Reduce(per="token"), {"normalizer": 37.5}, {"normalizer": 37.5}),
    "external-sequences": (Reduce(), {"normalizer": 11.0}, {"normalizer": torch.tensor(11.0)}),
}

BAD = (float("nan"), float("inf"), -float("inf"), 1e30)


def soil(x: Tensor, mask: Tensor, which: int) -> Tensor:
    """Fill masked slots with values that no arithmetic survives."""
    return torch.where(mask, x, BAD[which % len(BAD)])


class Layout:
    """The same batch padded [B, T] or packed [N] with cu_seqlens."""

    def __init__(self, batch: Batch, packed: bool, per_token: bool) -> None:
        self.mask, self.packed, self.per_token = batch.mask, packed, per_token
        lengths = torch.where(batch.mask, torch.arange(1, batch.mask.shape[1] + 1), 0).amax(1)
        self.kept = torch.arange(batch.mask.shape[1])[None, :] < lengths[:, None]
        self.cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()

    def pack(self, x: Tensor) -> Tensor:
        return x[self.kept] if self.packed else x

    def unpack(self, x: Tensor) -> Tensor:
        if not self.packed:
            return x
        out = torch.zeros(self.mask.shape, dtype=x.dtype)
        out[self.kept] = x
        return out

    def arguments(self, batch: Batch) -> dict[str, Tensor]:
        tensors = (batch.old, batch.ref, batch.rollout)
        names = ("old_logprob", "ref_logprob", "rollout_logprob")
        arguments = {
            name: self.pack(soil(x, self.mask, k))
            for k, (name, x) in enumerate(zip(names, tensors, strict=True))
        }
        advantage = batch.advantage
        if self.per_token:
            arguments["advantage"] = self.pack(soil(advantage, self.mask, 3))
        else:
            arguments["advantage"] = advantage[:, 0]
        arguments["mask"] = self.pack(self.mask)
        if self.packed:
            arguments["cu_seqlens"] = self.cu_seqlens
        return arguments


def close(actual: Tensor, expected: Tensor, what: str) -> None:
    """Elementwise relative 1e-9; below 1e-15 of the largest entry only rounding is left."""
    bound = 1e-9 * expected.abs() + 1e-15 * expected.abs().max().clamp(min=1e-3)
    error = (actual - expected).abs()
    assert bool((error <= bound).all()), f"{what}: {actual.tolist()} want {expected.tolist()}"


def check(
    batch: Batch,
    objective: Objective,
    expected: Callable[[Batch], tuple[Tensor, Tensor]],
    *,
    packed: bool = False,
    per_token: bool = False,
    **extra: object,
) -> None:
    """Loss, token losses and gradient of `policy_loss` and of the reference against `expected(batch)`."""
    layout = Layout(batch, packed, per_token)
    plain = batch.logprob.clone().requires_grad_()
    token_loss, loss = expected(batch.with_logprob(plain))
    (gradient,) = torch.autograd.grad(loss, plain, allow_unused=True, materialize_grads=True)
    ours = layout.pack(soil(batch.logprob, batch.mask, 0)).requires_grad_()
    arguments = layout.arguments(batch) | {k: v for k, v in extra.items() if v is not None}
    out = policy_loss(ours, objective=objective, **arguments)
    out.loss.backward()
    close(out.loss.detach(), loss.detach(), "loss")
    close(layout.unpack(ours.grad), torch.where(batch.mask, gradient, 0.0), "gradient")
    wanted = torch.where(batch.mask, token_loss, 0.0).detach()
    close(layout.unpack(out.token_loss.detach()), wanted, "token_loss")
    _check_reference(ours.detach(), objective, arguments, out.loss.detach(), ours.grad)


def _check_reference(logprob, objective, arguments, loss, gradient) -> None:
    """The eager specification says the same as whatever kernel the op dispatched to."""
    entropy = arguments.pop("entropy", None)
    inputs = LossInputs(objective=objective, **arguments)
    batch = prepare(inputs, logprob.shape, logprob, torch.float64, entropy is not None)
    flat = logprob.reshape(-1)
    spare = flat.new_empty(0) if entropy is None else entropy.detach().reshape(-1)
    value, _, dlogprob, _ = reference.policy_loss(
        flat, batch.advantage, batch.mask, batch.weight, *batch.sides(), spare,
        batch.entropy_weight, batch.cu_seqlens, batch.params, batch.spec, batch.surrogate,
    )  # fmt: skip
    close(value, loss, "reference loss")
    close(dlogprob, gradient.reshape(-1), "reference gradient")


def reduced(token_loss: Callable[[Batch], Tensor], reduction: str) -> Callable:
    reduce, needs, _ = REDUCTIONS[reduction]

    def expected(b: Batch) -> tuple[Tensor, Tensor]:
        tokens = token_loss(b)
        return tokens, f.reduce_tokens(tokens, b.mask, reduce.per, **needs)

    return expected


# 24 presets x 11 reductions; layout and advantage shape alternate so that each preset meets all four.
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("preset", PRESETS)
def test_preset_equals_its_published_formula(preset, reduction):
    objective, token_loss = PRESETS[preset]
    number = list(REDUCTIONS).index(reduction)
    per_token = number % 2 == 1 and preset not in ("gmpo", "vespo", "rloo")
    batch = make_batch(seed=number, per_token=per_token)
    reduce, _, extra = REDUCTIONS[reduction]
    check(
        batch,
        objective.replace(reduce=reduce),
        reduced(token_loss, reduction),
        packed=number % 4 >= 2,
        per_token=per_token,
        **extra,
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_carries_its_published_reduction(preset):
    reduce = PRESETS[preset][0].reduce
    name = preset.split("-")[0]
    if name in ("dapo", "bnpo", "cispo", "vespo", "gpg", "dppo_tv", "dppo_kl", "dro"):
        assert reduce == Reduce(per="token")
    elif name in ("luspo", "reinforce", "topr"):
        assert reduce == Reduce(power=0.0)
    elif name == "dr_grpo":
        assert reduce == Reduce(per="constant", length=MAX_LENGTH)
    else:
        assert reduce == Reduce()


# Levels x surrogates x gradients of the pooled ratio, with non-uniform factors inside a sequence: there the shared
# and the local gradient differ.
LEVELS = [(level, grad) for level in ("seq_mean", "seq_sum") for grad in ("shared", "local")]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("surrogate", ["ratio", "logp"])
@pytest.mark.parametrize(("level", "pool_grad"), [("token", "shared"), *LEVELS])
def test_level_surrogate_and_pool_gradient(level, surrogate, pool_grad, packed):
    batch = make_batch(seed=3, per_token=True, noise=0.1)
    weight = torch.linspace(0.2, 1.7, batch.mask.numel()).view(batch.mask.shape).double()
    objective = Objective(
        level=level,
        pool_grad=pool_grad,
        surrogate=surrogate,
        positive=(0.5, 1.3),
        negative=(0.7, 3.0),
    )

    def token_loss(b: Batch) -> Tensor:
        own = f.log_ratio(b)
        pooled = {"token": own, "seq_mean": f.mean(own, b.mask), "seq_sum": f.total(own, b.mask)}[
            level
        ]
        if pool_grad == "local":
            pooled = pooled.detach() + own - own.detach()
        r = pooled.exp().expand_as(own)
        low, high = (f.by_sign(b, x, y) for x, y in ((0.5, 0.7), (1.3, 3.0)))
        bounded = torch.maximum(torch.minimum(r, high), low)
        if surrogate == "logp":
            return -weight * b.advantage * bounded.detach() * b.logprob
        return -weight * b.advantage * bounded

    layout = Layout(batch, packed, True)
    check(batch, objective, reduced(token_loss, "sequence"), packed=packed, per_token=True,
          token_weight=layout.pack(soil(weight, batch.mask, 1)))  # fmt: skip


def test_gradient_through_token_loss_and_loss_together():
    batch = make_batch(seed=8)
    objective = Objective.gspo(epsilon=0.4, epsilon_high=0.6)
    upstream = torch.randn(batch.mask.shape, dtype=torch.float64)
    layout = Layout(batch, False, False)
    ours = batch.logprob.clone().requires_grad_()
    out = policy_loss(ours, objective=objective, **layout.arguments(batch))
    ((out.token_loss * upstream).sum() + 3 * out.loss).backward()
    plain = batch.logprob.clone().requires_grad_()
    tokens, loss = reduced(lambda b: f.gspo(b, 0.4, 0.6), "sequence")(batch.with_logprob(plain))
    (torch.where(batch.mask, tokens, 0.0) * upstream).sum().add(3 * loss).backward()
    close(ours.grad, torch.where(batch.mask, plain.grad, 0.0), "gradient")


def test_ratio_is_one_without_old_logprob():
    """`old_logprob=None`: the ratio is exp(l - sg(l)), 1 with a gradient, for every level."""
    batch = make_batch(seed=9)
    arguments = Layout(batch, False, False).arguments(batch)
    del arguments["old_logprob"]
    for level in ("token", "seq_mean", "seq_sum"):
        objective = Objective(level=level)
        ours = batch.logprob.clone().requires_grad_()
        policy_loss(ours, objective=objective, **arguments).loss.backward()
        fresh = replace(batch, old=batch.logprob.detach())
        plain = batch.logprob.clone().requires_grad_()

        def token_loss(b: Batch, level: str = level) -> Tensor:
            own = f.log_ratio(b)
            pooled = {
                "token": own,
                "seq_mean": f.mean(own, b.mask),
                "seq_sum": f.total(own, b.mask),
            }
            return -b.advantage * pooled[level].exp()

        _, loss = reduced(token_loss, "sequence")(fresh.with_logprob(plain))
        loss.backward()
        close(ours.grad, torch.where(batch.mask, plain.grad, 0.0), level)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("preset", PRESETS)
def test_one_pass_loss_equals_the_two_steps(preset, packed):
    """`grpo_loss` on logits: value and gradient of `token_logprob` followed by `policy_loss`."""
    batch = make_batch(seed=10, noise=0.1)
    layout = Layout(batch, packed, False)
    objective = PRESETS[preset][0].replace(entropy_coef=0.01)
    vocabulary = 11
    logits = torch.randn(*batch.mask.shape, vocabulary, dtype=torch.float64)
    ids = torch.randint(vocabulary, batch.mask.shape)
    arguments = layout.arguments(batch)
    scale = {"temperature": 0.7, "logit_scale": 1.5, "logit_softcap": 4.0}
    one = layout.pack(logits).requires_grad_()
    loss = grpo_loss(one, layout.pack(ids), objective=objective, **arguments, **scale).loss
    loss.backward()
    two = one.detach().clone().requires_grad_()
    mask = layout.pack(batch.mask)
    logprob, entropy = token_logprob(two, layout.pack(ids), mask=mask, with_entropy=True, **scale)
    twice = policy_loss(logprob, entropy=entropy, objective=objective, **arguments).loss
    twice.backward()
    close(loss.detach(), twice.detach(), "loss")
    assert torch.allclose(one.grad, two.grad, rtol=1e-9, atol=1e-14)


def test_all_masked_and_empty_batches_give_a_differentiable_zero():
    batch = make_batch(seed=11)
    for shape in ((3, 4), (0, 4), (3, 0)):
        logprob = torch.full(shape, float("nan"), dtype=torch.float64, requires_grad=True)
        dead = torch.zeros(shape, dtype=torch.bool)
        advantage = batch.advantage[: shape[0], 0]
        for objective, _ in PRESETS.values():
            out = policy_loss(logprob, advantage, dead, objective=objective)
            assert out.loss.item() == 0.0
            (gradient,) = torch.autograd.grad(out.loss, logprob)
            assert bool((gradient == 0).all())


def test_padded_and_packed_give_the_same_bits():
    batch = make_batch(seed=12)
    for objective, _ in PRESETS.values():
        results = []
        for packed in (False, True):
            layout = Layout(batch, packed, False)
            ours = layout.pack(batch.logprob.clone()).requires_grad_()
            out = policy_loss(ours, objective=objective, **layout.arguments(batch))
            out.loss.backward()
            results.append((out.loss.detach(), layout.unpack(ours.grad)))
        assert torch.equal(results[0][0], results[1][0]), objective.name
        assert torch.equal(results[0][1], results[1][1]), objective.name


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_a_tensor_as_grad_scale_must_be_positive_and_finite(scale):
    logits, ids = torch.randn(1, 2, 5, requires_grad=True), torch.zeros(1, 2, dtype=torch.long)
    mask = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="grad_scale must be > 0 and finite"):
        grpo_loss(logits, ids, torch.ones(1), mask, grad_scale=torch.tensor(scale))
