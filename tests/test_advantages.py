# ruff: noqa: E501
"""Process and turn advantages, GAE, value loss, shaping: hand-computed examples, loops, invariances, arguments."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrpo.advantages import (
    drop_rows,
    dynamic_sampling_filter,
    gae,
    group_advantage,
    is_truncated,
    kl_in_reward,
    process_advantage,
    reward_to_go,
    segment_scan,
    soft_overlong_penalty,
    token_reward,
    value_loss,
    whiten,
)
from tests import advantage_formulas as plain

NAN = math.nan


def ends_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def unpack(padded: Tensor, lengths: list[int]) -> Tensor:
    return torch.cat([row[:n] for row, n in zip(padded, lengths, strict=True)])


def test_process_advantage_by_hand() -> None:
    """The paper's rule on rewards 1, 2 | 3 | 6 of one group: mean 3, variance 14 / 3, steps summed from the right."""
    std = math.sqrt(14 / 3)
    z = [(r - 3) / std for r in (1, 2, 3, 6)]
    out = process_advantage(
        torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64),
        torch.tensor([1, 3, 0, 4]),
        torch.tensor([0, 0, 1, 2]),
        group_size=3,
        num_sequences=3,
        length=5,
        eps=0.0,
    )
    expected = [
        [z[0] + z[1], z[0] + z[1], z[1], z[1], 0.0],
        [z[2], 0.0, 0.0, 0.0, 0.0],
        [z[3]] * 5,
    ]
    torch.testing.assert_close(out, torch.tensor(expected, dtype=torch.float64))


def test_process_advantage_matches_loop() -> None:
    """1000 ragged cases, padded and packed with the same bits; steps in any order, several at a token, empty ones."""
    for case in range(1000):
        count, groups = int(torch.randint(1, 6, ())), int(torch.randint(1, 3, ()))
        lengths = torch.randint(1, 8, (count,)).tolist()
        steps = int(torch.randint(1, 12, ()))
        sequence = torch.randint(0, count, (steps,))
        end = torch.tensor([int(torch.randint(0, lengths[i], ())) for i in sequence.tolist()])
        reward = torch.randint(0, 4, (steps,)).double() / 3
        ids = torch.randint(0, groups, (count,))
        gamma = 1.0 if case % 2 else 0.5
        kwargs = {"group_ids": ids, "eps": 1e-4, "ddof": case % 2, "gamma": gamma}
        padded = process_advantage(reward, end, sequence, length=9, **kwargs)
        packed = process_advantage(
            reward, end, sequence, length=sum(lengths), cu_seqlens=ends_of(lengths), **kwargs
        )
        assert torch.equal(packed, unpack(padded, lengths))
        expected = plain.process(
            reward.tolist(),
            end.tolist(),
            sequence.tolist(),
            ids.tolist(),
            lengths,
            eps=1e-4,
            ddof=case % 2,
            gamma=gamma,
        )
        for row, length, want in zip(padded, lengths, expected, strict=True):
            torch.testing.assert_close(
                row[:length], torch.tensor(want, dtype=torch.float64), rtol=1e-10, atol=1e-10
            )
            assert not row[length:].any()


def test_process_advantage_of_one_step_is_the_outcome_advantage() -> None:
    """One step at the last token: every token has the group advantage."""
    reward = torch.rand(6)
    out = process_advantage(
        reward, torch.full((6,), 3), torch.arange(6), group_size=3, num_sequences=6, length=4
    )
    expected = group_advantage(reward, group_size=3).advantage
    torch.testing.assert_close(out, expected[:, None].expand(6, 4))


def test_process_advantage_of_equal_steps_is_exactly_zero() -> None:
    steps = torch.arange(64) % 8
    out = process_advantage(
        torch.full((64,), 0.1), steps, steps, group_size=8, num_sequences=8, length=8
    )
    assert not out.any()


