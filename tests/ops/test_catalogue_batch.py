"""Failure catalogue N9-N15, and N28's valid forms: empty and masked batches, masked garbage, ids, strides, dtypes."""

import pytest
import torch

from fastgrpo import Objective, grpo_loss, kl_estimate, policy_loss, token_logprob
from fastgrpo.testing import assert_matches_reference, make_inputs
from tests.ops.common import (
    INF,
    LINEAR_PATHS,
    NAN,
    OBJECTIVES,
    PATHS,
    PRESETS,
    assert_same_bits,
    bitwise_equal,
    reference_score,
    score,
)
from tests.ops.tolerance import assert_scored


def sides(data, **extra):
    """Every optional per-token argument, as a trainer that uses all of them passes it."""
    g = torch.Generator().manual_seed(99)
    shape = data.mask.shape
    return {
        "old_logprob": data.old_logprob,
        "ref_logprob": data.ref_logprob,
        "rollout_logprob": data.old_logprob + 0.1 * torch.randn(shape, generator=g),
        "token_weight": torch.rand(shape, generator=g),
        "kl_weight": torch.rand(shape, generator=g),
        "group_size": 1,
        **extra,
    }


# N9: no sequence, no position, and completions that are all empty, with every reduction. Loss 0 that can be
# differentiated, a gradient of the right shape, and finite metrics.
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "name", ["grpo", "dapo", "dr_grpo", "gspo", "luspo", "vespo", "per_prompt"]
)
@pytest.mark.parametrize(
    "shape", [(0, 4), (3, 0), (0, 0), (3, 4)], ids=["B=0", "T=0", "B=T=0", "masked"]
)
def test_N9_N10_nothing_to_learn_from(path, name, shape):
    batch, length = shape
    logits = torch.randn(batch, length, 11)
    out = score(
        path, logits, torch.zeros(shape, dtype=torch.int64), torch.ones(batch), torch.zeros(shape, dtype=torch.bool),
        old_logprob=torch.zeros(shape), group_size=1, objective=OBJECTIVES[name],
    )  # fmt: skip
    assert float(out.loss) == 0.0
    assert out.dlogits.shape == logits.shape
    assert bool((out.dlogits == 0).all())
    assert out.token_loss.shape == torch.Size(shape)
    assert all(float(value) == 0.0 for value in out.metrics.values())
    assert float(out.metrics.min("ratio")) == INF


def test_N9_packed_without_tokens():
    nothing = torch.empty(0, requires_grad=True)
    cu_seqlens = torch.zeros(3, dtype=torch.int32)
    mask = torch.empty(0, dtype=torch.bool)
    out = policy_loss(nothing, torch.ones(2), mask, cu_seqlens=cu_seqlens)
    out.loss.backward()
    assert float(out.loss.detach()) == 0.0
    assert nothing.grad.shape == (0,)


# A sequence without a live token counts in the denominator of GRPO (as in TRL) unless the objective says otherwise.
@pytest.mark.parametrize(("count_empty", "denominator"), [(True, 4), (False, 3)])
def test_N10_one_masked_sequence(count_empty, denominator):
    objective = Objective.grpo()
    objective = objective.replace(reduce=type(objective.reduce)(count_empty=count_empty))
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[2] = False
    out = policy_loss(torch.full((4, 5), -1.0), torch.ones(4), mask, objective=objective)
    assert float(out.loss) == pytest.approx(-3 / denominator)
    assert bool((out.token_loss[2] == 0).all())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_N11_masked_garbage_is_bitwise_irrelevant(path, name):
    """NaN, infinities and impossible ids in masked slots of every argument: no bit of any output changes."""
    data = make_inputs(4, 6, 37, seed=11)
    dead = ~data.mask
    clean = sides(data)
    options = {"objective": OBJECTIVES[name]}
    expected = score(
        path, data.logits, data.token_ids, data.advantage, data.mask, **clean, **options
    )
    assert bool((expected.dlogits != 0).any())
    for garbage, bad_id in ((NAN, -100), (INF, 2**40), (-INF, 37), (3e38, -1)):
        poisoned = {
            key: value.masked_fill(dead, garbage) if isinstance(value, torch.Tensor) else value
            for key, value in clean.items()
        }
        advantage = data.advantage[:, None].expand(4, 6).masked_fill(dead, garbage)
        logits = data.logits.masked_fill(dead[..., None], garbage)
        ids = data.token_ids.masked_fill(dead, bad_id)
        actual = score(path, logits, ids, advantage, data.mask, **poisoned, **options)
        assert_same_bits(actual, expected, f"with {garbage} in masked slots")


