"""`checks("strict")`: which argument holds the fault, where in the user's own shape, its value, and the rule."""

import math
import re

import pytest
import torch

from fastgrpo import (
    Objective,
    checks,
    group_advantage,
    grpo_loss,
    linear_grpo_loss,
    linear_token_logprob,
    policy_loss,
    token_logprob,
)

NAN, INF = math.nan, math.inf
B, T, V, H = 2, 3, 7, 4


def inputs(packed: bool = False) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    values = {
        "logits": torch.randn(B, T, V, generator=g),
        "hidden": torch.randn(B, T, H, generator=g),
        "weight": torch.randn(V, H, generator=g),
        "token_ids": torch.randint(V, (B, T), generator=g),
        "logprob": -torch.rand(B, T, generator=g),
        "old_logprob": -torch.rand(B, T, generator=g),
        "temperature": torch.ones(B, T),
        "advantage": torch.ones(B),
        "mask": torch.ones(B, T, dtype=torch.bool),
    }
    if packed:
        flat = {name: v.flatten(0, 1) for name, v in values.items() if v.shape[:2] == (B, T)}
        values |= flat | {"cu_seqlens": torch.tensor([0, T, 2 * T], dtype=torch.int32)}
    return values


CALLS = {
    "token_logprob": (token_logprob, ("logits", "token_ids"), ("temperature",)),
    "linear_token_logprob": (linear_token_logprob, ("hidden", "weight", "token_ids"), ()),
    "policy_loss": (policy_loss, ("logprob", "advantage", "mask"), ("old_logprob",)),
    "grpo_loss": (grpo_loss, ("logits", "token_ids", "advantage", "mask"), ("old_logprob",)),
    "linear_grpo_loss": (linear_grpo_loss, ("hidden", "weight", "token_ids", "advantage", "mask"), ("old_logprob",)),
}  # fmt: skip


def call(op: str, values: dict[str, torch.Tensor]) -> object:
    function, positional, named = CALLS[op]
    extra = {
        name: values[name]
        for name in (*named, *(("cu_seqlens",) if "cu_seqlens" in values else ()))
    }
    return function(*(values[name] for name in positional), **extra)  # fmt: skip


@pytest.mark.parametrize(
    ("op", "name", "index", "value", "message"),
    [
        ("token_logprob", "token_ids", (1, 2), 7, r"token_ids[1, 2] must be in [0, 7), got 7"),
        ("token_logprob", "token_ids", (0, 1), -100, r"token_ids[0, 1] must be in [0, 7), got -100"),
        ("token_logprob", "logits", (1, 2, 5), NAN, r"logits[1, 2, 5] must be finite or -inf, got nan"),
        ("token_logprob", "logits", (0, 0, 3), INF, r"logits[0, 0, 3] must be finite or -inf, got inf"),
        ("linear_token_logprob", "hidden", (0, 2, 1), NAN, r"hidden[0, 2, 1] must be finite, got nan"),
        ("linear_token_logprob", "token_ids", (0, 2), 9, r"token_ids[0, 2] must be in [0, 7), got 9"),
        ("linear_token_logprob", "weight", (3, 2), NAN, r"weight[3, 2] must be finite, got nan; 5 more"),
        ("policy_loss", "logprob", (1, 1), NAN, r"logprob[1, 1] must be finite, got nan"),
        ("policy_loss", "old_logprob", (0, 1), NAN, r"old_logprob[0, 1] must be finite, got nan"),
        ("policy_loss", "advantage", (1,), NAN, r"advantage[1] must be finite, got nan; 2 more tokens at fault"),
        ("grpo_loss", "token_ids", (1, 0), 8, r"token_ids[1, 0] must be in [0, 7), got 8"),
        ("grpo_loss", "logits", (0, 2, 6), NAN, r"logits[0, 2, 6] must be finite or -inf, got nan"),
        ("grpo_loss", "advantage", (0,), INF, r"advantage[0] must be finite, got inf; 2 more tokens at fault"),
        ("linear_grpo_loss", "hidden", (1, 1, 3), NAN, r"hidden[1, 1, 3] must be finite, got nan"),
        ("linear_grpo_loss", "old_logprob", (1, 1), NAN, r"old_logprob[1, 1] must be finite, got nan"),
    ],
)  # fmt: skip
def test_the_fault_is_named(op, name, index, value, message):
    values = inputs()
    values[name][index] = value
    with checks("strict"), pytest.raises(ValueError, match=f"^{re.escape(f'{op}: {message}')}"):
        call(op, values)
    with checks("flag"):
        call(op, values)


@pytest.mark.parametrize(
    ("name", "index", "message"),
    [
        ("token_ids", (4,), "token_ids[4] must be in [0, 7), got 99"),
        ("advantage", (1,), "advantage[1] must be finite, got nan; 2 more tokens at fault"),
    ],
)
def test_packed_tokens_have_flat_places_and_sequences_their_own(name, index, message):
    values = inputs(packed=True)
    values[name][index] = 99 if name == "token_ids" else NAN
    with checks("strict"), pytest.raises(ValueError, match=re.escape(f"grpo_loss: {message}")):
        call("grpo_loss", values)


def test_the_sampled_token_must_be_possible():
    """Its log-probability stands in the loss of CISPO itself, not only in a ratio, which is clamped."""
    values = inputs()
    token = int(values["token_ids"][1, 1])
    values["logits"][1, 1, token] = -INF
    names = ("logits", "token_ids", "advantage", "mask")
    message = f"grpo_loss: logits[1, 1, {token}] must not be -inf: it is the sampled token's"
    with checks("strict"), pytest.raises(ValueError, match=re.escape(message)):
        grpo_loss(*(values[name] for name in names), objective=Objective.cispo())


def test_other_tokens_may_be_impossible_and_masked_faults_do_not_count():
    values = inputs()
    other = (int(values["token_ids"][1, 1]) + 1) % V
    values["logits"][1, 1, other] = -INF
    values["logits"][0, 2] = NAN
    values["token_ids"][0, 2] = -1
    values["mask"][0, 2] = False
    with checks("strict"):
        call("grpo_loss", values)


def test_an_infinite_reward_that_only_the_device_sees_is_named(monkeypatch):
    """On a CPU it is refused before any work; here as on a GPU, where looking would cost a sync."""
    monkeypatch.setattr("fastgrpo.functional.group_advantage.is_readable", lambda _: False)
    reward = torch.tensor([[1.0, 2.0], [3.0, INF]])
    with checks("strict"), pytest.raises(ValueError, match=r"reward\[1, 1\] must be finite"):
        group_advantage(reward, group_size=2)
