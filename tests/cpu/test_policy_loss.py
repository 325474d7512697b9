"""policy_loss in C++ against the float64 reference: random specifications, masking, layout, faults."""

import itertools
import random

import pytest
import torch

from fastgrpo import reference
from fastgrpo.ops.policy_loss import policy_loss
from fastgrpo.spec import (
    METRICS,
    PARAMS,
    Between,
    Estimator,
    Level,
    Pool,
    PoolGrad,
    Shape,
    Stat,
    Surrogate,
)
from tests.cpu.inputs import INF, NAN, policy_arguments, random_objective, require_compiled, widen
from tests.ops.common import bitwise_equal

require_compiled("policy_loss")

# Empty, one token, a whole register of 8 numbers and one more, several registers: sequence ends fall everywhere.
LENGTHS = ([5], [1, 8, 17], [0, 3, 0, 40], [9, 16, 7, 2, 31])
PLAIN = [0, 0, 0, 0, 3, 0, 0, 0]  # token level, ratio, hard bounds, k3 towards the reference policy


def plain_params(dtype, **changes):
    values = dict.fromkeys(PARAMS, 0.0) | {
        "pos_low": -INF, "pos_high": 1.2, "neg_low": 0.8, "neg_high": INF, "d_clamp": 20.0, "log_low": -INF,
        "log_high": INF, "pool_low": -INF, "pool_high": INF, "beta": 0.04, "kl_clamp_in": 20.0,
        "kl_clamp_out": INF, "kl_ratio_cap": INF,
    }  # fmt: skip
    return torch.tensor([*(values | changes).values(), *[-INF, INF] * 4], dtype=dtype)


def assert_agrees(got, want, rtol, atol):
    """NaN and infinities in the same places, the rest within atol + rtol |want|."""
    for name, a, b in zip(("loss", "token_loss", "dlogprob", "metrics"), got, want, strict=True):
        a, b = a.double(), b.double()
        same = (a == b) | (a.isnan() & b.isnan())
        wrong = ~same & ~((a - b).abs() <= atol + rtol * b.abs())
        assert not bool(wrong.any()), f"{name}: {a[wrong]} for {b[wrong]}"


# The kernel computes in double whatever it reads and stores: float64 differs by the roundings of exp and of sums,
# float32 by one rounding of each result (6e-8 relative; smallest normal number 1e-38).
@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"),
    [(torch.float64, 1e-11, 1e-14), (torch.float32, 2e-7, 1e-12)],
    ids=["f64", "f32"],
)
@pytest.mark.parametrize("block", range(6))
def test_random_specifications(block, dtype, rtol, atol):
    """6 x 60 of them in each dtype."""
    for seed in range(60 * block, 60 * (block + 1)):
        spec, values = random_objective(random.Random(seed))
        params = torch.tensor(values, dtype=dtype)
        arguments, cu = policy_arguments(LENGTHS[seed % len(LENGTHS)], dtype, seed)
        got = policy_loss(*arguments, cu, params, spec, "")
        want = reference.policy_loss(*widen(arguments), cu, params.double(), spec, "")
        assert_agrees(got, want, rtol, atol)


@pytest.mark.parametrize("old", [-INF, NAN, 0.0, -300.0])
@pytest.mark.parametrize("logprob", [-INF, NAN, INF, -200.0])
@pytest.mark.parametrize("clamp", [20.0, INF])
def test_extreme_log_probs(logprob, old, clamp):
    """N4, N16: a token of probability 0, one that is NaN, ratios that overflow; each stays in its token."""
    for level, surrogate, estimator in itertools.product(Level, (0, 1), Estimator):
        arguments, cu = policy_arguments([11], torch.float64, 1, absent=0.0)
        arguments[2][:] = True
        arguments = [
            value.nan_to_num(0.5, 0.5, 0.5) if value.is_floating_point() else value
            for value in arguments
        ]
        arguments[0][4], arguments[4][4], arguments[5][7] = logprob, old, old
        spec = [int(level), 0, surrogate, 0, int(estimator), 0, 0, 0]
        params = plain_params(torch.float64, d_clamp=clamp, kl_clamp_in=clamp)
        got = policy_loss(*arguments, cu, params, spec, "")
        want = reference.policy_loss(*arguments, cu, params, spec, "")
        assert_agrees(got, want, 1e-11, 1e-14)


