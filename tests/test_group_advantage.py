"""group_advantage against loops in exact arithmetic: values, gradients, exact zeros, faults, arguments."""

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrpo import reference
from fastgrpo.advantages import GroupAdvantage, group_advantage
from fastgrpo.functional.groups import group_layout
from fastgrpo.ops import group_advantage as ops
from fastgrpo.reference.group_advantage import Baseline, Combine, Scale, Singleton
from tests.advantage_formulas import advantages, gdpo, mean_std, score_of

NAN, INF = math.nan, math.inf
BASELINES = ("mean", "leave_one_out", "length_weighted", "second_best", "batch", "none")
SCALES = ("group", "batch", "mean", "none")
# Every combination that is allowed: a batch mean is not divided by a group's statistics.
CHOICES = [
    (baseline, scale)
    for baseline, scale in itertools.product(BASELINES, SCALES)
    if baseline != "batch" or scale in ("batch", "none")
]


def draw(rows: int, columns: int, missing: float = 0.2) -> Tensor:
    """Rewards on a coarse grid, so that ties and equal groups happen, with some entries missing."""
    reward = torch.randint(0, 5, (rows, columns)).double() / 4
    reward += (torch.rand(rows, 1) < 0.5) * torch.rand(rows, columns).double()
    return reward.masked_fill(torch.rand(rows, columns) < missing, NAN)


