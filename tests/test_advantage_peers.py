"""Advantages as the installed TRL computes them, and as verl's and OpenRLHF's published formulas say."""

import inspect
import math
import textwrap
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastgrpo.advantages import (
    gae,
    group_advantage,
    reward_to_go,
    soft_overlong_penalty,
    token_reward,
    whiten,
)

NAN = math.nan
# TRL's Bessel factor n / (n - 1) is a float32 quotient of integers even where the rewards are float64.
TRL_ROUNDING = {"rtol": 1e-7, "atol": 1e-7}


def trl_advantages(reward: Tensor, size: int, weights: Tensor, scale: str, combine: str) -> Tensor:
    """Run the lines of TRL's trainer that turn rewards into advantages, from its source, on a stand-in trainer."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer")
    source = inspect.getsource(trainer.GRPOTrainer._generate_and_score_completions)
    begin = source.index("        unscorable_mask =")
    end = source.index("        # Slice to keep only the local part of the data")
    stand_in = SimpleNamespace(
        multi_objective_aggregation=combine,
        reward_weights=weights,
        scale_rewards=scale,
        reward_funcs=[None] * reward.shape[1],
    )
    names = {
        "self": stand_in,
        "rewards_per_func": reward.clone(),
        "num_generations": size,
        "device": reward.device,
    }
    exec(textwrap.dedent(source[begin:end]), vars(trainer) | names, names)
    advantages = names["advantages"]
    assert isinstance(advantages, Tensor)
    return advantages


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_trl_sum_then_normalize(scale: str, columns: int, missing: float) -> None:
    """Same numbers as TRL, in float64, wherever TRL's rounding does not invent a spread."""
    for _ in range(20):
        reward = torch.rand(24, columns).double()
        reward[torch.rand(24, columns) < missing] = NAN
        weights = torch.rand(columns).double()
        expected = trl_advantages(reward, 6, weights, scale, "sum_then_normalize")
        out = group_advantage(reward, group_size=6, scale=scale, reward_weights=weights)
        torch.testing.assert_close(out.advantage, expected, **TRL_ROUNDING)


@pytest.mark.parametrize("missing", [0.0, 0.2])
def test_trl_normalize_then_sum(missing: float) -> None:
    """GDPO. TRL gives 0 weight to a column with one scored member in a group, and so do we."""
    for _ in range(20):
        reward = torch.rand(24, 2).double()
        reward[torch.rand(24, 2) < missing] = NAN
        weights = torch.rand(2).double()
        expected = trl_advantages(reward, 6, weights, "group", "normalize_then_sum")
        out = group_advantage(
            reward, group_size=6, combine="normalize_then_sum", reward_weights=weights
        )
        torch.testing.assert_close(out.advantage, expected, **TRL_ROUNDING)


def test_trl_invents_advantages_for_equal_rewards() -> None:
    """The difference that is meant: float32 rounding of the mean, divided by 1e-4."""
    reward = (torch.rand(1000, 1) * 1000).repeat_interleave(7, 0)
    peer = trl_advantages(reward, 7, torch.ones(1), "group", "sum_then_normalize")
    assert (peer != 0).double().mean() > 0.2
    assert not group_advantage(reward, group_size=7).advantage.any()


def test_trl_soft_overlong_punishment() -> None:
    rewards = pytest.importorskip("trl.rewards")
    peer = rewards.get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    lengths = torch.tensor([1, 79, 80, 81, 90, 99, 100, 101, 500])
    expected = peer([[0] * int(n) for n in lengths])
    out = soft_overlong_penalty(lengths, max_length=100, buffer=20)
    torch.testing.assert_close(out, torch.tensor(expected, dtype=torch.float32))


def groups(reward: Tensor, ids: Tensor) -> list[Tensor]:
    return [(ids == g).nonzero().flatten() for g in ids.unique()]


def test_verl_grpo_with_its_singletons() -> None:
    """verl: (r - mean) / (std + 1e-6); a group of one has mean 0 and std 1, so it keeps its raw reward."""
    reward, ids = torch.rand(30).double(), torch.randint(0, 12, (30,))
    expected = torch.zeros(30).double()
    for rows in groups(reward, ids):
        mean, std = (reward[rows].mean(), reward[rows].std()) if len(rows) > 1 else (0.0, 1.0)
        expected[rows] = (reward[rows] - mean) / (std + 1e-6)
    out = group_advantage(reward, group_ids=ids, eps=1e-6, singleton="raw")
    torch.testing.assert_close(out.advantage, expected, rtol=2e-6, atol=0)


