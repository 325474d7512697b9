"""`kernels.token_logprob` against the float64 reference on the same stored inputs."""

import pytest
import torch
from interpreter_helpers import accumulate, assert_close, empty, logits_and_ids, statistic_atol
from torch import Tensor

from fastgrpo import reference
from fastgrpo.kernels import token_logprob

# 1 and 2: degenerate rows; 31, 127: less than one tile; 1000: tail of whole 16-byte groups; 1024: no tail; 4097: odd,
# so every row but the first is unaligned, several blocks; 32000: a real vocabulary of many blocks.
VOCABULARIES = [1, 2, 31, 127, 1000, 1024, 4097, 32000]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
NAN, INF = float("nan"), float("inf")


def _temperature(value: float | list[float], dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=accumulate(dtype)).reshape(-1)


def _forward(logits, token_ids, mask=None, temperature=None, params=None, entropy=True):
    mask = torch.empty(0, dtype=torch.bool) if mask is None else mask
    temperature = _temperature(1.0, logits.dtype) if temperature is None else temperature
    params = empty(logits.dtype) if params is None else params
    got = token_logprob.forward(logits, token_ids, mask, temperature, params, entropy)
    want = reference.token_logprob_fwd(
        logits.double(), token_ids, mask, temperature.double(), params.double(), entropy
    )
    return got, want


def _backward(logits, token_ids, stats, upstream, temperature=None, params=None, out=None):
    """`stats` is what `_forward` returned: the kernel's numbers, and the reference's for the reference."""
    stats, gold_stats = stats
    temperature = _temperature(1.0, logits.dtype) if temperature is None else temperature
    params = empty(logits.dtype) if params is None else params
    out = torch.full_like(logits, 7.0) if out is None else out
    before = logits.clone()
    token_logprob.backward(logits, token_ids, temperature, params, *stats, *upstream, out)
    want = reference.token_logprob_bwd(
        before.double(), token_ids, temperature.double(), params.double(),
        *gold_stats, *(x.double() for x in upstream),
    )  # fmt: skip
    return out, want


