"""Where systems give different losses under one name: each test says whose convention is which, and shows both.

The list is the one of the research note on losses, section 3. "Ours" is what a preset does; the other convention is a
field away. Parity with TRL, verl and Liger themselves is in `tests/integrations`.
"""

import math

import pytest
import torch
from torch import Tensor

from fastgrpo import Objective, policy_loss
from fastgrpo.choices import KL, Correction, Gate, Reduce
from fastgrpo.functional.token_logprob import token_logprob
from tests import formulas as f
from tests.formulas import Batch, make_batch
from tests.test_losses import close

GROUPS = torch.tensor([0, 0, 1, 1, 1, 2])


def run(b: Batch, objective: Objective, **extra) -> tuple[Tensor, Tensor]:
    leaf = b.logprob.clone().requires_grad_()
    out = policy_loss(
        leaf,
        b.advantage,
        b.mask,
        old_logprob=b.old,
        ref_logprob=b.ref,
        objective=objective,
        **extra,
    )
    out.loss.backward()
    return out.loss.detach(), leaf.grad


def differ(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) > 1e-3 * float(b.abs().max())


@pytest.fixture
def batch() -> Batch:
    b = make_batch(seed=4, noise=0.3)
    logprob = b.logprob.clamp(min=-4.0)
    return Batch(
        logprob,
        b.old.clamp(min=-5.0),
        b.ref.clamp(-5.0, -1e-3),
        b.rollout.clamp(min=-5.0),
        b.advantage,
        b.mask,
    )


def test_dapo_mean_over_the_batch_or_over_each_prompt(batch):
    """TRL, verl, OpenRLHF, NeMo-RL: one mean over all tokens (ours). DAPO's printed objective, ScaleRL: per prompt."""
    tokens = f.ppo(batch, 0.2, 0.28)
    everywhere, _ = run(batch, Objective.dapo())
    close(everywhere, f.reduce_tokens(tokens, batch.mask, "token"), "batch mean")
    printed = Objective.dapo().replace(reduce=Reduce(per="prompt"))
    per_prompt, _ = run(batch, printed, group_ids=GROUPS)
    close(per_prompt, f.reduce_tokens(tokens, batch.mask, "prompt", groups=GROUPS), "prompt mean")
    assert differ(everywhere, per_prompt)


@pytest.mark.parametrize("level", ["seq_sum", "seq_mean"])
def test_sequence_importance_weights_by_sum_or_by_geometric_mean(batch, level):
    """`sequence_mask`: TRL and verl take exp(sum), ms-swift and AReaL exp(mean). Ours has both, under those names."""
    correction = Correction(level=level, mode="mask", low=0.9, high=1.4)
    objective = Objective.grpo().replace(correction=correction)
    found, _ = run(batch, objective, rollout_logprob=batch.rollout)
    u = batch.old - batch.rollout
    pooled = (f.total if level == "seq_sum" else f.mean)(u, batch.mask)
    weight = pooled.exp()
    weight = torch.where((weight >= 0.9) & (weight <= 1.4), weight, 0.0)
    close(found, f.reduce_tokens(weight * f.ppo(batch), batch.mask, "sequence"), level)


def test_cispo_bounds_absolute_or_around_one(batch):
    """TRL, Liger, ms-swift, Unsloth: the weight is at most epsilon_high (ours). verl, slime, NeMo-RL: 1 +- epsilon.

    With TRL's default epsilon_high = 0.2 nearly every weight is 0.2: a REINFORCE five times weaker.
    """
    absolute, _ = run(batch, Objective.cispo(epsilon_high=0.2))
    around, _ = run(batch, Objective.cispo(epsilon_low=0.8, epsilon_high=1.2))
    close(absolute, f.reduce_tokens(f.cispo(batch, 0.0, 0.2), batch.mask, "token"), "absolute")
    close(around, f.reduce_tokens(f.cispo(batch, 0.8, 1.2), batch.mask, "token"), "around one")
    assert differ(absolute, around)


