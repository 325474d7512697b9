"""Failure catalogue N1-N8: what stands in the logits (-inf, NaN, huge values) and how wide the rows are.

The oracle for masked vocabularies drops the -inf columns and applies torch's own log_softmax in float64 to the rest, so
it shares no code and no special case with the package. Both ways to the loss are run: token_logprob then policy_loss,
and grpo_loss in one pass.
"""

import pytest
import torch

from fastgrpo import Objective, grpo_loss, token_logprob
from fastgrpo.testing import assert_matches_reference, make_inputs
from tests.ops.common import (
    INF,
    NAN,
    PATHS,
    bitwise_equal,
    plain_logprob,
    reference_score,
    score,
)
from tests.ops.tolerance import Tolerance, assert_scored

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def kept_columns_oracle(logits, ids, kept):
    """Log-prob, entropy and d(sum logprob + sum entropy)/dlogits in float64 with the other columns removed."""
    compact = logits[:, kept].double().requires_grad_()
    position = torch.searchsorted(kept, ids)
    logprob, entropy = plain_logprob(compact, position)
    (logprob.sum() + entropy.sum()).backward()
    grad = torch.zeros(logits.shape, dtype=torch.float64).index_copy(1, kept, compact.grad)
    return logprob.detach(), entropy.detach(), grad


def scored_tokens(logits, ids, **options):
    """Log-prob, entropy and the gradient of their sum from the public op."""
    leaf = logits.detach().clone().requires_grad_()
    out = token_logprob(leaf, ids, with_entropy=True, **options)
    (out.logprob.sum() + out.entropy.sum()).backward()
    return out.logprob.detach(), out.entropy.detach(), leaf.grad


def check_against_kept_columns(logits, ids, kept):
    logprob, entropy, grad = scored_tokens(logits, ids)
    want_logprob, want_entropy, want_grad = kept_columns_oracle(logits, ids, kept)
    tol = Tolerance.of(logits)
    assert_matches_reference(logprob, want_logprob, atol=tol.logprob)
    assert_matches_reference(entropy, want_entropy, atol=tol.entropy(float(want_entropy.max())))
    size = 2.0 + float(want_entropy.max()) + tol.x  # of the two upstream gradients' factors
    assert_matches_reference(grad, want_grad, atol=tol.dlogits(size, grad.dtype))
    dropped = torch.ones(logits.shape[1], dtype=torch.bool).index_fill(0, kept, False)
    assert bool((grad[:, dropped] == 0).all()), "a -inf column has a gradient"


# 5000 columns: more than one block of every kernel; 50 kept is a usual top-k.
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_N1_top_k_mask_keeps_everything_finite(dtype):
    g = torch.Generator().manual_seed(1)
    full = (torch.randn(6, 5000, generator=g) * 3).to(dtype)
    kept = torch.randperm(5000, generator=g)[:50].sort().values
    logits = torch.full_like(full, -INF).index_copy(1, kept, full[:, kept])
    ids = kept[torch.randint(50, (6,), generator=g)]
    check_against_kept_columns(logits, ids, kept)


# 4096 is at least one whole block in every kernel, so that the running maximum is still -inf when the block ends.
@pytest.mark.parametrize("first_finite", [1, 4096, 4499])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_N2_leading_columns_masked(first_finite, dtype):
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(4, 5000, generator=g).to(dtype)
    logits[:, :first_finite] = -INF
    ids = torch.full((4,), 4500)
    check_against_kept_columns(logits, ids, torch.arange(first_finite, 5000))


@pytest.mark.parametrize("path", PATHS)
def test_N2_leading_columns_masked_in_a_loss(path):
    data = make_inputs(3, 4, 5000, seed=3)
    data.logits[..., :4096] = -INF
    ids = torch.randint(4096, 5000, (3, 4))
    actual = score(path, data.logits, ids, data.advantage, data.mask)
    expected = reference_score(data.logits, ids, data.advantage, data.mask)
    assert_scored(actual, expected, data.logits, data.advantage)
    assert bool((actual.dlogits[..., :4096] == 0).all())


def damaged(kind, logits):
    """Damage live row (0, 1) as a fault that only the device can see."""
    bad = logits.clone()
    if kind == "all -inf":
        bad[0, 1] = -INF
    elif kind == "+inf":
        bad[0, 1, 5] = INF
    elif kind == "NaN":
        bad[0, 1, 5] = NAN
    else:
        bad[0, 1] = NAN
    return bad