def _upstream(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return tuple(torch.randn(rows, generator=generator).to(accumulate(dtype)) for _ in range(2))


def _assert_gradient(got, want, atol, upstream, temperature=1.0):
    size = sum(float(x.abs().nan_to_num().max()) for x in upstream if x.numel()) * 2 / temperature
    tiny = torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps  # half is subnormal
    assert_close(got, want, atol=atol * size + tiny)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_forward_and_backward_match_float64(vocabulary, dtype):
    rows = 2 if vocabulary == 32000 else 4
    logits, token_ids = logits_and_ids(rows, vocabulary, dtype)
    temperature = _temperature(0.7, dtype)
    atol = statistic_atol(logits, temperature)
    got, want = _forward(logits, token_ids, temperature=temperature)
    for value, gold in zip(got, want, strict=True):
        assert_close(value, gold, atol)
    upstream = _upstream(rows, dtype)
    dlogits, gold = _backward(logits, token_ids, (got, want), upstream, temperature)
    _assert_gradient(dlogits, gold, atol, upstream, 0.7)


@pytest.mark.parametrize("params", [[0.5], [0.5, 7.0]], ids=["scale", "softcap"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_scale_softcap_and_temperature_per_row(params, dtype):
    logits, token_ids = logits_and_ids(3, 4097, dtype, scale=12.0)
    params = torch.tensor(params, dtype=accumulate(dtype))
    temperature = _temperature([0.5, 1.0, 3.0], dtype)
    atol = statistic_atol(logits, temperature)
    got, want = _forward(logits, token_ids, temperature=temperature, params=params)
    for value, gold in zip(got, want, strict=True):
        assert_close(value, gold, atol)
    upstream = _upstream(3, dtype)
    dlogits, gold = _backward(logits, token_ids, (got, want), upstream, temperature, params)
    _assert_gradient(dlogits, gold, atol, upstream, 0.5)


@pytest.mark.parametrize("which", ["logprob", "entropy", "both"])
def test_in_place_equals_out_of_place(which):
    logits, token_ids = logits_and_ids(3, 4097, torch.bfloat16)
    stats = _forward(logits, token_ids, entropy=which != "logprob")
    dlogprob, dentropy = _upstream(3, torch.bfloat16)
    none = empty(torch.bfloat16)
    upstream = (dlogprob if which != "entropy" else none, dentropy if which != "logprob" else none)
    apart, want = _backward(logits, token_ids, stats, upstream)
    _assert_gradient(apart, want, statistic_atol(logits, torch.ones(1)), upstream)
    within = logits.clone()
    _backward(within, token_ids, stats, upstream, out=within)
    assert torch.equal(apart, within)


def _views(vocabulary: int) -> list[Tensor]:
    base, _ = logits_and_ids(4, vocabulary + 8, torch.bfloat16)
    flat = torch.cat([base.flatten()[:1], base.flatten()])
    return [
        base[:, :-1],
        flat[1:].view(4, -1),  # storage offset of one element
        base[::2],
        base[:1].expand(4, -1),  # row stride 0
        torch.as_strided(
            base, (4, vocabulary), (vocabulary + 3, 1)
        ),  # aligned base, odd row stride
    ]


@pytest.mark.parametrize("view", range(5))
def test_strided_rows(view):
    logits = _views(2048)[view]
    token_ids = torch.arange(logits.shape[0]) * 17 + 1
    got, want = _forward(logits, token_ids)
    atol = statistic_atol(logits, torch.ones(1))
    for value, gold in zip(got, want, strict=True):
        assert_close(value, gold, atol)
    upstream = _upstream(logits.shape[0], torch.bfloat16)
    dlogits, gold = _backward(
        logits, token_ids, (got, want), upstream, out=torch.empty(logits.shape).bfloat16()
    )
    _assert_gradient(dlogits, gold, atol, upstream)


def test_gradient_stays_inside_its_rows():
    # Rows of 1003 columns in a buffer of 1024: nothing between them may be written.
    logits, token_ids = logits_and_ids(3, 1003, torch.float16)
    stats = _forward(logits, token_ids)
    upstream = _upstream(3, torch.float16)
    upstream[0][1] = upstream[1][1] = 0.0
    buffer = torch.full((5, 1024), 7.0, dtype=torch.float16)
    _backward(logits, token_ids, stats, upstream, out=buffer[1:4, 5:1008])
    assert (buffer[1:4, :5] == 7).all()
    assert (buffer[1:4, 1008:] == 7).all()
    assert (buffer[[0, 4]] == 7).all()
    assert (buffer[2, 5:1008] == 0).all()


def test_masked_rows_are_zero_and_not_read():
    logits, token_ids = logits_and_ids(4, 1000, torch.bfloat16)
    mask = torch.tensor([True, False, True, False])
    clean, want = _forward(logits, token_ids, mask)
    logits[1], logits[3] = NAN, INF
    token_ids[1], token_ids[3] = -100, 2**40
    dirty, _ = _forward(logits, token_ids, mask)
    for value, again, gold in zip(clean, dirty, want, strict=True):
        assert torch.equal(value, again)
        assert (value[~mask] == 0).all()
        assert_close(value, gold, 1e-5)


def test_idle_rows_are_zero_and_not_read():
    logits, token_ids = logits_and_ids(3, 4097, torch.float32)
    stats = _forward(logits, token_ids)
    logits[1] = NAN
    token_ids[1] = -100
    upstream = (torch.tensor([1.0, 0.0, -2.0]), torch.tensor([0.5, 0.0, 0.0]))
    dlogits, want = _backward(logits, token_ids, stats, upstream)
    assert (dlogits[1] == 0).all()
    assert_close(dlogits[[0, 2]], want[[0, 2]], 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_top_k_masked_vocabulary(
    dtype,
):  # N1, N2: most logits, and the whole first blocks, are -inf
    logits, _ = logits_and_ids(3, 9000, dtype)
    kept = torch.zeros(3, 9000, dtype=torch.bool)
    kept[0, ::180] = True
    kept[1, 8200:8250] = True
    kept[2, 8999] = True
    logits = logits.masked_fill(~kept, -INF)
    token_ids = torch.tensor([360, 8225, 8999])
    got, want = _forward(logits, token_ids)
    atol = statistic_atol(logits, torch.ones(1))
    for value, gold in zip(got, want, strict=True):
        assert_close(value, gold, atol)
    upstream = _upstream(3, dtype)
    dlogits, gold = _backward(logits, token_ids, (got, want), upstream)
    assert (dlogits[~kept] == 0).all()
    _assert_gradient(dlogits, gold, atol, upstream)


def test_faulty_rows_stay_alone():  # N3, N5, N12
    logits, token_ids = logits_and_ids(8, 4097, torch.float32)
    logits[0] = -INF
    logits[1, 5] = NAN
    logits[2, 4000] = INF
    logits[3, token_ids[3]] = INF
    token_ids[4:7] = torch.tensor([-100, 4097, 2**31 + 5])
    got, want = _forward(logits, token_ids)
    for value, gold in zip(got, want, strict=True):
        assert value[:7].isnan().all()
        assert_close(value, gold, 1e-5)
    upstream = _upstream(8, torch.float32)
    dlogits, gold = _backward(logits, token_ids, (got, want), upstream)
    assert dlogits[:7].isnan().all()
    assert_close(dlogits[7:], gold[7:], 1e-5)


def test_target_of_probability_zero():  # N4
    logits, token_ids = logits_and_ids(2, 4097, torch.float32)
    logits[0, token_ids[0]] = -INF
    got, want = _forward(logits, token_ids)
    assert got[0][0] == -INF
    assert got[1][0].isfinite()
    for value, gold in zip(got, want, strict=True):
        assert_close(value, gold, 1e-5)
    for dentropy in (torch.zeros(2), torch.tensor([0.3, 0.0])):
        dlogits, gold = _backward(logits, token_ids, (got, want), (torch.ones(2), dentropy))
        assert_close(dlogits, gold, 1e-5)
    dlogits, _ = _backward(logits, token_ids, (got, want), (torch.ones(2), torch.zeros(2)))
    assert (dlogits[0] == 0).all()


@pytest.mark.parametrize(
    ("dtype", "size", "temperature"),
    [(torch.float32, 1e37, 1e-2), (torch.float16, 6e4, 1.0), (torch.bfloat16, 3e38, 1.0)],
    ids=str,
)
def test_extreme_logits(dtype, size, temperature):  # N6: a difference of 1e-6 of the size decides
    logits = torch.zeros(4, 4097).to(dtype)
    logits[0, [3, 4000]] = torch.tensor([size, size]).to(dtype)
    logits[1, 3], logits[1, 4] = -size, size
    logits[2] = -size
    logits[3] = size
    token_ids = torch.tensor([4000, 3, 11, 4096])
    temperature = _temperature(temperature, dtype)
    got, want = _forward(logits, token_ids, temperature=temperature)
    assert_close(got[0][[0, 2, 3]], want[0][[0, 2, 3]], 1e-5)
    assert got[0][1] < -1e4  # -inf where float32 ends
    assert_close(got[1], want[1], 1e-5)
    upstream = (torch.tensor([1.0, 0.0, -1.0, 1.0]), torch.tensor([0.0, 0.0, 0.1, 0.1]))
    dlogits, _ = _backward(logits, token_ids, (got, want), upstream, temperature)
    # Even a float64 lse has no digits left for log(sum) beside 1e37, so the gold is taken from shifted logits.
    shifted = logits.double() - logits.double().amax(1, keepdim=True)
    _, stats = _forward(shifted, token_ids, temperature=temperature.double())
    _, gold = _backward(shifted, token_ids, (stats, stats), upstream, temperature.double())
    _assert_gradient(dlogits, gold, 1e-5, upstream, float(temperature))


@pytest.mark.parametrize("peak", [20.0, 90.0, 3000.0])
def test_maximum_far_above_the_first_block(peak):  # the fast pass, its limit, and the exact pass
    logits, token_ids = logits_and_ids(2, 40000, torch.float32)
    logits[:, 39000] = peak
    got, want = _forward(logits, token_ids)
    for value, gold in zip(got, want, strict=True):
        assert_close(value, gold, statistic_atol(logits, torch.ones(1)))


def test_confident_token_keeps_a_gradient():
    logits = torch.zeros(3, 1000)
    token_ids = torch.tensor([5, 5, 999])
    logits[[0, 1, 2], token_ids] = torch.tensor([30.0, 60.0, 85.0])
    got, want = _forward(logits, token_ids)
    assert (got[0] < 0).all()
    assert_close(got[0], want[0], atol=0.0, rtol=1e-5)
    assert_close(got[1][:1], want[1][:1], atol=0.0, rtol=1e-4)  # later ones vanish in the reference
    dlogits, gold = _backward(logits, token_ids, (got, want), (torch.ones(3), torch.zeros(3)))
    rows = torch.arange(3)
    assert_close(dlogits[rows, token_ids], gold[rows, token_ids], atol=0.0, rtol=1e-5)


def test_no_rows():
    got, _ = _forward(torch.empty(0, 64), torch.empty(0, dtype=torch.int64), entropy=False)
    assert [x.shape for x in got] == [(0,), (0,), (0,)]
    token_logprob.backward(
        torch.empty(0, 64), torch.empty(0, dtype=torch.int64), torch.ones(1), empty(torch.float32),
        *got, got[0], got[1], torch.empty(0, 64),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_accuracy_at_a_real_vocabulary(dtype):
    logits, token_ids = logits_and_ids(2, 151936, dtype, scale=15.0)
    got, want = _forward(logits, token_ids)
    ulp = torch.finfo(torch.float32).eps * want[0].abs()
    assert ((got[0] - want[0]).abs() <= torch.maximum(torch.tensor(1e-5), ulp)).all()
    assert ((got[1] - want[1]).abs() <= 2e-5).all()


def test_bitwise_repeatable():
    logits, token_ids = logits_and_ids(2, 4097, torch.bfloat16)
    first, _ = _forward(logits, token_ids)
    again, _ = _forward(logits, token_ids)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