def test_dr_grpo_counts_sequences_not_only_the_constant(batch):
    """Dr. GRPO, TRL, verl >= 0.8: sum / (B L). verl before: sum / L, a gradient that grows with the micro-batch."""
    found, _ = run(batch, Objective.dr_grpo(16))
    total = f.reduce_tokens(f.ppo(batch), batch.mask, "token", normalizer=1.0)
    close(found, total / (16 * 6), "sum / (B L)")


def test_gspo_under_two_aggregations(batch):
    """Paper, OpenRLHF, NeMo-RL, verl main: mean over sequences (ours). verl 0.9.1 and TRL's default: over tokens."""
    ours, _ = run(batch, Objective.gspo())
    by_token, _ = run(batch, Objective.gspo().replace(reduce=Reduce(per="token")))
    close(ours, f.reduce_tokens(f.gspo(batch), batch.mask, "sequence"), "sequences")
    close(by_token, f.reduce_tokens(f.gspo(batch), batch.mask, "token"), "tokens")
    assert differ(ours, by_token)


def test_gspo_shared_and_local_gradients_agree_unless_factors_differ_inside_a_sequence(batch):
    """verl has the local form only, TRL the shared one: one gradient for uniform factors, two under token weights."""
    shared, local = (
        Objective.gspo(epsilon=0.3, epsilon_high=0.3),
        Objective.gspo_token(epsilon=0.3, epsilon_high=0.3),
    )
    value, gradient = run(batch, shared)
    same_value, same_gradient = run(batch, local)
    close(same_value, value, "value")
    assert torch.allclose(same_gradient, gradient, rtol=1e-9)
    weight = torch.linspace(0.2, 2.0, batch.mask.numel()).view(batch.mask.shape).double()
    value, gradient = run(batch, shared, token_weight=weight)
    same_value, other_gradient = run(batch, local, token_weight=weight)
    close(same_value, value, "value under token weights")
    assert differ(other_gradient, gradient)


def test_rejection_by_k1_in_two_directions(batch):
    """AReaL's k1 is +log(old / rollout), verl's and Unsloth's the negative: unequal bounds mean opposite things."""
    low, high = math.log(0.8), math.log(1.05)
    plus = Gate(stat="k1", low=low, high=high, between="old_rollout", scope="mask")
    minus = Gate(stat="k1", low=-high, high=-low, between="old_rollout", scope="mask")
    u = batch.old - batch.rollout
    for gate, statistic in ((plus, u), (minus, -u)):
        keep = batch.mask & (statistic >= low) & (statistic <= high)
        objective = Objective.grpo().replace(gates=(gate,))
        found, _ = run(batch, objective, rollout_logprob=batch.rollout)
        close(found, f.reduce_tokens(f.ppo(batch), keep, "sequence"), "k1")


def test_denominators_after_rejection_kept_or_dropped(batch):
    """TRL, NeMo-RL, AReaL, slime keep rejected tokens in the denominators; verl's rejection drops them."""
    bounds = {"stat": "k2", "high": 0.02, "between": "old_rollout"}
    shut = ((batch.old - batch.rollout) ** 2 / 2) > 0.02
    kept, _ = run(
        batch, Objective.dapo().replace(gates=(Gate(**bounds),)), rollout_logprob=batch.rollout
    )
    dropped, _ = run(
        batch,
        Objective.dapo().replace(gates=(Gate(**bounds, scope="mask"),)),
        rollout_logprob=batch.rollout,
    )
    tokens = f.ppo(batch, 0.2, 0.28)
    close(kept, f.reduce_tokens(torch.where(shut, 0.0, tokens), batch.mask, "token"), "kept")
    close(dropped, f.reduce_tokens(tokens, batch.mask & ~shut, "token"), "dropped")
    assert differ(kept, dropped)


