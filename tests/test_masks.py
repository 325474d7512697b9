# ruff: noqa: E501
"""Batch-global token weights against formulas written as loops, and against the installed TRL."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrpo.masks import (
    clip_cov_weight,
    fipo_weight,
    kl_cov_weight,
    m2po_weight,
    masked_quantile,
    off_policy_sequence_weight,
    top_entropy_weight,
)

NAN = math.nan


def batch(rows: int = 6, width: int = 9) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, old log-probs, per-token advantages and a mask with holes; garbage in masked slots."""
    mask = torch.rand(rows, width) < 0.7
    logprob = -torch.rand(rows, width).double() * 3
    old = logprob + torch.randn(rows, width) * 0.3
    advantage = torch.randn(rows, 1).double().expand(rows, width).clone()
    garbage = [t.masked_fill(~mask, NAN) for t in (logprob, old, advantage)]
    return garbage[0], garbage[1], garbage[2], mask


def test_masked_quantile_is_torch_quantile() -> None:
    for _ in range(50):
        x, mask = torch.randn(40).double(), torch.rand(40) < torch.rand(())
        q = float(torch.rand(()))
        if mask.any():
            expected = torch.quantile(x[mask], q)
            torch.testing.assert_close(masked_quantile(x, mask, q), expected)
    assert masked_quantile(torch.ones(3), torch.zeros(3, dtype=torch.bool), 0.5).isnan()
    assert masked_quantile(torch.empty(0), torch.empty(0, dtype=torch.bool), 0.5).isnan()


def test_top_entropy_is_trl() -> None:
    trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    one_rank = SimpleNamespace(
        accelerator=SimpleNamespace(
            pad_across_processes=lambda x, dim, pad_index: x, gather=lambda x: x
        )
    )
    for q in (0.0, 0.5, 0.8, 0.95, 1.0):
        entropy, mask = torch.rand(5, 30), torch.rand(5, 30) < 0.7
        expected = trainer.get_high_entropy_mask(one_rank, entropy, mask.int(), q)
        weight = top_entropy_weight(entropy.masked_fill(~mask, NAN), mask, quantile=q)
        assert torch.equal(weight, expected.float())
    assert not top_entropy_weight(entropy, torch.zeros_like(mask)).any()
    high = top_entropy_weight(entropy, mask, threshold=torch.tensor(0.9))
    assert torch.equal(high, ((entropy >= 0.9) & mask).float())