def test_verl_rloo_opo_passk() -> None:
    """Leave-one-out r * n / (n - 1) - mean * n / (n - 1); length-weighted baseline; best minus second best."""
    reward, ids = torch.rand(40).double(), torch.arange(40) % 8
    lengths = torch.randint(1, 100, (40,))
    rloo, opo, passk = torch.zeros(3, 40).double()
    for rows in groups(reward, ids):
        n, r, size = len(rows), reward[rows], lengths[rows].double()
        rloo[rows] = r * n / (n - 1) - r.mean() * n / (n - 1)
        opo[rows] = r - (size * r).sum() / size.sum()
        top, place = r.topk(2)
        passk[rows[place[0]]] = (top[0] - top[1]) / (r.std() + 1e-6)
    given = {"group_ids": ids, "scale": "none"}
    out = group_advantage(reward, baseline="leave_one_out", **given)
    torch.testing.assert_close(out.advantage, rloo)
    out = group_advantage(reward, baseline="length_weighted", lengths=lengths, **given)
    torch.testing.assert_close(out.advantage, opo)
    out = group_advantage(reward, group_ids=ids, baseline="second_best", scale="group", eps=1e-6)
    torch.testing.assert_close(out.advantage, passk)
    assert out.num_active == 8


def test_prime_max_rl() -> None:
    """(r - mean) / mean, and 0 where the mean is not positive."""
    reward = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0, 0.0, -1.0, 0.0])
    out = group_advantage(reward, group_size=4, scale="mean")
    assert out.advantage.tolist() == [3.0, -1.0, -1.0, -1.0] + [0.0] * 8


def masked_whiten(x: Tensor, mask: Tensor) -> Tensor:
    """verl: Bessel-corrected variance, eps 1e-8 under the root."""
    mean = (x * mask).sum() / mask.sum()
    variance = ((x - mean) ** 2 * mask).sum() / mask.sum()
    variance = variance * mask.sum() / (mask.sum() - 1)
    return (x - mean) * torch.rsqrt(variance + 1e-8)


def test_verl_reinforce_plus_plus_and_baseline() -> None:
    """Discounted returns whitened over tokens; r - group mean whitened over tokens."""
    lengths, width = torch.randint(2, 9, (12,)), 9
    mask = torch.arange(width) < lengths[:, None]
    reward = torch.rand(12).double()
    returns = torch.zeros(12, width).double()
    for i, n in enumerate(lengths.tolist()):
        for t in range(n):
            returns[i, t] = reward[i] * 0.9 ** (n - 1 - t)
    out = whiten(reward_to_go(token_reward(reward, mask), mask, gamma=0.9), mask)
    torch.testing.assert_close(out, masked_whiten(returns, mask) * mask)
    centred = reward - reward.view(3, 4).mean(1).repeat_interleave(4)
    expected = masked_whiten(centred[:, None] * mask, mask) * mask
    advantage = group_advantage(reward, group_size=4, scale="none").advantage
    torch.testing.assert_close(whiten(advantage[:, None].expand(12, width), mask), expected)


def test_openrlhf_whitening() -> None:
    """ddof 0, variance clamped from below at 1e-8."""
    x, mask = torch.randn(4, 6).double(), torch.rand(4, 6) < 0.7
    mean = (x * mask).sum() / mask.sum()
    variance = ((x - mean).square() * mask).sum() / mask.sum()
    expected = (x - mean) * variance.clamp(min=1e-8).rsqrt() * mask
    torch.testing.assert_close(whiten(x, mask, ddof=0, eps_on="floor"), expected)


def test_sequence_level_reinforce_plus_plus_is_a_choice() -> None:
    """Whitening over sequences is baseline="batch", scale="batch", apart from where eps stands."""
    reward = torch.rand(16).double()
    out = group_advantage(reward, group_size=4, baseline="batch", scale="batch", eps=0.0)
    torch.testing.assert_close(out.advantage, whiten(reward, eps=0.0))


def test_verl_gae_with_masked_tokens() -> None:
    """verl's column loop: masked tokens carry the next value and the running sum."""
    reward, value = torch.randn(5, 11).double(), torch.randn(5, 11).double()
    mask = torch.rand(5, 11) < 0.6
    m = mask.double()
    next_value, last, columns = 0.0, 0.0, []
    for t in reversed(range(11)):
        delta = reward[:, t] + 0.97 * next_value - value[:, t]
        candidate = delta + 0.97 * 0.9 * last
        next_value = value[:, t] * m[:, t] + (1 - m[:, t]) * next_value
        last = candidate * m[:, t] + (1 - m[:, t]) * last
        columns.append(last)
    expected = torch.stack(columns[::-1], 1)
    out = gae(reward, value, mask, gamma=0.97, lam=0.9)
    torch.testing.assert_close(out.advantage, torch.where(mask, expected, 0.0))
    torch.testing.assert_close(out.returns, torch.where(mask, expected + value, 0.0))
