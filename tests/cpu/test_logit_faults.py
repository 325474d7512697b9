"""What may stand in a row of logits, and what is not read: masks, -inf, NaN, huge values, bad ids (N1-N6, N11, N12)."""

import pytest
import torch

from fastgrpo.testing import assert_matches_reference
from tests.cpu.inputs import DTYPES, INF, NAN, logits_and_ids, require_compiled
from tests.cpu.rows import backward, check, forward, gold, upstream_gradients
from tests.ops.common import bitwise_equal
from tests.ops.tolerance import Tolerance

require_compiled("token_logprob_fwd")


def test_masked_rows_are_not_read():
    logits, ids = logits_and_ids(6, 300, torch.float32)
    mask = torch.tensor([True, False, True, False, False, True])
    want = forward(logits, ids, mask)
    logits[~mask] = NAN
    ids[~mask] = torch.tensor([-100, 300, 2**40])
    stats = forward(logits, ids, mask)
    assert all(bitwise_equal(a, b) for a, b in zip(stats, want, strict=True))
    assert all(bool((part[~mask] == 0).all()) for part in stats)
    upstream = torch.randn(6).where(mask, torch.zeros(()))
    gradient = backward(logits, ids, stats, upstream, torch.empty(0))
    assert bool((gradient[~mask] == 0).all())
    assert bool(gradient[mask].isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "live",
    [
        slice(4500, 4550),  # N2: the first block has no finite logit
        slice(0, 50),  # N1: the later blocks have none
        slice(4999, 5000),  # one column, the target: probability 1
    ],
    ids=["later", "first", "alone"],
)
def test_minus_infinity_columns(live, dtype):
    """N1, N2: the columns drop out exactly; entropy and gradient stay finite."""
    logits, ids = logits_and_ids(3, 5000, dtype)
    dead = torch.ones(5000, dtype=torch.bool)
    dead[live] = False
    logits[:, dead] = -INF
    ids[:] = live.stop - 1
    stats, gradient = check(logits, ids)
    assert all(bool(part.isfinite().all()) for part in stats)
    assert bool((gradient[:, dead] == 0).all())
    kept = forward(logits[:, live].contiguous(), ids - live.start)
    tol = Tolerance.of(logits)
    assert_matches_reference(stats[1], kept[1].double(), atol=tol.entropy(4.0))


@pytest.mark.parametrize(
    "where", [0, 5, 4096, 4999]
)  # first column, target's side, a new block, the tail
@pytest.mark.parametrize("value", [INF, NAN])
def test_a_faulty_logit_stays_in_its_row(where, value):
    """N5: NaN and +inf give NaN in that row, statistics and gradient, and change no bit elsewhere."""
    logits, ids = logits_and_ids(3, 5000, torch.float32)
    want = forward(logits, ids)
    upstream = upstream_gradients(3, torch.float32)
    want_gradient = backward(logits, ids, want, *upstream)
    for target in (int(ids[1]), where):  # beside the target, and the target itself
        broken, tokens = logits.clone(), ids.clone()
        broken[1, where], tokens[1] = value, target
        stats = forward(broken, tokens)
        assert all(bool(part[1].isnan()) for part in stats)
        gradient = backward(broken, tokens, stats, *upstream)
        assert bool(gradient[1].isnan().all())
        for part, good in zip((*stats, gradient), (*want, want_gradient), strict=True):
            assert bitwise_equal(part[[0, 2]], good[[0, 2]])


def test_no_finite_logit_is_a_fault():
    """N3: a row of -inf has no distribution."""
    stats = forward(torch.full((1, 100), -INF), torch.tensor([3]))
    assert all(bool(part.isnan()) for part in stats)


def test_target_of_probability_zero():
    """N4: logprob -inf is true, entropy finite; the log-prob passes no gradient, the entropy still does."""
    logits, ids = logits_and_ids(2, 100, torch.float32)
    logits[0, ids[0]] = -INF
    stats = forward(logits, ids)
    assert float(stats[0][0]) == -INF
    assert bool(stats[1].isfinite().all())
    one, none = torch.ones(2), torch.empty(0)
    assert bool((backward(logits, ids, stats, one, none)[0] == 0).all())
    _, want = gold(logits, ids, dlogprob=one, dentropy=one)
    tol = Tolerance.of(logits)
    assert_matches_reference(
        backward(logits, ids, stats, one, one), want, atol=tol.dlogits(8.0, torch.float32)
    )


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float32, 1e37), (torch.bfloat16, 3e38), (torch.float16, 6e4)],
    ids=str,
)
def test_huge_logits_at_a_low_temperature(dtype, size):
    """N6: the maximum is subtracted before the division, so 1e37 / 0.01 does not overflow."""
    logits = torch.zeros(4, 70, dtype=dtype)
    logits[:, 7] = size
    logits[1, 9] = size  # a tie: probability one half
    logits[2, :] = -size
    logits[3, 11] = -size
    ids = torch.tensor([7, 9, 3, 7])
    stats = forward(logits, ids, temperature=0.01)
    want = gold(logits, ids, 0.01)
    for part, expected in zip(stats[:2], want[:2], strict=True):
        assert_matches_reference(part, expected, atol=1e-5)
    gradient = backward(logits, ids, stats, torch.ones(4), torch.empty(0), 0.01)
    assert bool(gradient.isfinite().all())
    assert float(gradient[1, 7]) == pytest.approx(-50.0, rel=1e-5)
    assert float(gradient[1, 9]) == pytest.approx(50.0, rel=1e-5)


@pytest.mark.parametrize("bad", [-100, -1, 300, 2**40])
def test_token_outside_the_vocabulary(bad):
    """N12: NaN in that row alone, and nothing is read for it."""
    logits, ids = logits_and_ids(3, 300, torch.float32)
    want = forward(logits, ids)
    ids[1] = bad
    stats = forward(logits, ids)
    for part, good in zip(stats, want, strict=True):
        assert bool(part[1].isnan())
        assert bitwise_equal(part[[0, 2]], good[[0, 2]])
    gradient = backward(logits, ids, stats, torch.ones(3), torch.empty(0))
    assert bool(gradient[1].isnan().all())
    assert bool(gradient[[0, 2]].isfinite().all())


def test_rows_without_upstream_gradient_are_zeroed_unread():
    logits, ids = logits_and_ids(3, 300, torch.bfloat16)
    stats = forward(logits, ids)
    logits[1] = NAN  # would show
    upstream = torch.tensor([1.0, 0.0, 1.0])
    gradient = backward(logits, ids, stats, upstream, torch.zeros(3))
    assert bool((gradient[1] == 0).all())
    upstream[0] = NAN
    gradient = backward(logits, ids, stats, upstream, torch.empty(0))
    assert bool(gradient[0].isnan().all())
    assert bool(gradient[2].isfinite().all())