def test_saturated_sigmoid_keeps_the_digits_of_its_slope():
    """SAPO far from a ratio of 1: 1 - sigmoid is 1e-12 and less."""
    arguments, cu = policy_arguments([8], torch.float64, 0, absent=1.0)
    gap = torch.linspace(2.0, 4.0, 8, dtype=torch.float64)
    arguments[0], arguments[1], arguments[2] = gap - 5.0, torch.ones_like(gap), gap > 0
    arguments[3], arguments[4] = torch.ones_like(gap), torch.full_like(gap, -5.0)
    params = plain_params(torch.float64, shape_pos_a=1.5, shape_neg_a=1.5)
    spec = [*PLAIN[:3], int(Shape.SIGMOID), *PLAIN[4:]]
    _, _, dlogprob, _ = policy_loss(*arguments, cu, params, spec, "")
    ratio = gap.exp()
    e = torch.exp(-1.5 * (ratio - 1))
    torch.testing.assert_close(dlogprob, -4 * e / (1 + e) ** 2 * ratio, rtol=1e-11, atol=0)


@pytest.mark.parametrize("pool", list(Pool), ids=lambda pool: pool.name)
def test_gate_on_a_sequence_that_lies_below_zero(pool):
    """Every log-ratio negative, one sequence within the bounds and one outside: a maximum must not start at 0."""
    gap = torch.tensor([-0.3] * 9 + [-0.01] * 9, dtype=torch.float64)
    arguments, cu = policy_arguments([9, 9], torch.float64, 0, absent=1.0)
    arguments[0], arguments[1], arguments[2] = gap - 1.0, torch.ones_like(gap), gap < 0
    arguments[4] = torch.full_like(gap, -1.0)
    spec = [*PLAIN[:7], 1, int(Stat.K1), int(Between.THETA_OLD), int(pool), 0, 0]
    params = plain_params(torch.float64)
    params[len(PARAMS)] = -0.2
    got = policy_loss(*arguments, cu, params, spec, "")
    assert_agrees(got, reference.policy_loss(*arguments, cu, params, spec, ""), 1e-11, 1e-14)
    assert float(got[3][METRICS.index("gate_closed"), 0]) == 9.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_padding_at_the_end_changes_no_bit(dtype):
    """Packed sequences, and the same ones padded to a common length with masked garbage."""
    lengths, width = [9, 16, 7, 2, 31], 40
    place = torch.cat([torch.arange(n) + width * b for b, n in enumerate(lengths)])
    for seed in range(40):
        spec, values = random_objective(random.Random(seed))
        params = torch.tensor(values, dtype=dtype)
        packed, cu = policy_arguments(lengths, dtype, seed)
        padded = []
        for value in packed:
            size = width * len(lengths) if value.numel() else 0
            filler = False if value.dtype == torch.bool else (0.0 if value is packed[3] else NAN)
            wide = torch.full((size,), filler, dtype=value.dtype)
            padded.append(wide.index_copy(0, place, value) if size else wide)
        cu_padded = torch.arange(0, width * len(lengths) + 1, width, dtype=torch.int32)
        a = policy_loss(*packed, cu, params, spec, "")
        b = policy_loss(*padded, cu_padded, params, spec, "")
        assert bitwise_equal(a[0], b[0])
        assert bitwise_equal(a[1], b[1][place])
        assert bitwise_equal(a[2], b[2][place])
        assert bitwise_equal(a[3], b[3])


def test_what_a_masked_slot_holds_changes_no_bit():
    for seed in range(20):
        spec, values = random_objective(random.Random(seed))
        params = torch.tensor(values)
        arguments, cu = policy_arguments([9, 16, 7], torch.float32, seed)
        dead = ~arguments[2]
        other = [
            value.masked_fill(dead, -3.0)
            if value.dtype == torch.float32 and value.numel()
            else value
            for value in arguments
        ]
        got, want = (policy_loss(*x, cu, params, spec, "") for x in (arguments, other))
        assert all(bitwise_equal(a, b) for a, b in zip(got, want, strict=True))
        assert bool((got[1][dead] == 0).all())
        assert bool((got[2][dead] == 0).all())