def test_N11_masked_entropy_garbage():
    data = make_inputs(3, 5, 7, seed=12)
    objective = OBJECTIVES["entropy_bonus"]
    results = []
    for entropy in (torch.ones(3, 5), torch.ones(3, 5).masked_fill(~data.mask, NAN)):
        leaves = [data.old_logprob.clone().requires_grad_(), entropy.requires_grad_()]
        out = policy_loss(
            leaves[0], data.advantage, data.mask, entropy=leaves[1], objective=objective
        )
        out.loss.backward()
        results.append([out.loss.detach(), out.metrics.data, *(leaf.grad for leaf in leaves)])
    assert all(bitwise_equal(a, b) for a, b in zip(*results, strict=True))


# -100 and -1 mark padding elsewhere; V is off by one; +-2^31 overflow 32 bits; 2^62 overflows a byte offset.
BAD_IDS = [-100, -1, 37, 2**31, -(2**31), 2**62]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bad_id", BAD_IDS)
def test_N12_bad_id_on_a_live_token(path, bad_id):
    data = make_inputs(2, 3, 37, seed=13)
    mask = torch.ones(2, 3, dtype=torch.bool)
    ids = data.token_ids.clone()
    ids[1, 2] = bad_id
    clean = score(path, data.logits, data.token_ids, data.advantage, mask)
    out = score(path, data.logits, ids, data.advantage, mask)
    assert bool(out.logprob[1, 2].isnan())
    assert bool(out.loss.isnan())
    assert bool(out.dlogits[1, 2].isnan().all())
    assert float(out.metrics.sum("fault")) == 1
    others = torch.ones(2, 3, dtype=torch.bool)
    others[1, 2] = False
    assert bitwise_equal(out.dlogits[others], clean.dlogits[others])
    assert bitwise_equal(out.logprob[others], clean.logprob[others])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_N12_integer_types_of_ids(dtype):
    data = make_inputs(2, 3, 37, seed=14)
    wide = token_logprob(data.logits, data.token_ids).logprob
    assert bitwise_equal(token_logprob(data.logits, data.token_ids.to(dtype)).logprob, wide)


def layouts(logits):
    """The same values in layouts that trainers produce."""
    vocabulary, n = logits.shape[-1], logits.numel()
    yield "contiguous", logits
    yield "[B, V, T] transposed", logits.transpose(1, 2).contiguous().transpose(1, 2)
    yield "[T, B, V] transposed", logits.transpose(0, 1).contiguous().transpose(0, 1)
    yield "logits[:, :-1]", torch.cat([logits, logits[:, :1]], 1)[:, :-1]
    yield (
        "a slice of a wider vocabulary",
        torch.cat([logits, logits[..., :3]], -1)[..., :vocabulary],
    )
    for offset in (1, 3):  # rows that start between two vector boundaries
        storage = torch.empty(n + offset, dtype=logits.dtype)
        yield (
            f"storage offset {offset}",
            storage[offset:].copy_(logits.flatten()).view(logits.shape),
        )
    yield "every second column", logits.repeat_interleave(2, -1)[..., ::2]
    yield "flipped twice", logits.flip(-1).contiguous().flip(-1)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "vocabulary", [37, 128]
)  # rows that share a 16-byte boundary, and rows that do not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_N14_layouts(path, vocabulary, dtype):
    data = make_inputs(3, 4, vocabulary, dtype, seed=15)
    args = (data.advantage, data.mask)
    options = {"old_logprob": data.old_logprob}
    expected = reference_score(data.logits, data.token_ids, *args, **options)
    for name, logits in layouts(data.logits):
        assert torch.equal(logits, data.logits), name
        actual = score(path, logits, data.token_ids, *args, **options)
        assert_scored(actual, expected, data.logits, data.advantage)


def test_N14_expanded_rows():
    """One row read for every token (stride 0): the gradient is the sum over its uses."""
    row = torch.randn(1, 1, 33, requires_grad=True)
    ids = torch.arange(6).view(2, 3)
    token_logprob(row.expand(2, 3, 33), ids).logprob.sum().backward()
    plain = row.detach().double().requires_grad_()
    torch.log_softmax(plain, -1).expand(2, 3, 33).gather(-1, ids[..., None]).sum().backward()
    assert_matches_reference(row.grad, plain.grad, atol=2e-6)