def test_turn_rewards_without_normalisation_are_discounted_sums() -> None:
    out = process_advantage(
        torch.tensor([1.0, 2.0, 4.0]),
        torch.tensor([1, 2, 4]),
        torch.zeros(3, dtype=torch.int64),
        group_size=1,
        num_sequences=1,
        length=6,
        baseline="none",
        scale="none",
        gamma=0.5,
    )
    assert out.tolist() == [[3.0, 3.0, 4.0, 4.0, 4.0, 0.0]]


def test_process_advantage_gradient() -> None:
    reward = torch.rand(7, dtype=torch.float64, requires_grad=True)
    end, sequence = torch.tensor([0, 2, 4, 1, 1, 3, 0]), torch.tensor([0, 0, 0, 1, 2, 2, 3])

    def run(r: Tensor) -> Tensor:
        return process_advantage(
            r, end, sequence, group_size=2, num_sequences=4, length=5, gamma=0.9
        )

    assert torch.autograd.gradcheck(run, (reward,), atol=1e-6)


def test_gae_by_hand() -> None:
    """Gamma .5, lambda .5, a masked token in the middle: deltas 2.5 at its left, 1 at its right."""
    out = gae(
        torch.tensor([[2.0, 77.0, 1.0, NAN]]),
        torch.tensor([[0.5, NAN, 2.0, NAN, 4.0]]),
        torch.tensor([[True, False, True, False]]),
        gamma=0.5,
        lam=0.5,
    )
    right = 1.0 + 0.5 * 4.0 - 2.0
    left = 2.0 + 0.5 * 2.0 - 0.5 + 0.25 * right
    assert out.advantage.tolist() == [[left, 0.0, right, 0.0]]
    assert out.returns.tolist() == [[left + 0.5, 0.0, right + 2.0, 0.0]]


def test_gae_matches_loop() -> None:
    """1000 ragged cases with holes in the mask and garbage in masked slots; padded and packed give the same bits."""
    for _ in range(1000):
        count = int(torch.randint(1, 4, ()))
        lengths = torch.randint(1, 10, (count,)).tolist()
        width = max(lengths) + int(torch.randint(0, 3, ()))
        mask = torch.rand(count, width) < 0.7
        mask &= torch.arange(width) < torch.tensor(lengths)[:, None]
        reward = torch.randn(count, width).double().masked_fill(~mask, NAN)
        value = torch.randn(count, width).double().masked_fill(~mask, math.inf)
        final = torch.randn(count).double()
        gamma, lam = torch.rand(2).tolist()
        out = gae(reward, torch.cat([value, final[:, None]], 1), mask, gamma=gamma, lam=lam)
        rows = zip(reward.tolist(), value.tolist(), mask.tolist(), final.tolist(), strict=True)
        expected = [plain.gae(r, v, m, gamma, lam, b) for r, v, m, b in rows]
        torch.testing.assert_close(
            out.advantage, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
        )
        torch.testing.assert_close(
            out.returns, torch.where(mask, out.advantage + value, 0.0), rtol=1e-12, atol=1e-12
        )
        packed = gae(
            unpack(reward, lengths),
            unpack(value, lengths),
            unpack(mask, lengths),
            gamma=gamma,
            lam=lam,
            bootstrap=final,
            cu_seqlens=ends_of(lengths),
        )
        assert torch.equal(packed.advantage, unpack(out.advantage, lengths))
        assert torch.equal(packed.returns, unpack(out.returns, lengths))


def test_gae_with_lambda_one_is_the_return() -> None:
    """A known identity: A = rewards to go - V."""
    reward, value = torch.randn(3, 8).double(), torch.randn(3, 8).double()
    mask = torch.rand(3, 8) < 0.8
    out = gae(reward, value, mask, gamma=0.9, lam=1.0)
    total = reward_to_go(reward, mask, gamma=0.9)
    torch.testing.assert_close(out.returns, total)
    torch.testing.assert_close(out.advantage, torch.where(mask, total - value, 0.0))


def test_gae_and_value_loss_gradients() -> None:
    reward = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    value = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]]).bool()
    assert torch.autograd.gradcheck(
        lambda r, v: tuple(gae(r, v, mask, gamma=0.9, lam=0.8)), (reward, value)
    )
    target, old = torch.randn(2, 5).double(), value[:, :5].detach() + torch.randn(2, 5)
    assert torch.autograd.gradcheck(
        lambda v: value_loss(v, target, mask, old_value=old, clip=0.5).loss, (value[:, :5],)
    )