# One damaged row of twelve: that row is NaN, the metrics count it, no other row changes by one bit (N3, N5).
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["all -inf", "+inf", "NaN", "all NaN"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_N3_N5_fault_stays_in_its_row(path, kind, dtype):
    data = make_inputs(3, 4, 97, dtype, seed=4)
    mask = torch.ones(3, 4, dtype=torch.bool)
    args = (data.token_ids, data.advantage, mask)
    sides = {"old_logprob": data.old_logprob, "ref_logprob": data.ref_logprob}
    clean = score(path, data.logits, *args, objective=Objective.grpo(beta=0.04), **sides)
    bad = score(
        path, damaged(kind, data.logits), *args, objective=Objective.grpo(beta=0.04), **sides
    )
    assert bool(bad.loss.isnan()), "a fault must be visible in the loss"
    assert bool(bad.dlogits[0, 1].isnan().all()), "loss and gradient must agree on finiteness"
    assert bool(bad.logprob[0, 1].isnan())
    assert bool(bad.token_loss[0, 1].isnan())
    assert float(bad.metrics.sum("fault")) == 1
    assert float(clean.metrics.sum("fault")) == 0
    others = torch.ones(3, 4, dtype=torch.bool)
    others[0, 1] = False
    for name in ("logprob", "entropy", "token_loss", "dlogits"):
        actual, expected = bad.tensors()[name][others], clean.tensors()[name][others]
        assert bitwise_equal(actual, expected), f"{name} of another row changed"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["all -inf", "+inf", "NaN", "all NaN"])
def test_N3_N5_no_effect_where_masked(path, kind):
    data = make_inputs(3, 4, 97, seed=5)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[0, 1] = False
    args = (data.token_ids, data.advantage, mask)
    clean, bad = (score(path, z, *args) for z in (data.logits, damaged(kind, data.logits)))
    for name, value in clean.tensors().items():
        assert bitwise_equal(bad.tensors()[name], value), name


# A target that a grammar or top-k mask forbids: log-prob -inf is true, the gradient of its row is 0, nothing is NaN.
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("old", ["none", "finite", "-inf"])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_N4_forbidden_target(path, old, advantage):
    data = make_inputs(2, 3, 50, seed=6)
    mask = torch.ones(2, 3, dtype=torch.bool)
    logits = data.logits.clone()
    logits[0, 1, data.token_ids[0, 1]] = -INF
    sides = {}
    if old != "none":
        sides["old_logprob"] = data.old_logprob.clone()
        if old == "-inf":
            sides["old_logprob"][0, 1] = -INF
    out = score(path, logits, data.token_ids, torch.tensor([advantage, 1.0]), mask, **sides)
    assert float(out.logprob[0, 1]) == -INF
    assert bool(out.entropy[0, 1].isfinite())
    assert bool(out.loss.isfinite())
    assert bool(out.dlogits.isfinite().all())
    assert bool((out.dlogits[0, 1] == 0).all())
    assert float(out.metrics.sum("fault")) == 1
    assert bool((out.dlogits[1] != 0).any()), "the other sequence still learns"


# Differences of these logits overflow float32 once divided by T, unless the maximum is subtracted first (N6).
HUGE = [
    pytest.param(torch.float32, 1e37, 1e-2, id="fp32-1e37-T.01"),
    pytest.param(torch.float32, 3e38, 1.0, id="fp32-3e38"),
    pytest.param(torch.bfloat16, 3e38, 1.0, id="bf16-3e38"),
    pytest.param(torch.bfloat16, 3e38, 0.5, id="bf16-3e38-T.5"),
    pytest.param(torch.float16, 6e4, 1e-2, id="fp16-6e4-T.01"),
]


@pytest.mark.parametrize(("dtype", "size", "temperature"), HUGE)
def test_N6_huge_logits_do_not_overflow(dtype, size, temperature):
    z = torch.full((3, 40), size).to(dtype)
    z[0, 1:] = -size if size * 2 < 3e38 else 0.0  # a single peak
    z[1, ::2] *= 0.5  # 20 equal peaks
    ids = torch.tensor([0, 1, 7])
    logprob, entropy, grad = scored_tokens(z, ids, temperature=temperature)
    probability = torch.zeros(3, 40, dtype=torch.float64)
    probability[0, 0], probability[1, 1::2], probability[2] = 1.0, 1 / 20, 1 / 40
    want_logprob = probability[torch.arange(3), ids].log()
    want_entropy = -(probability * probability.clamp(min=1e-300).log()).sum(1)
    assert_matches_reference(logprob, want_logprob, atol=1e-6)
    assert_matches_reference(entropy, want_entropy, atol=4e-6)
    onehot = torch.nn.functional.one_hot(ids, 40)
    want_grad = (onehot - probability) / temperature  # equal peaks: the entropy is stationary
    # log p + H = 0 only up to a rounding of the entropy (4e-6), which the entropy's gradient then carries
    assert_matches_reference(grad, want_grad, atol=4e-6 / temperature)


def test_N6_target_far_below_the_peak_saturates():
    z = torch.tensor([[1e37, -1e37], [1e37, 9.9e36]])
    logprob, _, grad = scored_tokens(z, torch.tensor([1, 1]), temperature=1e-2)
    assert float(logprob[0]) == -INF, "-2e39 is below float32: the nearest value is -inf"
    assert_matches_reference(
        logprob[1:], (z[1:, 1] - z[1:, 0]).double() / 1e-2, atol=0.0, rtol=1e-5
    )
    assert bool(grad.isfinite().all())


