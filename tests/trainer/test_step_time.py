"""The step-time benchmark: its contenders compute the same update, and each reports its parts."""

import random

import pytest
import torch

from benchmarks import step_time
from benchmarks.step_time import Case, EagerPolicy, Words, compare, make_model
from fastgrpo import Objective
from fastgrpo.trainer.data.batch import make_batch
from fastgrpo.trainer.policy import Policy

SMALL = Case(hidden=16, layers=1, prompts=2, group=2, prompt_tokens=4, new_tokens=5, beta=0.1)


@pytest.fixture(autouse=True)
def _small_vocabulary(monkeypatch):
    monkeypatch.setattr(step_time, "VOCABULARY", 500)


def test_the_eager_loss_is_the_same_loss():
    rng, tokenizer = random.Random(0), Words(SMALL).tokenizer()
    rows = [[rng.randrange(3, 500) for _ in range(n)] for n in (3, 5, 4, 2)]
    batch = make_batch([[7, 8], [9], [7, 8], [9]], rows, 0)
    advantage, n = torch.tensor([1.0, -0.5, -1.0, 2.0]), len(batch.token_ids)
    ref = -6.0 + 0.1 * torch.randn(n, generator=torch.Generator().manual_seed(0))
    found = []
    for kind in (Policy, EagerPolicy):
        policy = kind(make_model(SMALL, tokenizer))
        result = policy(
            batch, advantage=advantage, ref_logprob=ref, objective=Objective.grpo(beta=0.1)
        )
        result.loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in policy.parameters()])
        found.append((result.loss.detach(), result.logprob, result.metrics["entropy"], gradient))
    for ours, eager in zip(*found, strict=True):
        assert torch.allclose(ours, eager, rtol=1e-4, atol=1e-6)


def test_all_take_turns_and_report_their_parts():
    pytest.importorskip("trl", reason="TRL is not installed: pip install 'fastgrpo[integrations]'")
    records = compare(SMALL, steps=2)
    assert [r["trainer"] for r in records] == ["fastgrpo", "fastgrpo, eager loss", "TRL"]
    for record in records:
        assert len(record["repetitions"]) == 2
        for parts in record["repetitions"]:
            assert 0 < parts["head + loss"] < parts["step"]
            assert 0 < parts["generate"] < parts["step"]
    assert records[0]["ratio"] == 1.0