def test_kl_goes_with_a_rejected_token_or_stays(batch):
    """TRL's off-policy mask and slime's OPSM keep the KL term of a dropped sequence; ms-swift's and verl's drop it."""
    gate = {"stat": "k2", "high": 0.02, "between": "old_rollout"}
    shut = ((batch.old - batch.rollout) ** 2 / 2) > 0.02
    pull = 0.1 * f.kl(batch, "k3", "path", torch.ones_like(batch.old))
    for scope, term in (("policy", pull), ("policy_and_kl", torch.where(shut, 0.0, pull))):
        objective = Objective.grpo(beta=0.1).replace(gates=(Gate(**gate, scope=scope),))
        found, _ = run(batch, objective, rollout_logprob=batch.rollout)
        tokens = torch.where(shut, 0.0, f.ppo(batch)) + term
        close(found, f.reduce_tokens(tokens, batch.mask, "sequence"), scope)


def test_kl_weighted_by_the_correction_or_not(batch):
    """ms-swift multiplies the KL term by the rollout weight; TRL, Liger, slime, NeMo-RL, OpenRLHF do not (ours)."""
    values = []
    for target in ("policy", "policy_and_kl"):
        correction = Correction(high=1.3, applies_to=target)
        objective = Objective.grpo(beta=0.5).replace(correction=correction)
        values.append(run(batch, objective, rollout_logprob=batch.rollout)[0])
    assert differ(values[0], values[1])


def test_four_kl_gradients_under_one_value_on_policy(batch):
    """Path (paper, Liger), k2 straight-through (verl's "+"), ratio (TRL >= 1.16, slime), detached ratio (OpenRLHF).

    With the old policy equal to the policy the values agree, and the ratio's gradient is k2's.
    """
    on_policy = Batch(
        batch.logprob, batch.logprob, batch.ref, batch.rollout, batch.advantage * 0, batch.mask
    )
    found = {
        mode: run(on_policy, Objective.grpo().replace(kl=KL(beta=1.0, gradient=mode)))
        for mode in ("path", "k2", "ratio", "ratio_detached")
    }
    for value, _ in found.values():
        close(value, found["path"][0], "value")
    close(found["ratio_detached"][1], found["path"][1], "a detached ratio of 1 changes nothing")
    for mode in ("k2", "ratio"):
        assert differ(found[mode][1], found["path"][1]), mode
    close(found["ratio"][1], found["k2"][1], "k3 - (exp(delta) - 1) = -delta")


def test_clamp_of_the_log_ratio():
    """verl, OpenRLHF and our presets: +-20, no gradient outside. TRL, NeMo-RL, AReaL, slime, ms-swift, Liger: none."""
    old = torch.tensor([[-26.0]], dtype=torch.float64)
    arguments = (torch.tensor([-1.0]).double(), torch.ones(1, 1, dtype=torch.bool))
    for clamp, ratio in ((20.0, math.exp(20)), (None, math.exp(25))):
        leaf = torch.full((1, 1), -1.0, dtype=torch.float64, requires_grad=True)
        out = policy_loss(
            leaf, *arguments, old_logprob=old, objective=Objective.grpo().replace(d_clamp=clamp)
        )
        out.loss.backward()
        close(out.loss.detach(), torch.tensor(ratio, dtype=torch.float64), "loss")
        assert leaf.grad.item() == pytest.approx(0.0 if clamp else ratio)
        assert int(out.metrics.sum("clamp_log_ratio")) == (1 if clamp else 0)


def test_bounds_are_inclusive():
    """Everybody: a ratio exactly on its bound is not clipped, and its metric counts strict excess only."""
    for sign, ratio in ((1.0, 1.25), (-1.0, 0.75)):
        leaf = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
        old = torch.full((1, 1), -math.log(ratio), dtype=torch.float64)
        exact = leaf.detach() - old
        bound = float(exact.exp())
        objective = Objective(positive=(-math.inf, bound), negative=(bound, math.inf))
        out = policy_loss(leaf, torch.tensor([sign]).double(), torch.ones(1, 1, dtype=torch.bool), old_logprob=old,
                          objective=objective)  # fmt: skip
        out.loss.backward()
        assert leaf.grad.item() == pytest.approx(-sign * bound)
        assert int(out.metrics.sum("clip_region")) == 0