def test_value_loss_against_the_formula() -> None:
    value, target, old = torch.randn(3, 6), torch.randn(3, 6), torch.randn(3, 6)
    mask = torch.rand(3, 6) < 0.7
    live = mask.nonzero().tolist()
    losses, clipped = [], 0
    for i, t in live:
        v, r, o = float(value[i, t]), float(target[i, t]), float(old[i, t])
        near = min(max(v, o - 0.3), o + 0.3)
        losses.append(0.5 * max((v - r) ** 2, (near - r) ** 2))
        clipped += (near - r) ** 2 > (v - r) ** 2
    garbage = torch.where(mask, value, NAN).requires_grad_()
    out = value_loss(garbage, torch.where(mask, target, NAN), mask, old_value=old, clip=0.3)
    assert out.loss.item() == pytest.approx(sum(losses) / len(live), rel=1e-5)
    assert out.clip_fraction.item() == pytest.approx(clipped / len(live))
    out.loss.backward()
    assert garbage.grad is not None
    assert garbage.grad.isfinite().all()
    half = value_loss(value, target, mask, normalizer=2 * len(live)).loss
    assert half.item() == pytest.approx(value_loss(value, target, mask).loss.item() / 2)


def test_value_loss_of_nothing_is_a_differentiable_zero() -> None:
    value = torch.randn(2, 3, requires_grad=True)
    out = value_loss(value, torch.randn(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    out.loss.backward()
    assert out.loss == 0
    assert value.grad is not None
    assert not value.grad.any()


def test_token_reward_and_kl_in_reward() -> None:
    """Eq. 2: the reward stands on the last live token, every live token pays beta * (log pi - log pi_ref)."""
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]).bool()
    reward = torch.tensor([2.0, 3.0, 5.0])
    placed = token_reward(reward, mask)
    assert placed.tolist() == [[0, 2, 0, 0], [0, 0, 3, 0], [0, 0, 0, 0]]
    logprob, ref = torch.randn(3, 4), torch.randn(3, 4)
    out = kl_in_reward(reward, logprob.masked_fill(~mask, NAN), ref, mask, beta=0.1)
    expected = torch.where(mask, placed - 0.1 * (logprob - ref), 0.0)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(kl_in_reward(placed, logprob, ref, mask, beta=0.1), expected)
    lengths = [3, 4, 2]
    packed = kl_in_reward(
        reward,
        unpack(logprob, lengths),
        unpack(ref, lengths),
        unpack(mask, lengths),
        beta=0.1,
        estimator="k3",
        cu_seqlens=ends_of(lengths),
    )
    delta = ref - logprob
    k3 = torch.where(mask, placed - 0.1 * (delta.exp() - 1 - delta), 0.0)
    torch.testing.assert_close(packed, unpack(k3, lengths), rtol=1e-5, atol=1e-6)


def test_truncated_and_dropped_rows() -> None:
    ids = torch.tensor([[4, 9, 0, 0], [4, 4, 4, 4], [9, 4, 8, 9], [9, 9, 9, 9]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]])
    cut = is_truncated(ids, mask, 9)
    assert cut.tolist() == [False, True, True, False]
    assert is_truncated(ids, mask, [9, 8]).tolist() == [False, True, False, False]
    lengths = [2, 4, 4, 1]
    packed = is_truncated(
        unpack(ids, lengths), unpack(mask, lengths), 9, cu_seqlens=ends_of(lengths)
    )
    assert torch.equal(packed, cut)
    assert drop_rows(mask, cut).sum(dim=1).tolist() == [2, 0, 0, 0]


def test_dynamic_sampling_keeps_groups_with_a_spread() -> None:
    reward = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0, NAN, 3.0])
    rows = dynamic_sampling_filter(group_advantage(reward, group_size=2).is_degenerate)
    assert rows.row_index.tolist() == [2, 3, -1, -1, -1, -1, -1, -1]
    assert rows.num_rows == 2


