"""What the linear ops refuse, before any work, naming the argument and what was wrong with it."""

import re

import pytest
import torch

from fastgrpo import Objective, linear_grpo_loss, linear_token_logprob, plan_rows
from fastgrpo.functional.linear_token_statistics import linear_token_statistics
from tests.linear_cases import B, H, T, V, make_batch

BATCH = make_batch(torch.float32)
N = B * T
LONG = torch.int64


def linear(**changes):
    arguments = {
        "hidden": BATCH.hidden,
        "weight": BATCH.weight,
        "token_ids": BATCH.token_ids,
        "bias": BATCH.bias,
    }
    return linear_token_logprob(**(arguments | changes))


def loss(**changes):
    arguments = {name: getattr(BATCH, name) for name in BATCH._fields}
    return linear_grpo_loss(**(arguments | changes))


def plan(**changes):
    return plan_rows(**({"mask": BATCH.mask, "advantage": BATCH.advantage} | changes))


SHARED = [  # refused by both ops alike
    ({"hidden": [1.0]}, TypeError, "hidden must be a float16, bfloat16, float32 or float64 tensor"),
    ({"hidden": BATCH.token_ids}, TypeError, "hidden must be a float16"),
    (
        {"hidden": torch.zeros(B, T, H + 1)},
        ValueError,
        f"weight must have shape [V, H] with V >= 1 and H = {H + 1}",
    ),
    ({"hidden": torch.zeros(B, T, 0)}, ValueError, "hidden must have shape [..., H] with H >= 1"),
    ({"hidden": torch.zeros(())}, ValueError, "hidden must have shape [..., H] with H >= 1"),
    ({"weight": BATCH.weight.long()}, TypeError, "weight must be a float16"),
    ({"weight": torch.zeros(H)}, ValueError, "weight must have shape [V, H]"),
    ({"weight": torch.zeros(0, H)}, ValueError, "weight must have shape [V, H] with V >= 1"),
    (
        {"weight": torch.zeros(H, V)},
        ValueError,
        f"got a tensor of shape ({H}, {V}), torch.float32, on cpu",
    ),
    (
        {"weight": torch.zeros(V, H, device="meta")},
        ValueError,
        "weight must be on the device of hidden (cpu)",
    ),
    (
        {"bias": torch.zeros(V + 1)},
        ValueError,
        f"bias must have shape ({V},) (one entry per row of weight)",
    ),
    ({"bias": torch.zeros(V, dtype=LONG)}, TypeError, "bias must be a float16"),
    ({"bias": torch.zeros(V, device="meta")}, ValueError, "bias must be on the device of hidden"),
    ({"token_ids": BATCH.token_ids[:, 1:]}, ValueError, f"token_ids must have shape ({B}, {T})"),
    ({"token_ids": BATCH.hidden[..., 0]}, TypeError, "token_ids must be an integer tensor"),
    ({"mask": BATCH.mask.float()}, TypeError, "mask must be a bool or integer tensor"),
    ({"mask": BATCH.mask[:1]}, ValueError, f"mask must have shape ({B}, {T})"),
    ({"temperature": 0.0}, ValueError, "temperature must be > 0 and finite, got 0.0"),
    ({"temperature": torch.ones(T)}, ValueError, f"temperature must have shape ({B}, {T})"),
    ({"logit_scale": -1.0}, ValueError, "logit_scale must be > 0 and finite"),
    ({"logit_softcap": 0.0}, ValueError, "logit_softcap must be None, or > 0 and finite"),
    ({"with_entropy": "yes"}, TypeError, "with_entropy must be True or False"),
    (
        {"logits_precision": "bf16"},
        ValueError,
        "logits_precision must be one of auto, float32, input, got 'bf16'",
    ),
    ({"workspace_bytes": 0}, ValueError, "workspace_bytes must be None or >= 1, got 0"),
    ({"workspace_bytes": 1e9}, TypeError, "workspace_bytes must be None or an integer, got float"),
    ({"workspace_bytes": True}, TypeError, "workspace_bytes must be None or an integer, got bool"),
    ({"capacity": -1}, ValueError, "capacity must be None or >= 0, got -1"),
    (
        {"weight_grad_buffer": torch.zeros(V, H).bfloat16()},
        TypeError,
        "weight_grad_buffer must be a float32 tensor",
    ),
    ({"weight_grad_buffer": torch.zeros(V, 1)}, ValueError, "weight_grad_buffer must have shape"),
    (
        {"weight_grad_buffer": torch.zeros(H, V).t()},
        ValueError,
        "weight_grad_buffer must be contiguous",
    ),
    ({"weight_grad_buffer": torch.zeros(V, H, requires_grad=True)}, ValueError, "not require grad"),
]
LOSS = [
    (
        {"hidden": BATCH.hidden[0]},
        ValueError,
        "hidden must hold padded [B, T, H] tokens, or packed",
    ),
    ({"advantage": BATCH.advantage[:, None]}, ValueError, "advantage must have shape"),
    ({"old_logprob": BATCH.old_logprob[:, :1]}, ValueError, "old_logprob must have shape"),
    ({"objective": "grpo"}, TypeError, "objective must be a fastgrpo Objective, got str 'grpo'"),
    (
        {"objective": Objective.grpo(beta=0.1), "ref_logprob": None},
        ValueError,
        "ref_logprob is required",
    ),
    ({"normalizer": -1.0}, ValueError, "normalizer must be > 0"),
    ({"grad_scale": 0.0}, ValueError, "grad_scale must be > 0 and finite"),
    ({"score_inactive": 1}, TypeError, "score_inactive must be True or False"),
    ({"plan": {"rows": 3}}, TypeError, "plan must be a RowPlan of plan_rows, got dict"),
    (
        {"plan": plan_rows(BATCH.mask[:2], BATCH.advantage[:2])},
        ValueError,
        f"plan was made for {2 * T} tokens",
    ),
    (
        {"plan": plan(objective=Objective.gspo())},
        ValueError,
        "plan was made for another kind of objective than 'grpo'",
    ),
    (
        {"plan": plan(advantage=torch.zeros(B))},
        ValueError,
        "plan leaves out tokens that have a gradient",
    ),
    (
        {"weight_grad_buffer": torch.zeros(V, H), "grad_scale": 2.0},
        ValueError,
        "weight_grad_buffer needs grad_scale=1",
    ),
    ({"cu_seqlens": torch.tensor([0, N])}, ValueError, "hidden must hold packed [N, H] tokens"),
]
PLAN = [
    ({"mask": BATCH.mask.float()}, TypeError, "mask must be a bool or integer tensor"),
    (
        {"mask": BATCH.mask[0]},
        ValueError,
        "mask must be padded [B, T], or packed [N] with cu_seqlens",
    ),
    ({"advantage": BATCH.advantage[:2]}, ValueError, f"advantage must have shape ({B},)"),
    (
        {"advantage": torch.zeros(B, device="meta")},
        ValueError,
        "advantage must be on the device of mask",
    ),
    ({"token_weight": torch.ones(B)}, ValueError, "token_weight must have shape"),
    ({"objective": "grpo"}, TypeError, "objective must be a fastgrpo Objective"),
    ({"capacity": 2.0}, TypeError, "capacity must be None or an integer"),
    (
        {"mask": BATCH.mask.reshape(-1), "cu_seqlens": torch.tensor([0.0])},
        TypeError,
        "cu_seqlens must be an int32",
    ),
]


def check(function, changes, error, message):
    with pytest.raises(error, match=re.escape(message)) as caught:
        function(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", range(len(SHARED)))
@pytest.mark.parametrize("function", [linear, loss])
def test_both_ops(function, case):
    check(function, *SHARED[case])


@pytest.mark.parametrize("case", range(len(LOSS)))
def test_loss(case):
    check(loss, *LOSS[case])


@pytest.mark.parametrize("case", range(len(PLAN)))
def test_plan(case):
    check(plan, *PLAN[case])


def test_statistics():
    with pytest.raises(
        ValueError, match="outputs must be among entropy, log_sum_sq_probs, mean_logit, is_top1"
    ):
        linear_token_statistics(BATCH.hidden, BATCH.weight, BATCH.token_ids, outputs=("top1",))


def test_refused_calls_leave_everything_alone():
    """No gradient, no buffer is touched by a call that raises."""
    buffer = torch.zeros(V, H)
    with pytest.raises(ValueError, match="temperature"):
        loss(weight_grad_buffer=buffer, temperature=-1.0)
    assert (buffer == 0).all()
