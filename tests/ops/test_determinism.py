"""Determinism and batch invariance (N35): the same bits again, in another order, other company, another layout."""

import pytest
import torch

from fastgrpo import group_advantage, grpo_loss
from fastgrpo.testing import assert_matches_reference, make_inputs
from tests.ops.common import OBJECTIVES, PATHS, Scored, assert_same_bits, bitwise_equal, score
from tests.ops.tolerance import Tolerance

B, T, V = 6, 5, 37


def batch(**changes):
    """Six ragged completions of three prompts with every optional argument."""
    data = make_inputs(B, T, V, seed=35)
    g = torch.Generator().manual_seed(36)
    tensors = {
        "logits": data.logits,
        "token_ids": data.token_ids,
        "advantage": data.advantage,
        "mask": data.mask,
        "old_logprob": data.old_logprob,
        "ref_logprob": data.ref_logprob,
        "rollout_logprob": data.old_logprob + 0.1 * torch.randn(B, T, generator=g),
        "token_weight": torch.rand(B, T, generator=g),
        "kl_weight": torch.rand(B, T, generator=g),
        "group_ids": torch.tensor([5, 5, 9, 9, 2, 2]),
    }
    return {**tensors, **changes}


PER_SEQUENCE = ("advantage", "group_ids")
PER_TOKEN = tuple(name for name in batch() if name not in PER_SEQUENCE)


def run(path, tensors, **options) -> Scored:
    tensors = dict(tensors)
    return score(
        path, tensors.pop("logits"), tensors.pop("token_ids"), tensors.pop("advantage"), tensors.pop("mask"),
        **tensors, **options,
    )  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_N35_repeated_runs(path, name):
    first = run(path, batch(), objective=OBJECTIVES[name])
    for _ in range(3):
        assert_same_bits(run(path, batch(), objective=OBJECTIVES[name]), first)


@pytest.mark.parametrize("path", PATHS)
def test_N35_one_hundred_runs_in_deterministic_mode(path):
    first = run(path, batch(), objective=OBJECTIVES["grpo_kl"])
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(100):
            assert_same_bits(run(path, batch(), objective=OBJECTIVES["grpo_kl"]), first)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["grpo_kl", "gspo", "per_prompt", "gate_sequence"])
def test_N35_thread_count(path, name):
    tensors = batch(logits=make_inputs(B, T, 4001, seed=1).logits)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(path, tensors, objective=OBJECTIVES[name]))
    finally:
        torch.set_num_threads(before)
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_batch_permutation_permutes_every_output(path, name):
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    plain = run(path, batch(), objective=OBJECTIVES[name])
    moved = run(
        path, {key: value[order] for key, value in batch().items()}, objective=OBJECTIVES[name]
    )
    for key in ("token_loss", "logprob", "entropy", "dlogits"):
        assert bitwise_equal(moved.tensors()[key], plain.tensors()[key][order]), key
    assert_matches_reference(moved.loss, plain.loss.double(), atol=1e-7)
    assert_matches_reference(moved.metrics.data, plain.metrics.data, atol=1e-9, rtol=1e-12)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_micro_batch_split(path, name):
    """With one `normalizer` for all parts, a part's results are those of the whole batch, and the losses add up."""
    options = {"objective": OBJECTIVES[name], "normalizer": 7.0}
    whole = run(path, batch(), **options)
    parts = [
        run(path, {key: value[rows] for key, value in batch().items()}, **options)
        for rows in (slice(0, 2), slice(2, 6))
    ]
    for key in ("token_loss", "logprob", "entropy", "dlogits"):
        if key == "dlogits" and OBJECTIVES[name].entropy_coef:
            continue  # not the bonus: its reduction may have a denominator of its own
        assert bitwise_equal(torch.cat([p.tensors()[key] for p in parts]), whole.tensors()[key]), (
            key
        )
    assert_matches_reference(parts[0].loss + parts[1].loss, whole.loss.double(), atol=2e-7)
    merged = parts[0].metrics.merge(parts[1].metrics)
    assert_matches_reference(merged.data, whole.metrics.data, atol=1e-9, rtol=1e-12)


