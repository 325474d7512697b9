"""A head split over two ranks (gloo, real processes) against the whole head in one process."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastgrpo import linear_token_logprob
from fastgrpo.functional.linear.shards import combine, log_odds_against
from fastgrpo.functional.vocabulary_parallel_token_logprob import vocabulary_parallel_token_logprob

N, H, V = 23, 6, 40
RANKS = 2
OPTIONS = {
    "plain": {},
    "entropy": {"with_entropy": True, "temperature": 0.7},
    "softcap": {"with_entropy": True, "logit_softcap": 3.0, "logit_scale": 0.5},
    "scale, small chunks": {"logit_scale": 1.5, "temperature": 2.0, "workspace_bytes": 2000},
}


def inputs(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=g, dtype=torch.float64).to(dtype)
    weight = torch.randn(V, H, generator=g, dtype=torch.float64).to(dtype)
    bias = torch.randn(V, generator=g, dtype=torch.float64).to(dtype)
    ids = torch.randint(V, (N,), generator=g)
    ids[:4] = torch.tensor([0, V // 2 - 1, V // 2, V - 1])  # both ends of both shards
    weight[ids[5]] = (
        40 * hidden[5] / hidden[5].norm() ** 2
    )  # a token that is certain: p = 1 - 1e-13
    mask = torch.rand(N, generator=g) > 0.2
    mask[:6] = True
    upstream = torch.randn(2, N, generator=g, dtype=torch.float64)
    upstream[:, 7] = 0.0  # a row without gradient
    return hidden, weight, bias, ids, mask, upstream


def run(score, hidden, weight, bias, ids, mask, upstream, **options):
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    out = score(leaves[0], leaves[1], ids, bias=leaves[2], mask=mask, **options)
    total = (out.logprob * upstream[0]).sum()
    if out.entropy is not None:
        total = total + (out.entropy * upstream[1]).sum()
    total.backward()
    return [t for t in out if t is not None], [t.grad for t in leaves]


def shards(weight, bias, cut, rank):
    part = slice(0, cut) if rank == 0 else slice(cut, V)
    return weight[part], bias[part], part.start


def compare(rank, cut, score_options):
    hidden, weight, bias, ids, mask, upstream = inputs()
    expected, grads = run(
        linear_token_logprob, hidden, weight, bias, ids, mask, upstream, **score_options
    )
    own_weight, own_bias, start = shards(weight, bias, cut, rank)

    def score(*args, **kwargs):
        return vocabulary_parallel_token_logprob(*args, vocabulary_start=start, **kwargs)

    actual, found = run(score, hidden, own_weight, own_bias, ids, mask, upstream, **score_options)
    own = (grads[0], *shards(grads[1], grads[2], cut, rank)[:2])
    for a, b in zip((*actual, *found), (*expected, *own), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def faults(rank):
    """A token that no shard holds, and a shard whose columns are all -inf."""
    hidden, weight, bias, ids, _, _ = inputs()
    ids[2], ids[3] = V, -100
    bias[V // 2 :] = -torch.inf
    own_weight, own_bias, _ = shards(weight, bias, V // 2, rank)
    out = vocabulary_parallel_token_logprob(
        hidden, own_weight, ids, bias=own_bias, with_entropy=True
    )
    assert out.logprob[2:4].isnan().all()
    known = (ids >= 0) & (ids < V)
    expected = linear_token_logprob(
        hidden, weight, ids.clamp(0, V - 1), bias=bias, with_entropy=True
    )
    for a, b in zip(out, expected, strict=True):
        torch.testing.assert_close(a[known], b[known], rtol=1e-11, atol=1e-12)


def worker(rank, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=RANKS)
    try:
        for options in OPTIONS.values():
            compare(rank, V // 2, options)
        compare(
            rank, 13, OPTIONS["entropy"]
        )  # shards of different size, 13 columns no multiple of anything
        faults(rank)
        sums_are_local(rank)
    finally:
        dist.destroy_process_group()


def sums_are_local(rank):
    """reduce_hidden_gradient=False leaves each rank its own share; the shares add up."""
    hidden, weight, bias, ids, mask, upstream = inputs()
    own_weight, own_bias, _ = shards(weight, bias, V // 2, rank)

    def score(*args, **kwargs):
        return vocabulary_parallel_token_logprob(*args, reduce_hidden_gradient=False, **kwargs)

    _, found = run(score, hidden, own_weight, own_bias, ids, mask, upstream)
    share = found[0].clone()
    dist.all_reduce(share)
    _, grads = run(linear_token_logprob, hidden, weight, bias, ids, mask, upstream)
    assert not torch.allclose(found[0], grads[0])
    torch.testing.assert_close(share, grads[0], rtol=1e-11, atol=1e-12)


def test_two_ranks(tmp_path):
    mp.spawn(worker, args=(tmp_path / "rendezvous",), nprocs=RANKS)


def test_combine_keeps_a_certain_token_exact():
    """float32, p = 1 - 1e-12 in one shard, 1e-13 in the other: 1 - p would be 0."""
    logprob = torch.tensor([[-1e-12], [-torch.inf]])
    lse = torch.tensor(
        [[30.0], [30.0 - 29.9336]]
    )  # the other shard's sum is e^-29.93 = 1e-13 of this one's
    parts = torch.stack([lse, logprob, torch.zeros(2, 1), torch.tensor([[1.0], [0.0]])], dim=1)
    whole = combine(parts, torch.ones(1)).logprob
    assert whole.item() == pytest.approx(-1.1e-12, rel=1e-3)


@pytest.mark.parametrize("p", [1e-30, 0.3, 1 - 1e-7])
def test_log_odds(p):
    logprob = torch.tensor(p, dtype=torch.float64).log()
    expected = torch.log1p(torch.tensor(-p, dtype=torch.float64)) - logprob
    assert log_odds_against(logprob).item() == pytest.approx(expected.item())


def test_needs_a_process_group():
    with pytest.raises(ValueError, match=r"torch\.distributed to be initialised"):
        vocabulary_parallel_token_logprob(
            torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1, dtype=torch.int64)
        )