@pytest.mark.parametrize("eps_on", ["variance", "std", "floor"])
@pytest.mark.parametrize("ddof", [0, 1])
def test_whiten(eps_on: str, ddof: int) -> None:
    x, mask = torch.randn(5, 7).double() + 1e6, torch.rand(5, 7) < 0.6
    live = x[mask]
    variance = live.var(correction=ddof)
    divisor = {
        "variance": (variance + 0.1).sqrt(),
        "std": variance.sqrt() + 0.1,
        "floor": variance.clamp(min=0.1).sqrt(),
    }[eps_on]
    out = whiten(x.masked_fill(~mask, NAN), mask, ddof=ddof, eps=0.1, eps_on=eps_on)
    torch.testing.assert_close(out[mask], (live - live.mean()) / divisor, rtol=1e-9, atol=1e-9)
    assert not out[~mask].any()
    kept = whiten(x, mask, ddof=ddof, eps=0.1, eps_on=eps_on, shift_mean=False)
    torch.testing.assert_close(kept[mask], live / divisor)
    small = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: whiten(t, ddof=ddof, eps_on=eps_on), (small,))


def test_whiten_equal_entries_are_exactly_zero() -> None:
    for value in (0.1, 1 / 3, 1e6 + 0.7):
        assert not whiten(torch.full((999,), value)).any()
    assert not whiten(torch.ones(3), torch.zeros(3, dtype=torch.bool)).any()


def test_segment_scan_cuts_and_keeps_faults_in_their_sequence() -> None:
    """A NaN stays in its sequence, and behind a decay of exactly 0."""
    x = torch.tensor([1.0, NAN, 2.0, 3.0, 4.0, NAN, 5.0])
    decay = torch.tensor([1.0, 1.0, 1.0, 0.5, 0.0, 1.0, 1.0])
    ends = torch.tensor([0, 2, 7], dtype=torch.int32)
    out = segment_scan(x, decay, cu_seqlens=ends)
    assert out[:2].isnan().all()
    assert out[2:5].tolist() == [7.0, 5.0, 4.0]
    assert out[5].isnan()
    assert out[6] == 5
    forward = segment_scan(x[2:5], decay[2:5], cu_seqlens=torch.tensor([0, 3]), reverse=False)
    assert forward.tolist() == [2.0, 4.0, 4.0]


def test_segment_scan_gradient_to_second_order() -> None:
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    decay = torch.rand(3, 6).double()
    for reverse in (True, False):
        run = lambda t: segment_scan(t, decay, reverse=reverse)  # noqa: B023, E731
        assert torch.autograd.gradcheck(run, (x,))
        assert torch.autograd.gradgradcheck(run, (x,))


