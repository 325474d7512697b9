"""CPU micro-benchmarks under pytest-benchmark, to see what a change costs; not collected by the default test run.

pytest benchmarks --benchmark-save=before       then change something, and
pytest benchmarks --benchmark-compare=0001 --benchmark-compare-fail=median:10%

Processor time, so that a busy machine matters little. Sizes are small: what is reported elsewhere comes from
`fastgrpo bench`, which also judges the answers and has the peers.
"""

import time

import pytest
import torch

from fastgrpo import (
    Objective,
    group_advantage,
    grpo_loss,
    kl_estimate,
    linear_grpo_loss,
    policy_loss,
    token_logprob,
)
from fastgrpo.testing import make_inputs

pytest.importorskip("pytest_benchmark")
pytestmark = pytest.mark.benchmark(timer=time.process_time, min_rounds=5, max_time=0.5, warmup=True)
BATCH, LENGTH, VOCABULARY, HIDDEN = 4, 16, 32_000, 128
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@DTYPES
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
def test_token_logprob(benchmark, dtype, entropy):
    x = make_inputs(BATCH, LENGTH, VOCABULARY, dtype)
    benchmark(token_logprob, x.logits, x.token_ids, mask=x.mask, with_entropy=entropy)


@DTYPES
@pytest.mark.parametrize(
    "preset", ["grpo", "gspo"]
)  # one pass; three steps, because it pools over sequences
def test_grpo_loss_in_place(benchmark, dtype, preset):
    x = make_inputs(BATCH, LENGTH, VOCABULARY, dtype)
    objective = getattr(Objective, preset)()

    def run():
        leaf = x.logits.detach().requires_grad_()
        sides = x.loss_arguments()
        grpo_loss(
            leaf, x.token_ids, **sides, objective=objective, overwrite_logits=True
        ).loss.backward()

    benchmark(run)


@pytest.mark.parametrize("active", [1.0, 0.25])
def test_linear_grpo_loss(benchmark, active):
    x = make_inputs(BATCH, LENGTH, 8000)
    hidden = torch.randn(BATCH, LENGTH, HIDDEN).bfloat16().requires_grad_()
    weight = torch.randn(8000, HIDDEN).bfloat16().requires_grad_()
    sides = x.loss_arguments()
    sides["advantage"][round(BATCH * active) :] = 0.0

    def run():
        hidden.grad = weight.grad = None
        linear_grpo_loss(hidden, weight, x.token_ids, **sides).loss.backward()

    benchmark(run)


@pytest.mark.parametrize("tokens", [256, 16_384])
def test_policy_loss(benchmark, tokens):
    logprob = -torch.rand(tokens // 32, 32)
    mask, advantage = torch.ones(logprob.shape, dtype=torch.bool), torch.randn(len(logprob))
    objective = Objective.grpo(beta=0.04)
    benchmark(
        policy_loss,
        logprob,
        advantage,
        mask,
        old_logprob=logprob,
        ref_logprob=logprob,
        objective=objective,
    )


def test_kl_estimate(benchmark):
    logprob = -torch.rand(16_384)
    benchmark(kl_estimate, logprob, logprob - 0.1, "k3")


@pytest.mark.parametrize("groups", [8, 4096])
def test_group_advantage(benchmark, groups):
    benchmark(group_advantage, torch.rand(groups * 8), group_size=8)