def packed(tensors):
    """The same completions packed without the slots after each one's last live token."""
    lengths = [int(row.nonzero().max()) + 1 if row.any() else 0 for row in tensors["mask"]]
    keep = torch.arange(T) < torch.tensor(lengths)[:, None]
    flat = {k: v[keep] if k in PER_TOKEN else v for k, v in tensors.items()}
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return {**flat, "cu_seqlens": offsets}, keep


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_padded_and_packed_give_the_same_bits(path, name):
    mask = batch()["mask"].clone()
    mask[3] = False  # an empty completion: no token at all once packed
    mask[0, 0] = False  # a tool call inside a completion
    padded = run(path, batch(mask=mask), objective=OBJECTIVES[name])
    tensors, keep = packed(batch(mask=mask))
    flat = run(path, tensors, objective=OBJECTIVES[name])
    for key in ("token_loss", "logprob", "entropy", "dlogits"):
        assert bitwise_equal(flat.tensors()[key], padded.tensors()[key][keep]), key
    assert bitwise_equal(flat.loss, padded.loss)
    assert bitwise_equal(flat.metrics.data, padded.metrics.data)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "name", ["grpo_kl", "dapo", "gspo", "vespo", "gate_sequence", "truncated_is"]
)
def test_more_padding_changes_nothing(path, name):
    def widen(value):
        return torch.cat([value, torch.zeros(B, 3, *value.shape[2:], dtype=value.dtype)], 1)

    plain = run(path, batch(), objective=OBJECTIVES[name])
    wide = {key: widen(value) if key in PER_TOKEN else value for key, value in batch().items()}
    padded = run(path, wide, objective=OBJECTIVES[name])
    for key in ("token_loss", "logprob", "entropy", "dlogits"):
        assert bitwise_equal(padded.tensors()[key][:, :T], plain.tensors()[key]), key
    assert bitwise_equal(padded.loss, plain.loss)
    assert bitwise_equal(padded.metrics.data, plain.metrics.data)


# A row's bits must not depend on how its memory lies, either: vector bodies and tails meet other columns.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_storage_offset_does_not_change_a_bit(dtype):
    logits = batch()["logits"].to(dtype)
    expected = run("one_pass", batch(logits=logits))
    for offset in range(1, 9):
        memory = torch.empty(logits.numel() + offset, dtype=dtype)
        moved = memory[offset:].copy_(logits.flatten()).view(B, T, V)
        assert_same_bits(run("one_pass", batch(logits=moved)), expected, f"at offset {offset}")


# Metamorphic: what mathematics says about softmax, within the rounding of the shifted or permuted numbers.
@pytest.mark.parametrize("path", PATHS)
def test_adding_a_constant_and_permuting_the_vocabulary(path):
    tensors = batch(
        logits=(batch()["logits"] * 64).round() / 64
    )  # multiples of 1/64: the shift is exact
    plain = run(path, tensors)
    shifted = run(path, {**tensors, "logits": tensors["logits"] + 8.0})
    order = torch.randperm(V, generator=torch.Generator().manual_seed(2))
    inverse = order.argsort()
    moved = run(
        path,
        {
            **tensors,
            "logits": tensors["logits"][..., order],
            "token_ids": inverse[tensors["token_ids"]],
        },
    )
    tol = Tolerance.of(tensors["logits"] + 8.0)
    for other, columns in ((shifted, slice(None)), (moved, inverse)):
        assert_matches_reference(other.logprob, plain.logprob.double(), atol=tol.logprob)
        assert_matches_reference(other.loss, plain.loss.double(), atol=4 * tol.logprob)
        assert_matches_reference(
            other.dlogits[..., columns],
            plain.dlogits.double(),
            atol=tol.dlogits(1.0, torch.float32),
        )


def test_group_advantage_repeats_and_permutes():
    reward = torch.randn(64, 3, generator=torch.Generator().manual_seed(3))
    ids = torch.arange(64) % 7
    plain = group_advantage(reward, group_ids=ids).advantage
    assert bitwise_equal(group_advantage(reward, group_ids=ids).advantage, plain)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(4))
    moved = group_advantage(reward[order], group_ids=ids[order]).advantage
    assert_matches_reference(moved, plain[order].double(), atol=1e-7)


def test_results_do_not_depend_on_the_grain_of_other_work():
    """One row alone gives the bits it has among 400 others (no batch-dependent kernel choice)."""
    data = make_inputs(400, 1, 101, seed=5)
    whole = grpo_loss(data.logits, data.token_ids, data.advantage, data.mask, normalizer=1.0)
    for row in (0, 1, 199, 399):
        rows = slice(row, row + 1)
        alone = grpo_loss(
            data.logits[rows],
            data.token_ids[rows],
            data.advantage[rows],
            data.mask[rows],
            normalizer=1.0,
        )
        assert bitwise_equal(alone.logprob, whole.logprob[rows])
        assert bitwise_equal(alone.entropy, whole.entropy[rows])
        assert bitwise_equal(alone.token_loss, whole.token_loss[rows])
