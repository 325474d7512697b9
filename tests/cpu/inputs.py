"""Inputs of the tests of the compiled CPU kernels: logits, tokens and random objectives."""

import itertools
import math
import random

import pytest
import torch
from torch import Tensor

import fastgrpo
from fastgrpo import ops
from fastgrpo.reference.token_logprob import accumulate_dtype
from fastgrpo.spec import (
    MAX_GATES,
    PARAMS,
    Between,
    Estimator,
    KLGrad,
    KLTarget,
    Level,
    Pool,
    PoolGrad,
    Scope,
    Shape,
    Stat,
    Surrogate,
    When,
)

INF, NAN = math.inf, math.nan
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def require_compiled(op: str) -> None:
    """Skip where the package was built without its CPU library, or another backend was asked for."""
    assert ops is not None
    kernel = fastgrpo.backend_report().ops[op]["cpu"]
    if kernel.name != "C++":
        pytest.skip(f"{op} runs on {kernel.name}: {kernel.why}", allow_module_level=True)


def logits_and_ids(
    rows: int, vocabulary: int, dtype: torch.dtype, scale: float = 4.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed + 7 * vocabulary)
    logits = (scale * torch.randn(rows, vocabulary, generator=g)).to(dtype)
    return logits, torch.randint(0, vocabulary, (rows,), generator=g)


def numbers(dtype: torch.dtype, *values: float) -> Tensor:
    """A tensor in the accumulation dtype of `dtype`."""
    return torch.tensor(values, dtype=accumulate_dtype(dtype))


def random_objective(rng: random.Random) -> tuple[list[int], list[float]]:
    """A specification and parameters that act, every code drawn from its whole range."""

    def code(kind: type) -> int:
        return int(rng.choice(list(kind)))

    gates = rng.choice((0, 0, 1, 2, MAX_GATES))
    spec = [
        code(Level), code(PoolGrad), rng.choice((int(Surrogate.RATIO), int(Surrogate.LOGP))), code(Shape),
        code(Estimator), code(KLGrad), code(KLTarget), gates,
    ]  # fmt: skip
    for _ in range(gates):
        spec += [code(Stat), code(Between), code(Pool), code(When), code(Scope)]
    values = {
        "pos_low": rng.choice((-INF, 0.8)), "pos_high": rng.choice((INF, 1.2)),
        "neg_low": rng.choice((-INF, 0.8)), "neg_high": rng.choice((INF, 1.5)),
        "d_clamp": rng.choice((INF, 20.0, 0.3)),
        "log_low": rng.choice((-INF, -0.2)), "log_high": rng.choice((INF, 0.2)),
        "pool_low": rng.choice((-INF, -0.3)), "pool_high": rng.choice((INF, 0.3)),
        "shape_pos_a": 1.5, "shape_pos_b": 0.7, "shape_neg_a": 1.1, "shape_neg_b": 0.4,
        "beta": rng.choice((0.0, 0.04, 0.3)), "kl_clamp_in": rng.choice((INF, 20.0, 0.4)),
        "kl_clamp_out": rng.choice((INF, 10.0, 0.1)), "kl_ratio_cap": rng.choice((INF, 1.1)),
    }  # fmt: skip
    bounds = [
        (rng.choice((-INF, -0.2, 0.0)), rng.choice((INF, 0.5, 1.1))) for _ in range(MAX_GATES)
    ]
    return spec, [values.get(name, 0.0) for name in PARAMS] + list(itertools.chain(*bounds))


def policy_arguments(
    lengths: list[int], dtype: torch.dtype, seed: int, absent: float = 0.4
) -> tuple[list[Tensor], Tensor]:
    """Per-token arguments of `policy_loss` in order, and cu_seqlens; masked slots hold garbage.

    Each optional one is absent with probability `absent`. Some advantages, weights and entropy weights are 0.
    """
    rng, g, n = random.Random(seed), torch.Generator().manual_seed(seed), sum(lengths)

    def normal(size: float = 1.0) -> Tensor:
        return (torch.randn(n, generator=g, dtype=torch.float64) * size).to(dtype)

    def share(fraction: float) -> Tensor:
        return torch.rand(n, generator=g) < fraction

    logprob, mask = -normal(2.0).abs() - 1e-3, share(0.8)
    advantage = normal().masked_fill(share(0.2), 0.0)
    weight = (normal().abs() / max(n, 1)) * mask
    optional = [
        logprob + normal(0.3),  # old
        logprob + normal(0.5),  # ref
        (logprob + normal(0.2)).masked_fill(share(0.1), NAN),  # rollout
        normal(0.1),  # log_weight
        normal().abs().masked_fill(share(0.2), 0.0),  # token_weight
        normal().abs(),  # kl_weight
        normal().abs(),  # entropy
        normal(0.1).abs().masked_fill(share(0.3), 0.0),  # entropy_weight
    ]
    optional = [logprob.new_empty(0) if rng.random() < absent else value for value in optional]
    arguments = [logprob, advantage, mask, weight, *optional]
    for value in arguments:
        if value.dtype == dtype and value.numel() and value is not weight:
            value[~mask] = rng.choice((NAN, INF, -INF, 7.0))
    ends = list(itertools.accumulate(lengths, initial=0))
    return arguments, torch.tensor(ends, dtype=torch.int32)


def widen(arguments: list[Tensor]) -> list[Tensor]:
    """The same stored numbers in float64."""
    return [value.double() if value.is_floating_point() else value for value in arguments]