def test_N7_float64_is_computed_in_float64():
    g = torch.Generator().manual_seed(7)
    logits = torch.randn(5, 3000, generator=g, dtype=torch.float64) * 3
    ids = torch.randint(3000, (5,), generator=g)
    logprob, entropy, grad = scored_tokens(logits, ids)
    leaf = logits.clone().requires_grad_()
    want = plain_logprob(leaf, ids)
    (want[0].sum() + want[1].sum()).backward()
    assert logprob.dtype == entropy.dtype == grad.dtype == torch.float64
    tol = Tolerance.of(logits)
    assert_matches_reference(logprob, want[0], atol=tol.logprob)
    assert_matches_reference(entropy, want[1], atol=tol.entropy(10.0))
    assert_matches_reference(grad, leaf.grad, atol=tol.dlogits(30.0, torch.float64))


@pytest.mark.parametrize("path", PATHS)
def test_N7_float64_loss(path):
    data = make_inputs(3, 5, 101, torch.float64, seed=8)
    options = {"old_logprob": data.old_logprob, "objective": Objective.gspo(epsilon=0.5)}
    args = (data.logits, data.token_ids, data.advantage, data.mask)
    actual, expected = score(path, *args, **options), reference_score(*args, **options)
    assert actual.loss.dtype == actual.dlogits.dtype == torch.float64
    assert_scored(actual, expected, data.logits, data.advantage, objective=options["objective"])


# 1: probability 1. 2: the smallest softmax. 31: below every vector. 2^k +- 1: every tail. The rest are real heads.
SMALL = [1, 2, 3, 31, *(2**k + d for k in (4, 5, 6, 8, 10, 12, 13) for d in (-1, 0, 1))]
LARGE = [50_257, 65_535, 65_537, 128_256, 151_936, 262_144]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("vocabulary", SMALL)
def test_N8_vocabulary(vocabulary, dtype):
    check_vocabulary(vocabulary, dtype, rows=5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", LARGE)
def test_N8_large_vocabulary(vocabulary, dtype):
    check_vocabulary(vocabulary, dtype, rows=2)


def check_vocabulary(vocabulary, dtype, rows):
    data = make_inputs(rows, 1, vocabulary, dtype, seed=vocabulary)
    args = (data.logits, data.token_ids, data.advantage, torch.ones(rows, 1, dtype=torch.bool))
    expected = reference_score(*args, old_logprob=data.old_logprob)
    for path in PATHS:
        actual = score(path, *args, old_logprob=data.old_logprob)
        assert_scored(actual, expected, data.logits, data.advantage)
    if vocabulary == 1:
        assert bool((actual.logprob == 0).all())
        assert bool((actual.entropy == 0).all())
        assert bool((actual.dlogits == 0).all())


# Every way to scale, through both public functions, against torch's own log_softmax.
@pytest.mark.parametrize("temperature", [1.0, 0.6, "tensor", "per token"])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.3, None), (1.0, 4.0), (2.5, 4.0)])
def test_scaling_options_match_the_formula(temperature, scale, softcap):
    data = make_inputs(3, 4, 53, seed=9)
    if temperature == "tensor":
        temperature = torch.tensor(1.7)
    elif temperature == "per token":
        temperature = torch.linspace(0.4, 2.0, 12).view(3, 4)
    options = {"temperature": temperature, "logit_scale": scale, "logit_softcap": softcap}
    plain = data.logits.double().requires_grad_()
    divisor = (
        temperature.double().expand(3, 4) if isinstance(temperature, torch.Tensor) else temperature
    )
    want = plain_logprob(plain, data.token_ids, divisor, scale, softcap)
    leaf = data.logits.clone().requires_grad_()
    out = token_logprob(leaf, data.token_ids, with_entropy=True, **options)
    coldest = float(temperature.min()) if isinstance(temperature, torch.Tensor) else temperature
    tol = Tolerance.of(data.logits, coldest, scale, softcap)
    assert_matches_reference(out.logprob, want[0], atol=tol.logprob)
    assert_matches_reference(out.entropy, want[1], atol=tol.entropy(5.0))
    out.logprob.sum().backward()
    want[0].sum().backward()
    assert_matches_reference(leaf.grad, plain.grad, atol=tol.dlogits(1.0, torch.float32))
    mask = torch.ones(3, 4, dtype=torch.bool)
    one_pass = grpo_loss(data.logits, data.token_ids, data.advantage, mask, **options)
    assert_matches_reference(one_pass.logprob, want[0], atol=tol.logprob)
    assert_matches_reference(one_pass.entropy, want[1], atol=tol.entropy(5.0))


def test_one_pass_and_two_steps_agree_on_a_confident_token():
    """A token of probability 1 - 1e-13 keeps its log-prob and its gradient (plain log_softmax gives exactly 0)."""
    logits = torch.tensor([[[30.0, 0.0, 0.0]]], requires_grad=True)
    ids, advantage = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1)
    out = grpo_loss(logits, ids, advantage, torch.ones(1, 1, dtype=torch.bool))
    out.loss.backward()
    expected = -2 * torch.exp(torch.tensor(-30.0, dtype=torch.float64))
    assert float(out.logprob) == pytest.approx(float(expected), rel=1e-5)
    assert float(logits.grad[0, 0, 0]) == pytest.approx(float(expected), rel=1e-5)
