"""Random batches of tokens and random specifications for the policy-loss kernels."""

import itertools
import random

import torch
from interpreter_helpers import assert_close
from torch import Tensor

from fastgrpo.objective import Objective
from fastgrpo.spec import (
    METRICS,
    NUM_PARAMS,
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

OPTIONAL = (
    "old",
    "ref",
    "rollout",
    "log_weight",
    "token_weight",
    "kl_weight",
    "entropy",
    "entropy_weight",
)
PRESETS = [
    Objective.grpo(beta=0.04),
    Objective.dapo(delta=1.2, beta=0.1),
    Objective.gspo(epsilon=0.02, epsilon_high=0.03, beta=0.1),
    Objective.gspo_token(epsilon=0.02, epsilon_high=0.03),
    Objective.gmpo(epsilon=0.1, beta=0.1),
    Objective.cispo(epsilon_high=1.1),
    Objective.sapo(beta=0.1),
    Objective.vespo(),
    Objective.rloo(),
    Objective.reinforce(),
    Objective.topr(),
    Objective.dppo_tv(low=0.05, high=0.05),
    Objective.dppo_kl(low=0.01, high=0.01),
    Objective.dro(beta=0.3),
]  # fmt: skip


def tokens(
    lengths: list[int],
    dtype: torch.dtype,
    seed: int = 0,
    noise: float = 0.2,
    mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """Arguments of `policy_loss` up to cu_seqlens; a fifth of the tokens is masked and holds garbage."""
    n = sum(lengths)
    generator = torch.Generator().manual_seed(seed + n)

    def normal(size: float = 1.0) -> Tensor:
        return (torch.randn(n, generator=generator, dtype=torch.float64) * size).to(dtype)

    logprob = -normal(2.0).abs() - 1e-3
    drawn = torch.rand(n, generator=generator) < 0.8
    mask = drawn if mask is None else mask
    advantage = normal()
    advantage[:: max(1, n // 5)] = 0.0
    values = {
        "logprob": logprob,
        "advantage": advantage,
        "mask": mask,
        "weight": normal().abs() / max(n, 1),
        "old": logprob + normal(noise),
        "ref": logprob + normal(noise),
        "rollout": logprob + normal(noise),
        "log_weight": normal(0.1),
        "token_weight": normal().abs(),
        "kl_weight": normal().abs(),
        "entropy": normal().abs(),
        "entropy_weight": normal(0.1 / max(n, 1)).abs(),
    }
    values["weight"][~mask] = 0.0
    values["token_weight"][1::7] = 0.0
    values["rollout"][2::5] = torch.nan
    garbage = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30], dtype=dtype).repeat(n)
    for name, value in values.items():
        if name not in ("mask", "weight"):
            value[~mask] = garbage[:n][~mask]
    ends = list(itertools.accumulate(lengths, initial=0))
    return values | {"cu_seqlens": torch.tensor(ends, dtype=torch.int32)}


def without(values: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return values | {name: values[name].new_empty(0) for name in names}


def random_choice(seed: int, pooled: bool = True) -> tuple[list[int], list[float], tuple[str, ...]]:
    """A random specification with parameters that act, and the optional inputs that are absent."""
    rng = random.Random(seed)
    estimator = rng.choice(list(Estimator))
    gates = rng.choice([0, 0, 1, 2, 4])
    spec = [
        rng.choice(list(Level)) if pooled else Level.TOKEN,
        rng.choice(list(PoolGrad)),
        rng.choice([Surrogate.RATIO, Surrogate.LOGP]),
        rng.choice(list(Shape)),
        estimator,
        rng.choice(list(KLGrad)),
        rng.choice(list(KLTarget)),
        gates,
    ]  # fmt: skip
    for _ in range(gates):
        pool = rng.choice(list(Pool)) if pooled else Pool.TOKEN
        spec += [rng.choice(list(Stat)), rng.choice(list(Between)), pool]
        spec += [rng.choice(list(When)), rng.choice(list(Scope))]
    values = {
        "pos_low": 0.5, "pos_high": 1.15, "neg_low": 0.85, "neg_high": 1.3,
        "d_clamp": rng.choice([torch.inf, 0.3]), "log_low": rng.choice([-torch.inf, -0.1]),
        "log_high": rng.choice([torch.inf, 0.1]), "pool_low": -1.5, "pool_high": 1.0,
        "shape_pos_a": 1.0, "shape_pos_b": 0.7, "shape_neg_a": 1.3, "shape_neg_b": 0.9,
        "beta": rng.choice([0.0, 0.1]), "kl_clamp_in": rng.choice([torch.inf, 0.3]),
        "kl_clamp_out": rng.choice([torch.inf, 0.03]), "kl_ratio_cap": 1.1,
    }  # fmt: skip
    params = [values.get(name, 0.0) for name in PARAMS] + [-0.21, 0.17] * (
        (NUM_PARAMS - len(PARAMS)) // 2
    )
    absent = tuple(name for name in OPTIONAL if rng.random() < 0.3)
    return [int(code) for code in spec], params, absent


def assert_outputs(got: tuple[Tensor, ...], want: tuple[Tensor, ...], factor: float = 64) -> None:
    """Compare loss, token_loss, dlogprob and metrics with float64.

    A ratio is exp of a difference of log-probs: a few eps times |logprob| (up to 8 here), and sums of them; hence
    `factor` eps of the largest value in each output.
    """
    eps = torch.finfo(got[0].dtype).eps
    for value, gold in zip(got[:3], want[:3], strict=True):
        largest = float(gold[gold.isfinite()].abs().max()) if gold.isfinite().any() else 0.0
        assert_close(value, gold, atol=factor * eps * largest, rtol=factor * eps)
    for name, value, gold in zip(METRICS, got[3], want[3], strict=True):
        scale = float(gold[2:][gold[2:].isfinite()].abs().sum()) + 1
        count = float(gold[1])
        assert float(value[1]) == count, name
        atol = factor * eps * scale * torch.tensor([max(count, 1.0), 1.0, 1.0, 1.0])
        torch.testing.assert_close(
            value, gold, atol=float(atol[0]), rtol=factor * eps, equal_nan=True
        )
        torch.testing.assert_close(
            value[2:], gold[2:], atol=float(atol[1]), rtol=factor * eps, equal_nan=True
        )