def covariance(logprob: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
    a, l = advantage[mask], logprob[mask]
    return torch.zeros_like(logprob).masked_scatter(mask, (a - a.mean()) * (l - l.mean()))


def test_kl_cov_selects_the_largest_covariances() -> None:
    for ratio in (2e-4, 0.1, 0.5, 1.0):
        logprob, _, advantage, mask = batch()
        cov = covariance(logprob, advantage, mask)
        count = max(1, int(ratio * int(mask.sum())))
        threshold = cov[mask].topk(count).values[-1]
        expected = (mask & (cov >= threshold)).double()
        assert torch.equal(kl_cov_weight(logprob, advantage, mask, ratio=ratio), expected)


def test_clip_cov_draws_from_the_band() -> None:
    """The right number of tokens, all of them candidates, each of them drawn at some time."""
    logprob, old, advantage, mask = batch(8, 20)
    cov = covariance(logprob, advantage, mask)
    clipped = (old - logprob > 0.3) & mask
    candidates = mask & (cov > 0.1) & (cov < 2.0) & ~clipped
    count = int(0.05 * int(mask.sum()))
    assert 0 < count < int(candidates.sum())
    seen = torch.zeros_like(mask)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        weight = clip_cov_weight(
            logprob,
            advantage,
            mask,
            ratio=0.05,
            low=0.1,
            high=2.0,
            clipped=clipped,
            generator=generator,
        )
        dropped = mask & (weight == 0)
        assert int(dropped.sum()) == count
        assert not (dropped & ~candidates).any()
        assert not weight[~mask].any()
        seen |= dropped
    assert torch.equal(seen, candidates)
    none = clip_cov_weight(logprob, advantage, mask, low=100.0, high=101.0)
    assert torch.equal(none, mask.double())


def test_m2po_drops_the_largest_until_the_mean_is_small() -> None:
    for threshold in (1e-9, 0.01, 0.04, 0.1, 10.0):
        logprob, old, _, mask = batch()
        rollout = old.clone()
        rollout[mask & (torch.rand_like(old) < 0.1)] = NAN
        weight = m2po_weight(logprob, rollout, mask, threshold=threshold)
        square = (logprob - rollout) ** 2
        scored = sorted(square[mask & ~square.isnan()].tolist(), reverse=True)
        while len(scored) > 1 and sum(scored) / len(scored) >= threshold:
            scored.pop(0)
        expected = mask & (square.isnan() | (square <= scored[0]))
        assert torch.equal(weight, expected.double())


def test_fipo_weight_is_the_decayed_sum() -> None:
    """Loops of the published formula; padded and packed agree."""
    logprob, old, advantage, mask = batch(5, 12)
    logprob[0, 0], old[0, 0], mask[0, 0], advantage[0] = 0.0, -2.0, True, -1.0
    options = {"half_life": 4.0, "low": 0.8, "high": 1.2, "ratio_limit": 5.0, "safety_ratio": 1.2}
    weight = fipo_weight(logprob, old, advantage, mask, **options)
    for i in range(5):
        for t in range(12):
            if not mask[i, t]:
                assert weight[i, t] == 0
                continue
            future = 0.0
            for k in range(t, 12):
                change = float(logprob[i, k] - old[i, k])
                if mask[i, k] and math.exp(change) <= 5.0:
                    future += 2 ** (-(k - t) / 4) * change
            expected = min(max(math.exp(future), 0.8), 1.2)
            if advantage[i, t] < 0 and math.exp(float(logprob[i, t] - old[i, t])) > 1.2:
                expected = min(max(expected, 0.8), 1.0)
            assert float(weight[i, t]) == pytest.approx(expected, rel=1e-12)
    ends = torch.arange(6, dtype=torch.int32) * 12
    flat = [x.flatten() for x in (logprob, old, advantage, mask)]
    assert torch.equal(fipo_weight(*flat, cu_seqlens=ends, **options), weight.flatten())


@pytest.mark.parametrize("threshold", [-0.1, 0.0, 0.05])
def test_off_policy_sequence_weight_is_trl(threshold: float) -> None:
    trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    logprob, rollout, advantage, mask = batch(30, 10)
    logprob, advantage = logprob.nan_to_num(0), advantage.nan_to_num(0).amax(1)
    rollout[torch.rand_like(rollout) < 0.1] = NAN
    mask[0] = False
    keep = trainer.get_off_policy_mask(
        advantage[:, None], logprob, rollout, mask.double(), threshold
    )
    expected = keep * mask
    weight = off_policy_sequence_weight(logprob, rollout, advantage, mask, threshold=threshold)
    assert torch.equal(weight, expected)
    assert 0 < weight.sum() < mask.sum()
    per_token = advantage[:, None].expand(30, 10)
    again = off_policy_sequence_weight(logprob, rollout, per_token, mask, threshold=threshold)
    assert torch.equal(again, weight)
    packed = off_policy_sequence_weight(
        logprob.flatten(),
        rollout.flatten(),
        advantage,
        mask.flatten(),
        threshold=threshold,
        cu_seqlens=torch.arange(31, dtype=torch.int32) * 10,
    )
    assert torch.equal(packed, weight.flatten())


def test_weights_carry_no_gradient() -> None:
    logprob, old, advantage, mask = batch()
    logprob = logprob.nan_to_num().requires_grad_()
    for weight in (
        kl_cov_weight(logprob, advantage, mask),
        clip_cov_weight(logprob, advantage, mask),
        m2po_weight(logprob, old, mask),
        fipo_weight(logprob, old, advantage, mask),
        off_policy_sequence_weight(logprob, old, advantage, mask, threshold=0.1),
        top_entropy_weight(logprob, mask),
    ):
        assert not weight.requires_grad
        assert weight.dtype == torch.float64


L, A, M = torch.rand(2, 3), torch.rand(2, 3), torch.ones(2, 3, dtype=torch.bool)
BAD: list[tuple[str, type[Exception], str, Callable[[], Any]]] = [
    ("quantile", ValueError, r"quantile must be in \[0, 1\]", lambda: top_entropy_weight(L, M, quantile=2.0)),
    ("entropy", TypeError, r"entropy .*bool", lambda: top_entropy_weight(M, M)),
    ("mask", ValueError, r"mask .*\(2, 3\).*\(2, 2\)", lambda: top_entropy_weight(L, M[:, :2])),
    ("threshold", ValueError, r"threshold .*\(\)", lambda: top_entropy_weight(L, M, threshold=L[0])),
    ("advantage", ValueError, r"advantage .*\(2, 3\).*\(2,\)", lambda: kl_cov_weight(L, A[:, 0], M)),
    ("ratio", ValueError, r"ratio must be in \[0, 1\]", lambda: kl_cov_weight(L, A, M, ratio=-0.1)),
    ("band", ValueError, r"low must be < high", lambda: clip_cov_weight(L, A, M, low=5.0, high=1.0)),
    ("m2", ValueError, r"threshold must be > 0", lambda: m2po_weight(L, A, M, threshold=0.0)),
    ("rollout", ValueError, r"rollout_logprob .*\(2, 3\)", lambda: m2po_weight(L, A[:1], M)),
    ("half life", ValueError, r"half_life must be > 0", lambda: fipo_weight(L, A, A, M, half_life=0.0)),
    ("fipo band", ValueError, r"0 <= low <= high", lambda: fipo_weight(L, A, A, M, low=2.0)),
    ("opsm", ValueError, r"advantage must have shape \[B\]", lambda: off_policy_sequence_weight(L, A, A[:, :1], M, threshold=0.1)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "message", "call"), [b[1:] for b in BAD], ids=[b[0] for b in BAD]
)
def test_bad_arguments(error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=message):
        call()