@pytest.mark.parametrize(("baseline", "scale"), CHOICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matches_loop(baseline: str, scale: str, dtype: torch.dtype) -> None:
    """25 ragged cases each: unsorted ids with gaps, missing rewards, weights, both ddof, both singleton policies."""
    for case in range(25):
        rows, columns = int(torch.randint(1, 24, ())), int(torch.randint(1, 4, ()))
        ids = torch.randint(-3, 4, (rows,)) * 10**12
        reward = draw(rows, columns).to(dtype)
        weights = [0.5, 1.0, -0.25][:columns]
        lengths = torch.randint(0, 9, (rows,))
        ddof, singleton = case % 2, ("zero", "raw")[case // 2 % 2]
        out = group_advantage(
            reward,
            group_ids=ids,
            baseline=baseline,
            scale=scale,
            eps=1e-4,
            ddof=ddof,
            reward_weights=weights,
            lengths=lengths if baseline == "length_weighted" else None,
            singleton=singleton,
        )
        expected = advantages(
            [score_of(row, weights) for row in reward.tolist()],
            ids.tolist(),
            baseline=baseline,
            scale=scale,
            eps=1e-4,
            ddof=ddof,
            lengths=lengths.tolist(),
            singleton=singleton,
        )
        # float64 statistics: float32 results are rounded once. MaxRL divides by means that may be tiny.
        rtol = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1e4)
        torch.testing.assert_close(
            out.advantage, torch.tensor(expected, dtype=dtype), rtol=rtol, atol=1e-13
        )
        check_lists(out)


def check_lists(out: GroupAdvantage) -> None:
    """The active list is what the advantages say."""
    rows = (out.advantage != 0).nonzero().flatten()
    count = rows.numel()
    assert out.num_active == count
    assert torch.equal(out.active_index[:count], rows)
    assert (out.active_index[count:] == -1).all()


def test_group_size_is_ids_in_order() -> None:
    """Both ways of naming groups give the same bits, also with groups larger than a warp (40)."""
    for size in (1, 2, 8, 40):
        reward = torch.rand(5 * size, 2)
        ids = torch.arange(5).repeat_interleave(size)
        for scale in SCALES:
            by_size = group_advantage(reward, group_size=size, scale=scale)
            by_ids = group_advantage(reward, group_ids=ids - 3, scale=scale)
            for a, b in zip(by_size, by_ids, strict=True):
                assert torch.equal(a, b)


def test_unsorted_ids_only_permute() -> None:
    reward, ids = torch.rand(30), torch.randint(0, 5, (30,))
    order = torch.randperm(30)
    plain = group_advantage(reward, group_ids=ids).advantage
    mixed = group_advantage(reward[order], group_ids=ids[order]).advantage
    torch.testing.assert_close(mixed, plain[order], rtol=1e-6, atol=1e-6)


def test_a_million_equal_groups_are_exactly_zero() -> None:
    """N24. Peers: 51-53 % of such groups get an advantage, of up to 0.98."""
    for size, groups in ((3, 1_000_000), (7, 100_000), (64, 10_000), (1024, 500)):
        value = torch.rand(groups, 1) * 10 ** (torch.rand(groups, 1) * 12 - 6) - 100 * torch.rand(
            groups, 1
        )
        out = group_advantage(value.expand(-1, size).reshape(-1), group_size=size, eps=0.0)
        assert not out.advantage.any()
        assert out.is_degenerate.all()
        assert out.num_active == 0
        assert not out.std.any()


@pytest.mark.parametrize(("baseline", "scale"), CHOICES)
def test_equal_rewards_are_exactly_zero_in_every_choice(baseline: str, scale: str) -> None:
    """Also beside groups that do have a spread; a raw reward stays one where no group statistic is used."""
    reward = torch.tensor([0.1, 0.1, 0.1, 0.3, 0.7, 0.2, 1e30, 1e30, 1e30], dtype=torch.float32)
    lengths = torch.arange(9) if baseline == "length_weighted" else None
    for singleton in ("zero", "raw"):
        out = group_advantage(
            reward,
            group_size=3,
            baseline=baseline,
            scale=scale,
            lengths=lengths,
            singleton=singleton,
        )
        equal = out.advantage[[0, 1, 2, 6, 7, 8]]
        if baseline in ("none", "batch") and scale in ("none", "batch"):
            assert equal.all()
        else:
            assert not equal.any()
        assert out.is_degenerate.tolist() == [True] * 3 + [False] * 3 + [True] * 3


@pytest.mark.parametrize(
    "rewards",
    [
        [1e6, 1e6 + 1, 1e6, 1e6 + 1, 1e6],  # an offset that one-pass float32 variances lose
        [1e8, 1e8 + 8, 1e8, 1e8 + 8],  # neighbouring float32 numbers
        [0.5, 0.5 + 2**-20, 0.5 - 2**-20],
        [1e30, -1e30, 3e30],  # squares overflow float32
        [1e-30, 3e-30, 2e-30],  # squares underflow float32
        [0.0, 0.0, 0.0, 1.0],
        [3.4e38, -3.4e38, 0.0],  # the spread overflows float32
    ],
)
@pytest.mark.parametrize("implementation", ["op", "reference"])
def test_few_ulp_under_offsets_and_extremes(rewards: list[float], implementation: str) -> None:
    reward = torch.tensor(rewards, dtype=torch.float32)
    mean, std = mean_std(reward.tolist(), 1)
    # In float64, where x - mean is exact enough for these inputs; the result is rounded to float32 once.
    exact = [(x - mean) / (std + 1e-4) for x in reward.tolist()]
    forward = ops.group_advantage_fwd if implementation == "op" else reference.group_advantage_fwd
    out = forward(*arguments(reward[:, None], len(rewards)))[0]
    expected = torch.tensor(exact, dtype=torch.float64)
    ulp = expected.abs() * torch.finfo(torch.float32).eps + 1e-45
    assert ((out.double() - expected).abs() <= 4 * ulp).all()


def arguments(reward: Tensor, size: int, spec: tuple[int, ...] = (0, 0, 0, 0)) -> tuple[Any, ...]:
    """Arguments of the forward op: eps 1e-4, ddof 1, no weights."""
    order, offsets, size = group_layout(reward.shape[0], reward, "reward", size, None)
    nothing = reward.new_empty(0)
    params = torch.tensor([1e-4, 1.0, 0.0], dtype=torch.float64)
    return reward, nothing, nothing, order, offsets, params, size, list(spec)


def test_shift_and_scale_invariance() -> None:
    """N25: exact for powers of two and exact shifts, to 1e-6 otherwise."""
    reward = torch.randint(0, 1024, (64,)) / 1024
    base = group_advantage(reward, group_size=8, eps=0.0).advantage
    assert torch.equal(group_advantage(reward * 2.0**40, group_size=8, eps=0.0).advantage, base)
    assert torch.equal(group_advantage(reward + 4096, group_size=8, eps=0.0).advantage, base)
    other = group_advantage(reward * 1e-9, group_size=8, eps=0.0).advantage
    torch.testing.assert_close(other, base, rtol=1e-6, atol=1e-6)
    assert torch.equal(group_advantage(-reward, group_size=8, eps=0.0).advantage, -base)


def test_tie_tolerance_is_the_documented_floor() -> None:
    reward = torch.tensor([0.5, 0.5 + 1e-6, 0.5, 1.0, 1.1, 1.0])
    assert group_advantage(reward, group_size=3).advantage.all()
    out = group_advantage(reward, group_size=3, tie_tolerance=1e-5)
    assert out.is_degenerate.tolist() == [True] * 3 + [False] * 3
    assert not out.advantage[:3].any()
    assert out.advantage[3:].all()


def test_missing_rewards_are_left_out_and_counted() -> None:
    """N26: None (NaN) is excluded by contract: others are normalised without it, its own advantage is 0."""
    reward = torch.tensor([[1.0, NAN], [NAN, NAN], [2.0, 1.0], [NAN, NAN], [NAN, NAN], [0.5, 0.5]])
    out = group_advantage(reward, group_size=3, scale="none")
    assert out.advantage.tolist() == [-1.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    assert (int(out.num_excluded), int(out.num_missing), int(out.num_fault)) == (3, 7, 0)
    assert out.mean[:3].tolist() == [2.0] * 3
    assert out.is_degenerate.tolist() == [False] * 3 + [True] * 3
    empty = group_advantage(torch.full((4,), NAN), group_size=4)
    assert not empty.advantage.any()
    assert empty.mean.isnan().all()
    assert empty.is_degenerate.all()


@pytest.mark.parametrize("implementation", ["op", "reference"])
@pytest.mark.parametrize("spec", [(0, 0, 0, 0), (0, 1, 0, 0), (4, 1, 0, 0), (0, 0, 1, 0)])
def test_infinite_reward_stays_in_its_group(implementation: str, spec: tuple[int, ...]) -> None:
    """What happens on a device that cannot be asked: NaN in that group alone, counted, batch statistics without it."""
    reward = torch.tensor([[1.0], [INF], [NAN], [0.0], [1.0], [3.0], [2.0], [0.0], [1.0]])
    forward = ops.group_advantage_fwd if implementation == "op" else reference.group_advantage_fwd
    out = forward(*arguments(reward, 3, spec))
    clean = forward(*arguments(reward[3:], 3, spec))
    assert torch.equal(out[0][3:], clean[0])
    assert out[0][:2].isnan().all()
    assert out[0][2] == 0
    assert out[1][:3].isnan().all()
    assert not out[3][:3].any()
    assert out[5].tolist() == [2 + int(clean[5][0]), 1, 1, 2]
    backward = ops.group_advantage_bwd if implementation == "op" else reference.group_advantage_bwd
    dreward = backward(torch.ones(9), out[0], out[6], out[7], *arguments(reward, 3, spec))
    assert dreward.flatten().isnan().tolist() == [True, True] + [False] * 7


def test_normalize_then_sum_matches_loop() -> None:
    """GDPO, as TRL: columns are normalised within the group, then the sum within the batch."""
    for _ in range(40):
        rows, columns = int(torch.randint(6, 24, ())), int(torch.randint(1, 4, ()))
        ids = torch.randint(0, 3, (rows,))
        reward = draw(rows, columns)
        reward[:3] = torch.rand(3, columns)
        weights = [1.0, 0.3, 2.0][:columns]
        out = group_advantage(
            reward, group_ids=ids, combine="normalize_then_sum", reward_weights=weights
        )
        expected = torch.tensor(gdpo(reward.tolist(), ids.tolist(), weights, 1e-4))
        torch.testing.assert_close(out.advantage, expected.double(), rtol=1e-6, atol=1e-6)


def test_normalize_then_sum_keeps_equal_groups_at_zero() -> None:
    """The batch mean of centred scores is 0 and is not subtracted, so rounding cannot move an equal group."""
    reward = torch.rand(64, 3)
    reward[:8] = torch.tensor([0.1, 0.3, 0.7])
    out = group_advantage(reward, group_size=8, combine="normalize_then_sum")
    assert not out.advantage[:8].any()
    assert out.advantage[8:].all()


def test_external_baseline() -> None:
    """ReMax: the reward of the greedy answer; a column of weight -1 that carries gradient."""
    reward = torch.rand(6, 2, dtype=torch.float64)
    reward[4] = NAN
    greedy = torch.rand(6, dtype=torch.float64, requires_grad=True)
    out = group_advantage(
        reward, group_size=3, baseline=greedy, scale="none", reward_weights=[2.0, 1.0]
    )
    expected = reward @ torch.tensor([2.0, 1.0], dtype=torch.float64) - greedy.detach()
    torch.testing.assert_close(out.advantage, expected.nan_to_num(nan=0.0))
    out.advantage.sum().backward()
    assert greedy.grad is not None
    assert greedy.grad.tolist() == [-1.0, -1.0, -1.0, -1.0, 0.0, -1.0]


GRADCHECKS = [
    (baseline, scale, ddof, singleton)
    for (baseline, scale), ddof, singleton in itertools.product(CHOICES, (0, 1), ("zero", "raw"))
]


@pytest.mark.parametrize(("baseline", "scale", "ddof", "singleton"), GRADCHECKS)
def test_gradcheck(baseline: str, scale: str, ddof: int, singleton: str) -> None:
    """The backward is the derivative, through missing rewards and singletons (which are constant when they are 0)."""
    lone = 9 if singleton == "raw" or scale != "batch" else 7
    ids = torch.tensor([5, -2, 5, 7, -2, 5, lone, -2, 7, 5, 7])
    live = torch.ones(11, 2, dtype=torch.bool)
    live[0, 0] = live[3, 0] = live[3, 1] = False
    given = (0.1 + torch.rand(int(live.sum()), dtype=torch.float64)).requires_grad_()
    lengths = torch.randint(1, 9, (11,)) if baseline == "length_weighted" else None

    def run(values: Tensor) -> Tensor:
        reward = torch.full((11, 2), NAN, dtype=torch.float64).masked_scatter(live, values)
        return group_advantage(
            reward,
            group_ids=ids,
            baseline=baseline,
            scale=scale,
            ddof=ddof,
            lengths=lengths,
            reward_weights=[0.7, 1.3],
            singleton=singleton,
        ).advantage

    assert torch.autograd.gradcheck(run, (given,), atol=1e-6)


def test_gradcheck_normalize_then_sum() -> None:
    reward = torch.rand(9, 3, dtype=torch.float64, requires_grad=True)

    def run(values: Tensor) -> Tensor:
        return group_advantage(
            values, group_size=3, combine="normalize_then_sum", reward_weights=[1.0, 0.5, 2.0]
        ).advantage

    assert torch.autograd.gradcheck(run, (reward,), atol=1e-6)


@pytest.mark.parametrize(
    ("baseline", "scale"), [c for c in CHOICES if c[0] not in ("none", "batch")]
)
def test_gradient_of_degenerate_and_missing_is_exactly_zero(baseline: str, scale: str) -> None:
    reward = torch.tensor([0.1, 0.1, 0.1, 0.3, NAN, 0.9], requires_grad=True)
    lengths = torch.ones(6) if baseline == "length_weighted" else None
    out = group_advantage(reward, group_size=3, baseline=baseline, scale=scale, lengths=lengths)
    (out.advantage * torch.randn(6)).sum().backward()
    assert reward.grad is not None
    assert not reward.grad[:3].any()
    assert reward.grad[4] == 0
    assert reward.grad.isfinite().all()


def test_ops_equal_reference_in_every_choice() -> None:
    """Forward and backward of the kernel in use against the specification, at float64 and float32."""
    for dtype, case in itertools.product((torch.float32, torch.float64), range(8)):
        rows, columns = int(torch.randint(0, 30, ())), int(torch.randint(1, 3, ()))
        ids = torch.randint(0, 5, (rows,))
        reward = draw(rows, columns).to(dtype)
        order, offsets, size = group_layout(rows, reward, "reward", None, ids)
        weight = torch.randn(columns, dtype=dtype) if case % 2 else reward.new_empty(0)
        params = torch.tensor([1e-4, case % 2, 0.01 * (case % 3)], dtype=torch.float64)
        upstream = torch.randn(rows, dtype=dtype)
        choices = [
            (BASELINES.index(b), SCALES.index(s), 0, raw) for b, s in CHOICES for raw in (0, 1)
        ]
        for spec in [*choices, (0, 0, 1, 0)]:
            length = torch.ones(rows, dtype=dtype) if spec[0] == 2 else reward.new_empty(0)
            given = (reward, weight, length, order, offsets, params, size, list(spec))
            out, expected = ops.group_advantage_fwd(*given), reference.group_advantage_fwd(*given)
            for a, b in zip(out, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8, equal_nan=True)
            saved = (upstream, expected[0], expected[6], expected[7], *given)
            torch.testing.assert_close(
                ops.group_advantage_bwd(*saved),
                reference.group_advantage_bwd(*saved),
                rtol=1e-4,
                atol=1e-4 if dtype == torch.float32 else 1e-9,
            )


def test_codes_are_those_of_the_header() -> None:
    """csrc/advantage_math.h numbers the choices in the same order."""
    header = (Path(__file__).resolve().parent.parent / "csrc" / "advantage_math.h").read_text()
    for enum in (Baseline, Scale, Combine, Singleton):
        found = re.search(rf"enum class {enum.__name__} : int64_t {{ (.*?) }}", header)
        assert found is not None
        names = [re.sub(r"(?<!^)([A-Z])", r"_\1", n[1:]).upper() for n in found[1].split(", ")]
        assert names == [member.name for member in enum]