def test_fully_masked_sequences_counted_or_not(batch):
    """TRL, and verl with a global batch size: counted (ours). verl alone, OpenRLHF, NeMo-RL: not."""
    assert not bool(batch.mask[-1].any())
    counted, _ = run(batch, Objective.grpo())
    skipped, _ = run(batch, Objective.grpo().replace(reduce=Reduce(count_empty=False)))
    close(skipped, counted * 6 / 5, "one of six sequences is empty")


def test_a_fully_masked_micro_batch_is_a_differentiable_zero(batch):
    """verl's token mean divides 0 by 0 there, and its rejection asserts; everybody else, and ours: 0 with a graph."""
    dead = Batch(
        batch.logprob,
        batch.old,
        batch.ref,
        batch.rollout,
        batch.advantage,
        torch.zeros_like(batch.mask),
    )
    for objective in (Objective.grpo(), Objective.dapo(), Objective.gspo(beta=0.1)):
        loss, gradient = run(dead, objective)
        assert loss.item() == 0.0
        assert bool((gradient == 0).all())


def test_temperature_belongs_to_log_prob_and_entropy_alike():
    """TRL, verl, slime, AReaL, prime-rl: both at T (ours). OpenRLHF 0.11.0 took the entropy at T = 1."""
    logits, ids = torch.randn(3, 17, dtype=torch.float64), torch.tensor([0, 5, 16])
    found = token_logprob(logits, ids, temperature=0.7, with_entropy=True)
    log_p = (logits / 0.7).log_softmax(-1)
    close(found.logprob, log_p.gather(-1, ids[:, None])[:, 0], "log-prob")
    close(found.entropy, -(log_p.exp() * log_p).sum(-1), "entropy")


def test_entropy_bonus_normaliser(batch):
    """TRL: always the mean over tokens of the micro-batch. verl, slime: as the policy term (ours unless told)."""
    entropy = torch.rand(batch.mask.shape, dtype=torch.float64) + 0.5
    policy, _ = run(batch, Objective.grpo())
    tied, _ = run(batch, Objective.grpo().replace(entropy_coef=0.1), entropy=entropy)
    own, _ = run(
        batch,
        Objective.grpo().replace(entropy_coef=0.1, entropy_reduce=Reduce(per="token")),
        entropy=entropy,
    )
    close(tied, policy - 0.1 * f.reduce_tokens(entropy, batch.mask, "sequence"), "tied")
    close(own, policy - 0.1 * entropy[batch.mask].mean(), "own")
    assert differ(tied, own)


def test_dual_clip_and_delta_agree_from_one_plus_epsilon_on(batch):
    """verl's always-on dual clip caps only A < 0; TRL's delta caps the unclipped branch of both signs."""
    for cap in (1.2, 3.0):
        a, b = run(batch, Objective.grpo(delta=cap)), run(batch, Objective.ppo(dual_clip=cap))
        close(a[0], b[0], "value")
        close(a[1], b[1], "gradient")
    a, b = run(batch, Objective.grpo(delta=1.05)), run(batch, Objective.ppo(dual_clip=1.05))
    assert differ(a[1], b[1])


def test_clip_fraction_metrics(batch):
    """TRL: low (A < 0) and high (A > 0) apart. verl, OpenRLHF, slime: one fraction, which is their union."""
    out = policy_loss(
        batch.logprob,
        batch.advantage,
        batch.mask,
        old_logprob=batch.old,
        objective=Objective.grpo(),
    )
    r, a = (batch.logprob - batch.old).exp(), batch.advantage
    low, high = (r < 0.8) & (a < 0), (r > 1.2) & (a > 0)
    close(out.metrics["clip_ratio/low_mean"], low[batch.mask].double().mean(), "low")
    close(out.metrics["clip_ratio/high_mean"], high[batch.mask].double().mean(), "high")
    second = -r.clamp(0.8, 1.2) * a > -r * a
    close(out.metrics["actor/pg_clipfrac"], second[batch.mask].double().mean(), "verl")
