"""token_logprob_fwd and token_logprob_bwd in C++ against the float64 reference on the same stored logits."""

import math

import pytest
import torch

from fastgrpo.ops.token_logprob import token_logprob_fwd
from tests.cpu.inputs import DTYPES, NAN, logits_and_ids, numbers, require_compiled
from tests.cpu.rows import ALL_LIVE, backward, check, forward, upstream_gradients
from tests.ops.common import bitwise_equal

require_compiled("token_logprob_fwd")

# Every tail of a register of 4, 8 or 16 numbers, pairs of them, more than one block of 4096, odd real vocabularies.
VOCABULARIES = (1, 2, 3, 7, 15, 16, 17, 31, 63, 64, 65, 127, 1000, 4097, 50_257, 151_936)
MAPS = {  # temperature, (scale, softcap)
    "plain": (1.0, ()),
    "scaled": (0.7, (1.5,)),
    "softcap": (0.9, (1.0, 30.0)),
    "scaled_softcap": (1.3, (2.0, 10.0)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_matches_float64(vocabulary, dtype):
    rows = 5 if vocabulary < 10_000 else 2
    logits, ids = logits_and_ids(rows, vocabulary, dtype)
    ids[0], ids[-1] = (
        0,
        vocabulary - 1,
    )  # the target cuts the row in two: the first and the last column
    maps = MAPS.values() if vocabulary < 10_000 else (MAPS["plain"], MAPS["softcap"])
    for temperature, params in maps:
        check(logits, ids, temperature, params)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "step", [3.0, 30.0, 400.0, -30.0]
)  # per block, under and over what one sum spans
def test_blocks_of_rising_and_falling_logits(step, dtype):
    """Blocks are summed against the largest logit of those before; each of these is far above (below) it."""
    logits, ids = logits_and_ids(4, 20_000, dtype)
    logits += (step * (torch.arange(20_000) // 4096)).to(dtype)
    ids[:] = torch.tensor([0, 4096, 12_000, 19_999])
    check(logits, ids)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_temperature_per_row(dtype):
    logits, ids = logits_and_ids(6, 1000, dtype)
    temperature = numbers(dtype, 0.3, 0.5, 1.0, 1.0, 2.0, 7.0)
    stats, gradient = check(logits, ids, temperature)
    for row in range(6):
        alone = forward(
            logits[row : row + 1], ids[row : row + 1], temperature=temperature[row : row + 1]
        )
        assert all(
            bitwise_equal(part[row : row + 1], one) for part, one in zip(stats, alone, strict=True)
        )
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_accuracy_at_scale_15_and_a_large_vocabulary(dtype):
    """The package's promise: log-prob within 1e-5 (or one unit in its last place), entropy within 2e-5."""
    one, _ = logits_and_ids(1, 151_936, dtype, scale=15.0)
    ids = torch.randint(0, 151_936, (64,), generator=torch.Generator().manual_seed(3))
    logits = one.expand(64, -1)  # 64 targets of one row, row stride 0
    logprob, entropy, _ = forward(logits, ids)
    log_p = one.double().log_softmax(-1)[0]
    want = log_p[ids]
    unit = torch.finfo(torch.float32).eps * want.abs()
    assert ((logprob.double() - want).abs() <= unit.clamp(min=1e-5)).all()
    assert (entropy.double() + (log_p.exp() * log_p).sum()).abs().max() <= 2e-5


@pytest.mark.parametrize("gap", [17.0, 40.0, 80.0])  # 1 - p = 4e-8 (half a unit of 1), 4e-18, 2e-35
def test_confident_token_keeps_its_digits(gap):
    logits = torch.zeros(1, 5)
    logits[0, 2] = gap
    ids = torch.tensor([2])
    stats = forward(logits, ids)
    want = -math.log1p(4 * math.exp(-gap))
    assert float(stats[0]) == pytest.approx(want, rel=1e-6)
    gradient = backward(logits, ids, stats, torch.ones(1), torch.empty(0))
    assert float(gradient[0, 2]) == pytest.approx(-want, rel=1e-5)
    assert float(gradient[0, 0]) == pytest.approx(want / 4, rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_change_no_bit(dtype):
    """Offset by one number (unaligned), rows further apart than they are wide, one row for all."""
    rows, vocabulary = 4, 777
    logits, ids = logits_and_ids(rows, vocabulary, dtype)
    upstream = upstream_gradients(rows, dtype)
    want = forward(logits, ids)
    want_gradient = backward(logits, ids, want, *upstream)
    padded = torch.full((rows * (vocabulary + 9) + 1,), NAN, dtype=dtype)
    for offset, stride in ((1, vocabulary), (0, vocabulary + 9), (1, vocabulary + 9)):
        view = padded.as_strided((rows, vocabulary), (stride, 1), offset).copy_(logits)
        stats = forward(view, ids)
        assert all(bitwise_equal(a, b) for a, b in zip(stats, want, strict=True))
        before = padded.clone()
        gradient = backward(view, ids, stats, *upstream, out=view)
        assert bitwise_equal(gradient, want_gradient)
        outside = torch.ones_like(padded, dtype=torch.bool)
        outside.as_strided((rows, vocabulary), (stride, 1), offset).fill_(False)
        assert bitwise_equal(padded[outside], before[outside]), "written outside the rows"
    same = logits[:1].expand(rows, -1)
    assert bitwise_equal(forward(same, ids)[0], forward(same.contiguous(), ids)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_is_out_of_place(dtype):
    logits, ids = logits_and_ids(5, 4133, dtype)
    upstream = upstream_gradients(5, dtype)
    stats = forward(logits, ids)
    want = backward(logits, ids, stats, *upstream)
    own = logits.clone()
    assert bitwise_equal(backward(own, ids, stats, *upstream, out=own), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_change_no_bit(dtype):
    logits, ids = logits_and_ids(37, 5001, dtype)
    upstream = upstream_gradients(37, dtype)

    def run():
        stats = forward(logits, ids)
        return (*stats, backward(logits, ids, stats, *upstream))

    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(bitwise_equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_no_rows():
    logits, ids = torch.empty(0, 50), torch.empty(0, dtype=torch.int64)
    stats = forward(logits, ids)
    assert [part.shape for part in stats] == [(0,)] * 3
    assert backward(logits, ids, stats, torch.empty(0), torch.empty(0)).shape == (0, 50)


def test_refusals_name_the_argument():
    logits, ids = logits_and_ids(3, 50, torch.float32)
    with pytest.raises(RuntimeError, match="logits must be float16, bfloat16, float32 or float64"):
        token_logprob_fwd(logits.int(), ids, ALL_LIVE, torch.ones(1), torch.empty(0), False)
    with pytest.raises(RuntimeError, match="token_ids must have 3 elements, got 2"):
        forward(logits, ids[:2])
    with pytest.raises(RuntimeError, match="token_ids has the wrong dtype"):
        forward(logits, ids.int())
    with pytest.raises(RuntimeError, match="contiguous in its last dimension"):
        forward(logits.T.contiguous().T, ids)
    with pytest.raises(RuntimeError, match="temperature must have 3 elements"):
        forward(logits, ids, temperature=torch.ones(2))
    with pytest.raises(RuntimeError, match="mask must have 3 elements"):
        forward(logits, ids, torch.ones(2, dtype=torch.bool))
    stats = forward(logits, ids)
    with pytest.raises(RuntimeError, match="dlogits must have the shape of logits"):
        backward(logits, ids, stats, torch.ones(3), torch.empty(0), out=torch.empty(3, 49))
    with pytest.raises(RuntimeError, match="rows of dlogits must not overlap"):
        backward(
            logits, ids, stats, torch.ones(3), torch.empty(0), out=torch.empty(1, 50).expand(3, -1)
        )
