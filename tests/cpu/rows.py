"""Calls of token_logprob_fwd and token_logprob_bwd, and their comparison with float64 on the same stored logits."""

import torch

from fastgrpo import reference
from fastgrpo.ops.token_logprob import token_logprob_bwd, token_logprob_fwd
from fastgrpo.reference.token_logprob import accumulate_dtype
from fastgrpo.testing import assert_matches_reference
from tests.cpu.inputs import numbers
from tests.ops.tolerance import Tolerance

ALL_LIVE = torch.empty(0, dtype=torch.bool)


def forward(logits, ids, mask=ALL_LIVE, temperature=1.0, params=(), entropy=True):
    if not isinstance(temperature, torch.Tensor):
        temperature = numbers(logits.dtype, temperature)
    params = numbers(logits.dtype, *params)
    return token_logprob_fwd(logits, ids, mask, temperature, params, entropy)


def backward(logits, ids, stats, dlogprob, dentropy, temperature=1.0, params=(), out=None):
    if not isinstance(temperature, torch.Tensor):
        temperature = numbers(logits.dtype, temperature)
    out = (
        torch.full_like(logits, 7.0, memory_format=torch.contiguous_format) if out is None else out
    )
    params = numbers(logits.dtype, *params)
    token_logprob_bwd(logits, ids, temperature, params, *stats, dlogprob, dentropy, out)
    return out


def gold(logits, ids, temperature=1.0, params=(), dlogprob=None, dentropy=None):
    """Float64 statistics, and gradient if upstream gradients are given."""
    if not isinstance(temperature, torch.Tensor):
        temperature = numbers(logits.dtype, temperature)
    wide = (logits.double(), ids)
    maps = (temperature.double(), numbers(logits.dtype, *params).double())
    stats = reference.token_logprob_fwd(*wide, ALL_LIVE, *maps, True)
    if dlogprob is None:
        return stats
    upstream = (dlogprob.double(), dentropy.double())
    return stats, reference.token_logprob_bwd(*wide, *maps, *stats, *upstream)


def upstream_gradients(rows, dtype):
    g = torch.Generator().manual_seed(rows)
    return torch.randn(2, rows, generator=g, dtype=torch.float64).to(accumulate_dtype(dtype))


def check(logits, ids, temperature=1.0, params=()):
    """Statistics and gradient lie within the derived tolerances of float64."""
    tol = Tolerance.of(logits, temperature, *(params or (1.0,)))
    dlogprob, dentropy = upstream_gradients(len(ids), logits.dtype)
    want, want_gradient = gold(logits, ids, temperature, params, dlogprob, dentropy)
    stats = forward(logits, ids, temperature=temperature, params=params)
    assert_matches_reference(stats[0], want[0], atol=tol.logprob)
    entropy = want[1][want[1].isfinite()]
    largest = float(entropy.max()) if entropy.numel() else 0.0
    assert_matches_reference(stats[1], want[1], atol=tol.entropy(largest))
    assert_matches_reference(stats[2], want[2], atol=tol.logprob / tol.slope)
    assert torch.equal(stats[0], forward(logits, ids, ALL_LIVE, temperature, params, False)[0])
    gradient = backward(logits, ids, stats, dlogprob, dentropy, temperature, params)
    size = 4.0 * (1.0 + largest + tol.x)  # |upstream| < 4 of both, the entropy's times |log p + H|
    assert_matches_reference(gradient, want_gradient, atol=tol.dlogits(size, logits.dtype))
    return stats, gradient