S, T2 = torch.rand(3), torch.rand(2, 4)
I, M2 = torch.tensor([0, 1, 2]), torch.ones(2, 4, dtype=torch.bool)
STEP: dict[str, Any] = {"group_size": 2, "num_sequences": 2, "length": 4}
BAD: list[tuple[str, type[Exception], str, Callable[[], Any]]] = [
    ("step dims", ValueError, r"step_reward .*\[S\].*\(2, 4\)", lambda: process_advantage(T2, I, I, **STEP)),
    ("step dtype", TypeError, r"step_reward .*int64", lambda: process_advantage(I, I, I, **STEP)),
    ("end shape", ValueError, r"step_end .*\(3,\).*\(2,\)", lambda: process_advantage(S, I[:2], I, **STEP)),
    ("end value", ValueError, r"steps must end inside", lambda: process_advantage(S, I + 2, I % 2, **STEP)),
    ("owner value", ValueError, r"sequence_ids in \[0, 2\)", lambda: process_advantage(S, I, I, **STEP)),
    ("no count", ValueError, r"num_sequences must be given", lambda: process_advantage(S, I, I, group_size=1, length=4)),
    ("counts", ValueError, r"num_sequences: 2, group_ids: 3", lambda: process_advantage(S, I, I, group_ids=I, num_sequences=2, length=4)),
    ("remainder", ValueError, r"num_sequences=3 .*group_size=2", lambda: process_advantage(S, I, I, group_size=2, num_sequences=3, length=4)),
    ("length", ValueError, r"length must be an integer", lambda: process_advantage(S, I, I, group_size=1, num_sequences=3, length=-1)),
    ("gamma", ValueError, r"gamma must be in \[0, 1\], got 2", lambda: process_advantage(S, I, I, gamma=2.0, **STEP)),
    ("falling ends", ValueError, r"cu_seqlens must rise", lambda: process_advantage(S, I, I, group_ids=I, cu_seqlens=torch.tensor([0, 3, 2, 9]), length=9)),
    ("gae mask", ValueError, r"mask .*\(2, 4\).*\(2, 3\)", lambda: gae(T2, T2, M2[:, :3])),
    ("gae value", ValueError, r"value .*\(2, 4\).*\(2, 3\)", lambda: gae(T2, T2[:, :3], M2)),
    ("gae bootstrap", ValueError, r"bootstrap .*\(2,\).*\(3,\)", lambda: gae(T2, T2, M2, bootstrap=S)),
    ("gae twice", ValueError, r"bootstrap must not be given", lambda: gae(T2, torch.rand(2, 5), M2, bootstrap=S[:2])),
    ("gae lam", ValueError, r"lam must be in \[0, 1\], got 1.5", lambda: gae(T2, T2, M2, lam=1.5)),
    ("gae packed", ValueError, r"reward .*\[B, T\], or \[N\]", lambda: gae(S, S, S > 0)),
    ("float mask", TypeError, r"mask .*float32", lambda: gae(T2, T2, T2)),
    ("value clip", ValueError, r"old_value and clip go together", lambda: value_loss(T2, T2, M2, clip=0.2)),
    ("value returns", ValueError, r"returns .*\(2, 4\).*\(3,\)", lambda: value_loss(T2, S, M2)),
    ("returns grad", ValueError, r"returns .*no gradient", lambda: value_loss(T2, T2.clone().requires_grad_(), M2)),
    ("beta", ValueError, r"beta must be >= 0", lambda: kl_in_reward(S[:2], T2, T2, M2, beta=-1.0)),
    ("reward rows", ValueError, r"reward .*\(2,\).*\(3,\)", lambda: kl_in_reward(S, T2, T2, M2, beta=0.1)),
    ("buffer", ValueError, r"0 < buffer <= max_length", lambda: soft_overlong_penalty(I, max_length=4, buffer=5)),
    ("eos", ValueError, r"at least one token", lambda: is_truncated(M2.long(), M2, [])),
    ("rows", ValueError, r"rows .*\(2,\).*\(3,\)", lambda: drop_rows(M2, S > 0)),
    ("degenerate", TypeError, r"is_degenerate .*float32", lambda: dynamic_sampling_filter(S)),
    ("whiten ddof", ValueError, r"ddof must be 0 or 1", lambda: whiten(S, ddof=3)),
    ("whiten eps_on", ValueError, r"eps_on must be", lambda: whiten(S, eps_on="sum")),
    ("scan decay", ValueError, r"decay .*\(2, 4\).*\(3,\)", lambda: segment_scan(T2, S)),
    ("scan packed", ValueError, r"packed input needs x", lambda: segment_scan(T2, cu_seqlens=I)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "message", "call"), [b[1:] for b in BAD], ids=[b[0] for b in BAD]
)
def test_bad_arguments(error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=message):
        call()


def test_empty_inputs() -> None:
    nothing = torch.empty(0, 4)
    assert gae(nothing, nothing, nothing > 0).advantage.shape == (0, 4)
    none = torch.empty(2, 0)
    assert gae(none, none, none > 0, bootstrap=torch.ones(2)).returns.shape == (2, 0)
    no_steps = torch.empty(0, dtype=torch.int64)
    assert not process_advantage(torch.empty(0), no_steps, no_steps, **STEP).any()
    assert token_reward(torch.empty(0), nothing > 0).shape == (0, 4)
    assert whiten(torch.empty(0)).shape == (0,)
