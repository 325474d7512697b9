"""Row plans: which tokens are multiplied, which only scored, and that a plan changes no result."""

import pytest
import torch

from fastgrpo import Objective, RowPlan, group_advantage, linear_grpo_loss, plan_rows
from fastgrpo.choices import KL, Gate
from tests.linear_cases import OBJECTIVES, ROW_BYTES, T, make_batch

MASK = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 0], [1, 1, 1]], dtype=torch.bool)
ADVANTAGE = torch.tensor([0.5, 0.0, 1.0, -1.0])
LIVE = [0, 1, 3, 5, 9, 10, 11]


def indices(plan):
    return plan.active_index.tolist(), plan.score_index.tolist()


def test_zero_advantage_is_scored_only():
    assert indices(plan_rows(MASK, ADVANTAGE)) == ([0, 1, 9, 10, 11], [3, 5])
    assert indices(plan_rows(MASK, ADVANTAGE, score_inactive=False)) == ([0, 1, 9, 10, 11], [])


@pytest.mark.parametrize(
    "objective",
    [
        Objective.grpo(beta=0.1),
        Objective.grpo().replace(entropy_coef=0.1),
        Objective(surrogate="topr_like"),
    ],
    ids=["kl", "entropy bonus", "a surrogate that nobody knows"],
)
def test_other_gradients_keep_every_live_token(objective):
    if objective.surrogate == "topr_like":
        from fastgrpo import register_surrogate

        register_surrogate("topr_like", None, lambda s, a, p: (s, torch.ones_like(s)))
    assert indices(plan_rows(MASK, ADVANTAGE, objective=objective)) == (LIVE, [])


def test_weights_of_zero_remove_a_gradient():
    weight = torch.ones(4, 3)
    weight[0, 0] = weight[3, 1] = 0.0
    assert indices(plan_rows(MASK, ADVANTAGE, token_weight=weight)) == ([1, 9, 11], [0, 3, 5, 10])
    objective = Objective.grpo(beta=0.1)
    assert indices(plan_rows(MASK, ADVANTAGE, objective=objective, token_weight=weight)) == (
        LIVE,
        [],
    )
    plan = plan_rows(MASK, ADVANTAGE, objective=objective, token_weight=weight, kl_weight=weight)
    assert indices(plan) == ([1, 3, 5, 9, 11], [0, 10])


def test_nan_advantage_is_active():
    """A fault must reach the loss, not be skipped."""
    advantage = torch.tensor([0.5, torch.nan, 1.0, -1.0])
    assert indices(plan_rows(MASK, advantage)) == (LIVE, [])


@pytest.mark.parametrize(
    "objective",
    [
        Objective.gspo(),
        Objective.dapo().replace(gates=(Gate(stat="k1", pool="seq_sum", high=1.0),)),
    ],
)
def test_sequences_stay_whole(objective):
    """A pooled ratio or gate needs every token of a sequence that has any gradient."""
    advantage = torch.zeros(4, 3)
    advantage[0, 1] = 1.0
    plan = plan_rows(MASK, advantage, objective=objective)
    assert indices(plan) == ([0, 1], [3, 5, 9, 10, 11])
    assert plan.active_ends == [2, 2, 2, 2]
    assert plan.score_ends == [0, 2, 2, 5]
    assert plan.active_offsets.tolist() == [0, 2, 2, 2, 2]
    assert plan.score_offsets.tolist() == [0, 0, 2, 2, 5]
    token_local = plan_rows(MASK, advantage)
    assert token_local.active_offsets is None
    assert indices(token_local) == ([1], [0, 3, 5, 9, 10, 11])


def test_packed_and_per_token_advantages():
    keep = torch.ones_like(MASK)
    keep[0, 2] = keep[2, 1] = False
    offsets = torch.tensor([0, 2, 5, 7, 10])
    packed = plan_rows(MASK[keep], ADVANTAGE, cu_seqlens=offsets)
    assert indices(packed) == ([0, 1, 7, 8, 9], [2, 4])
    per_token = ADVANTAGE[:, None].expand(4, 3)[keep].contiguous()
    assert indices(plan_rows(MASK[keep], per_token, cu_seqlens=offsets)) == indices(packed)


def test_static_plan():
    plan = plan_rows(MASK, ADVANTAGE, capacity=9)
    assert plan.num_active == 9
    assert plan.active_index[:7].tolist() == LIVE
    assert not plan.overflow
    assert plan_rows(MASK, ADVANTAGE, capacity=6).overflow
    assert plan_rows(MASK, ADVANTAGE, capacity=99).active_index.tolist() == list(range(12))


def test_degenerate_groups_of_group_advantage():
    """Equal rewards give an advantage of exactly 0, so the whole group costs no gradient product."""
    reward = torch.tensor([0.3, 0.3, 0.3, 1.0, 0.0, 1.0])
    advantage = group_advantage(reward, group_size=3).advantage
    plan = plan_rows(torch.ones(6, 2, dtype=torch.bool), advantage)
    assert plan.active_index.tolist() == list(range(6, 12))
    assert plan.num_scored == 6


@pytest.mark.parametrize("name", ["grpo", "gspo", "grpo, kl", "sequence gate"])
def test_a_plan_changes_no_bit(name):
    batch, objective = make_batch(), OBJECTIVES[name]
    plan = plan_rows(batch.mask, batch.advantage, objective=objective)
    outcomes = []
    for given in (None, plan, plan.to("cpu")):
        leaves = batch.leaves()
        out = linear_grpo_loss(
            leaves[0], leaves[1], batch.token_ids, batch.advantage, batch.mask, bias=leaves[2], plan=given,
            objective=objective, workspace_bytes=8 * ROW_BYTES, **batch.options(),
        )  # fmt: skip
        outcomes.append(
            [out.loss, out.logprob, out.metrics.data, *torch.autograd.grad(out.loss, leaves)]
        )
    for x, *others in zip(*outcomes, strict=True):
        assert all(torch.equal(x, y) for y in others)


def test_a_plan_from_a_wider_mask_is_fine():
    """Rows that the loss masks itself (here by a gate between old and rollout) are planned but count for nothing."""
    gate = Gate(stat="k1", between="old_rollout", scope="mask", low=-0.1, high=0.1)
    objective = Objective.grpo(beta=0.1).replace(gates=(gate,))
    batch = make_batch()
    rollout = batch.old_logprob + 0.2 * (torch.arange(T) % 2)
    outcomes = []
    for plan in (None, plan_rows(batch.mask, batch.advantage, objective=objective)):
        leaves = batch.leaves()
        out = linear_grpo_loss(
            leaves[0], leaves[1], batch.token_ids, batch.advantage, batch.mask, bias=leaves[2], plan=plan,
            objective=objective, rollout_logprob=rollout, **batch.options(),
        )  # fmt: skip
        outcomes.append([out.loss, out.logprob, *torch.autograd.grad(out.loss, leaves)])
    for x, y in zip(*outcomes, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)


def test_move():
    plan = plan_rows(MASK, ADVANTAGE, objective=Objective.gspo())
    moved = plan.to("meta")
    assert moved.active_index.device.type == moved.score_offsets.device.type == "meta"
    assert moved.active_ends == plan.active_ends
    assert isinstance(moved, RowPlan)


def test_kl_towards_the_old_policy_counts():
    objective = Objective.grpo().replace(kl=KL(beta=0.1, estimator="k2", target="old"))
    assert indices(plan_rows(MASK, ADVANTAGE, objective=objective)) == (LIVE, [])