def test_threads_change_no_bit():
    before = torch.get_num_threads()
    for spec in (PLAIN, [int(Level.SEQ_MEAN), int(PoolGrad.SHARED), *PLAIN[2:]]):
        arguments, cu = policy_arguments([700] * 40, torch.float32, 5, absent=0.0)
        results = []
        try:
            for threads in (1, 3):
                torch.set_num_threads(threads)
                results.append(policy_loss(*arguments, cu, plain_params(torch.float32), spec, ""))
        finally:
            torch.set_num_threads(before)
        assert all(bitwise_equal(a, b) for a, b in zip(*results, strict=True))


def test_without_old_the_ratio_is_exactly_one():
    """N21."""
    arguments, cu = policy_arguments([20], torch.float32, 2, absent=1.0)
    arguments[2][:] = True
    arguments = [
        value.nan_to_num(0.25, 0.25, 0.25) if value.is_floating_point() else value
        for value in arguments
    ]
    _, token_loss, dlogprob, metrics = policy_loss(
        *arguments, cu, plain_params(torch.float32), PLAIN, ""
    )
    assert torch.equal(token_loss, -arguments[1])
    assert torch.equal(dlogprob, arguments[3] * -arguments[1])
    ratio = metrics[METRICS.index("ratio")]
    assert ratio.tolist() == [20.0, 20.0, 1.0, 1.0]


def test_small_kl_keeps_its_digits():
    """N18: k3 of 1e-4 is 5e-9; exp(d) - 1 - d in float32 would be 0 or 6e-8."""
    n = 16
    logprob = torch.full((n,), -2.0, dtype=torch.float64)
    none, ones = logprob.new_empty(0), torch.ones(n, dtype=torch.float64)
    delta = torch.logspace(-1, -6, n, dtype=torch.float64)
    sides = (none, logprob + delta, *[none] * 6)
    cu = torch.tensor([0, n], dtype=torch.int32)
    mask = torch.ones(n, dtype=torch.bool)
    params = plain_params(torch.float64, beta=1.0)
    _, token_loss, _, _ = policy_loss(logprob, 0 * ones, mask, ones, *sides, cu, params, PLAIN, "")
    d = (logprob + delta) - logprob
    want = d * d / 2 * (1 + d / 3 * (1 + d / 4 * (1 + d / 5 * (1 + d / 6))))
    torch.testing.assert_close(token_loss, want, rtol=1e-8, atol=0)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_nothing_to_sum(lengths):
    arguments, cu = policy_arguments(lengths, torch.float32, 0)
    loss, token_loss, dlogprob, metrics = policy_loss(
        *arguments, cu, plain_params(torch.float32), PLAIN, ""
    )
    assert float(loss) == 0.0
    assert token_loss.shape == dlogprob.shape == (0,)
    assert metrics.tolist() == [[0.0, 0.0, INF, -INF]] * len(METRICS)


def test_refusals_name_the_rule():
    arguments, cu = policy_arguments([5], torch.float32, 0)
    params = plain_params(torch.float32)

    def call(values=arguments, ends=cu, numbers=params, spec=PLAIN, surrogate=""):
        return policy_loss(*values, ends, numbers, spec, surrogate)

    with pytest.raises(
        RuntimeError, match="registered surrogate 'mine' has no compiled CPU kernel"
    ):
        call(spec=[0, 0, int(Surrogate.CUSTOM), *PLAIN[3:]], surrogate="mine")
    with pytest.raises(RuntimeError, match=r"\(estimator\) must be in 0..4, got 9"):
        call(spec=[*PLAIN[:4], 9, *PLAIN[5:]])
    with pytest.raises(RuntimeError, match="must have 13 entries for 1 gates, got 8"):
        call(spec=[*PLAIN[:7], 1])
    with pytest.raises(RuntimeError, match="cu_seqlens must run from 0 to 5"):
        call(ends=torch.tensor([0, 4], dtype=torch.int32))
    with pytest.raises(RuntimeError, match="cu_seqlens must not decrease"):
        call(ends=torch.tensor([0, 6, 5], dtype=torch.int32))
    with pytest.raises(RuntimeError, match="params must have"):
        call(numbers=params[:-1])
    with pytest.raises(RuntimeError, match="advantage must have 5 elements, got 4"):
        call(values=[arguments[0], arguments[1][:4].contiguous(), *arguments[2:]])
    with pytest.raises(RuntimeError, match="logprob must be float32 or float64"):
        call(values=[arguments[0].half(), *arguments[1:]])