def test_N14_strided_token_arguments():
    """Per-token arguments may be strided views too."""
    data = make_inputs(4, 6, 19, seed=16)
    strided = {
        key: value.t().contiguous().t() for key, value in sides(data).items() if key != "group_size"
    }
    for path in PATHS:
        args = (data.logits, data.token_ids, data.advantage, data.mask)
        expected = score(path, *args, **sides(data))
        other = (
            data.token_ids.t().contiguous().t(),
            data.advantage,
            data.mask.t().contiguous().t(),
        )
        actual = score(path, data.logits, *other, **strided, group_size=1)
        assert_same_bits(actual, expected)


# float16 and bfloat16 sides are widened exactly, float64 ones rounded once: the result is that of the widened tensors.
@pytest.mark.parametrize("side_dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_N15_mixed_dtypes(side_dtype, logits_dtype):
    data = make_inputs(3, 4, 19, logits_dtype, seed=17)
    mixed = {key: value.to(side_dtype) for key, value in sides(data).items() if key != "group_size"}
    target = torch.float64 if logits_dtype == torch.float64 else torch.float32
    same = {key: value.to(target) for key, value in mixed.items()}
    advantage = data.advantage.to(side_dtype)
    objective = Objective.grpo(beta=0.04)
    for path in PATHS:
        head = (path, data.logits, data.token_ids)
        actual = score(*head, advantage, data.mask, objective=objective, **mixed)
        expected = score(*head, advantage.to(target), data.mask, objective=objective, **same)
        assert_same_bits(actual, expected)
        assert actual.loss.dtype == target
        assert actual.dlogits.dtype == logits_dtype


@pytest.mark.parametrize("path", PATHS)
def test_N15_autocast_changes_nothing(path):
    data = make_inputs(3, 4, 19, seed=18)
    args = (path, data.logits, data.token_ids, data.advantage, data.mask)
    expected = score(*args, **sides(data), objective=PRESETS["grpo_kl"])
    with torch.autocast("cpu", torch.bfloat16):
        actual = score(*args, **sides(data), objective=PRESETS["grpo_kl"])
    assert_same_bits(actual, expected)


def test_N15_low_precision_logprobs_get_their_own_dtype_back():
    logprob = torch.tensor([[-1.0, -0.5]], dtype=torch.bfloat16, requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    policy_loss(logprob, torch.ones(1), mask).loss.backward()
    assert logprob.grad.dtype == torch.bfloat16
    assert torch.equal(logprob.grad, torch.full((1, 2), -0.5, dtype=torch.bfloat16))
    kl = kl_estimate(logprob.detach(), logprob.detach() - 1)
    assert kl.dtype == torch.float32


# The documented forms of the advantage and of the mask; every other one is in test_errors.py.
def test_N28_advantage_per_sequence_equals_per_token():
    data = make_inputs(3, 4, 19, seed=19)
    per_token = data.advantage[:, None].expand(3, 4)
    for path in PATHS:
        args = (path, data.logits, data.token_ids)
        expected = score(*args, data.advantage, data.mask, **sides(data))
        actual = score(*args, per_token, data.mask, **sides(data))
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_N28_integer_masks(dtype):
    data = make_inputs(3, 4, 19, seed=20)
    expected = grpo_loss(data.logits, data.token_ids, data.advantage, data.mask)
    actual = grpo_loss(data.logits, data.token_ids, data.advantage, data.mask.to(dtype))
    assert bitwise_equal(actual.loss, expected.loss)
    assert bitwise_equal(actual.token_loss, expected.token_loss)


# float16 has a scale of its own for stored gradients, the power of two nearest the normaliser: of no token it is 1.
@pytest.mark.parametrize("path", [*PATHS, *LINEAR_PATHS])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_N10_nothing_to_learn_from_in_half_precision(path, dtype):
    data = make_inputs(3, 4, 11, dtype, seed=21)
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    out = score(path, data.logits, data.token_ids, data.advantage, nothing)
    assert float(out.loss) == 0.0
    assert bool((out.dlogits == 0).all())


@pytest.mark.parametrize("path", ["one_pass", "linear_one_pass"])
def test_N20_a_grad_scale_on_the_device_is_a_number_like_another(path):
    data = make_inputs(3, 4, 19, torch.bfloat16, seed=22)
    args = (path, data.logits, data.token_ids, data.advantage, data.mask)
    plain = score(*args).dlogits
    for scale in (64.0, torch.tensor(64.0), torch.tensor([0.25], dtype=torch.float64)):
        assert bitwise_equal(score(*args, grad_scale=scale).dlogits, plain), "a power of two"
    for bad in (0.0, -1.0, INF, NAN):
        with pytest.raises(ValueError, match="grad_scale must be > 0 and finite"):
            score(*args, grad_scale=torch.tensor(bad))
