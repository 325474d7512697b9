"""Every listed bad argument is refused by name before any op runs; nothing is broadcast, cast or guessed."""

import pytest
import torch

from fastgrpo import Objective, grpo_loss, kl_estimate, policy_loss, token_logprob
from fastgrpo.choices import Correction, Gate, Reduce
from tests.ops.bad_arguments import (
    BAD_HEADS,
    BAD_MASKS,
    BAD_OVERWRITES,
    B,
    Bad,
    T,
    V,
    bad_per_token,
    bad_positive,
    check_refused,
    ints,
    meta,
    valid_arguments,
)

NAN, INF = float("nan"), float("inf")
PROMPT = {"objective": Objective.dapo().replace(reduce=Reduce(per="prompt"))}
CORRECTION = "the objective's correction or gates"
CORRECTED = {"objective": Objective(correction=Correction())}
ROLLOUT_GATE = {"objective": Objective(gates=(Gate(stat="k1", high=1.0, between="theta_rollout"),))}
ENTROPY_GATE = {"objective": Objective(gates=(Gate(stat="entropy", low=0.1),))}
WITH_KL = {"objective": Objective.grpo(beta=0.04)}
BONUS = {"objective": Objective(entropy_coef=0.1)}
PACKED = {
    "logprob": torch.zeros(6),
    "advantage": torch.ones(2),
    "mask": torch.ones(6, dtype=torch.bool),
}


def offsets(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


TWO_PACKED = {**PACKED, "cu_seqlens": offsets(0, 3, 6)}

# What both losses take besides the policy itself.
BAD_BATCHES = [
    *BAD_MASKS,
    Bad("mask", None, TypeError, "must be a bool or integer tensor, got NoneType"),
    Bad("advantage", [1.0, 1.0], TypeError, "must be a float16, bfloat16, float32 or float64 tensor"),
    Bad("advantage", ints(B), TypeError, "must be a float16"),
    Bad("advantage", torch.ones(B, 1), ValueError, r"must have shape \(2, 3\) .*or \(2,\)"),
    Bad("advantage", torch.ones(B - 1), ValueError, r"must have shape \(2,\)"),
    Bad("advantage", torch.ones(T), ValueError, r"must have shape \(2,\)"),
    Bad("advantage", torch.ones(()), ValueError, r"must have shape"),
    Bad("advantage", torch.ones(B, T + 1), ValueError, r"must have shape \(2, 3\)"),
    Bad("advantage", torch.ones(T, B), ValueError, r"must have shape \(2, 3\)"),
    Bad("advantage", torch.ones(B, T, 1), ValueError, r"must have shape \(2, 3\)"),
    Bad("advantage", torch.ones(B, requires_grad=True), ValueError, "gets no gradient"),
    Bad("advantage", meta(torch.ones(B)), ValueError, r"must be on the device of .*\(cpu\)"),
    *bad_per_token("old_logprob"),
    *bad_per_token("ref_logprob"),
    *bad_per_token("rollout_logprob"),
    *bad_per_token("token_weight"),
    *bad_per_token("kl_weight"),
    Bad("objective", "grpo", TypeError, "must be a fastgrpo Objective, got str 'grpo'"),
    Bad("objective", Objective.grpo, TypeError, "must be a fastgrpo Objective"),
    Bad("objective", Objective(surrogate="nowhere"), ValueError, "must be ratio, logp or a name given to",
        label="unknown surrogate", got="got 'nowhere'"),
    *bad_positive("normalizer"),
    Bad("normalizer", torch.ones(2), ValueError, "must be a number or hold one real element"),
    Bad("normalizer", torch.tensor(0.0), ValueError, "must be > 0 and finite", label="tensor 0"),
    Bad("normalizer", torch.tensor(NAN), ValueError, "must be > 0 and finite", label="tensor NaN"),
    Bad("normalizer", torch.tensor(INF), ValueError, "must be > 0 and finite", label="tensor inf"),
    Bad("normalizer", torch.ones((), requires_grad=True), ValueError, "gets no gradient"),
    Bad("group_size", 0, ValueError, "must be >= 1", PROMPT),
    Bad("group_size", -2, ValueError, "must be >= 1", PROMPT),
    Bad("group_size", 3, ValueError, "must divide the 2 sequences", PROMPT),
    Bad("group_size", 2.0, TypeError, "must be an integer", PROMPT),
    Bad("group_size", "2", TypeError, "must be an integer", PROMPT),
    Bad("group_size", True, TypeError, "must be an integer", PROMPT),
    Bad("group_size", None, ValueError, "reduce per='prompt' needs group_size or group_ids, got neither", PROMPT),
    Bad("group_size", 1, ValueError, "at most one of group_size and group_ids",
        {**PROMPT, "group_ids": ints(B)}, "both", "both"),
    Bad("group_ids", torch.zeros(B), TypeError, "must be an integer tensor", PROMPT),
    Bad("group_ids", ints(B, T), ValueError, r"must have shape \(2,\)", PROMPT),
    Bad("group_ids", ints(B + 1), ValueError, r"must have shape \(2,\)", PROMPT),
    Bad("group_ids", meta(ints(B)), ValueError, r"must be on the device of", PROMPT),
    Bad("ref_logprob", None, ValueError, "is required by objective.kl.beta = 0.04, got None", WITH_KL),
    Bad("rollout_logprob", None, ValueError, f"is required by {CORRECTION}, got None", CORRECTED),
    Bad("rollout_logprob", None, ValueError, f"is required by {CORRECTION}, got None", ROLLOUT_GATE, "None for a gate"),
    Bad("old_logprob", None, ValueError, f"is required by {CORRECTION}",
        {**CORRECTED, "rollout_logprob": torch.zeros(B, T)}),
]  # fmt: skip

POLICY = [
    Bad("logprob", [[0.0]], TypeError, "must be a float16"),
    Bad("logprob", ints(B, T), TypeError, "must be a float16"),
    Bad("logprob", torch.zeros(()), ValueError, r"must hold padded \[B, T\] tokens, or packed \[N\]"),
    Bad("logprob", torch.zeros(B), ValueError, r"must hold padded \[B, T\] tokens, or packed \[N\]"),
    Bad("logprob", torch.zeros(B, T, 1), ValueError, r"must hold padded \[B, T\] tokens"),
    Bad("logprob", torch.zeros(B, T), ValueError, r"must hold packed \[N\] tokens when cu_seqlens is given",
        {"cu_seqlens": torch.tensor([0, 6], dtype=torch.int32)}, "padded with cu_seqlens"),
    Bad("entropy", [[0.0]], TypeError, "must be a float16"),
    Bad("entropy", ints(B, T), TypeError, "must be a float16"),
    Bad("entropy", torch.zeros(B), ValueError, r"must have shape \(2, 3\)"),
    Bad("entropy", torch.zeros(B, 1), ValueError, r"must have shape \(2, 3\)"),
    Bad("entropy", meta(torch.zeros(B, T)), ValueError, r"must be on the device of logprob \(cpu\)"),
    Bad("entropy", None, ValueError, "is required by objective.entropy_coef = 0.1, got None", BONUS),
    Bad("entropy", None, ValueError, "is required by an entropy gate, got None", ENTROPY_GATE, "None for a gate"),
    Bad("cu_seqlens", [0, 6], TypeError, "must be an int32 or int64 tensor", PACKED),
    Bad("cu_seqlens", torch.tensor([0.0, 6.0]), TypeError, "int32 or int64 tensor", PACKED),
    Bad("cu_seqlens", offsets(0, 6)[None], ValueError, r"must have shape \[B \+ 1\]", PACKED),
    Bad("cu_seqlens", offsets(), ValueError, r"must have shape \[B \+ 1\]", PACKED),
    Bad("cu_seqlens", meta(offsets(0, 3, 6)), ValueError, "must be on the device of the tokens", PACKED),
    Bad("advantage", torch.ones(3), ValueError, r"must have shape \(2,\) .*\(6,\)", TWO_PACKED),
    Bad("advantage", torch.ones(2, 3), ValueError, r"must have shape \(6,\) .*\(2,\)", TWO_PACKED),
]  # fmt: skip

ONE_PASS = [
    *BAD_HEADS,
    *BAD_OVERWRITES,
    Bad("logits", torch.randn(T, V), ValueError, r"must hold padded \[B, T, V\] tokens", {"token_ids": ints(T)}),
    Bad("logits", torch.randn(V), ValueError, r"must hold padded \[B, T, V\] tokens", {"token_ids": ints()}),
    *bad_positive("grad_scale"),
    Bad("grad_scale", torch.ones(2), ValueError, "must be a number or hold one element"),
    Bad("grad_scale", ints(1), TypeError, "must be a float16"),
    Bad("grad_scale", torch.zeros(1), ValueError, "must be > 0 and finite"),
    Bad("with_entropy", False, ValueError, r"with_entropy=True\) is required by objective.entropy_coef = 0.1", BONUS,
        "False with a bonus", "got None"),
]  # fmt: skip

KL_LIMITS = [case for name in ("clamp_in", "clamp_out", "ratio_cap") for case in (
    Bad(name, 0.0, ValueError, "must be None or > 0"),
    Bad(name, -1.0, ValueError, "must be None or > 0"),
    Bad(name, NAN, ValueError, "must be None or > 0"),
    Bad(name, "20", TypeError, "must be a number"),
)]  # fmt: skip
KL = [
    Bad("logprob", [0.0], TypeError, "must be a float16"),
    Bad("logprob", ints(B, T), TypeError, "must be a float16"),
    *bad_per_token("ref_logprob"),
    *bad_per_token("old_logprob"),
    Bad("estimator", "k4", ValueError, "must be one of k1, k2, k3, abs"),
    Bad("estimator", "", ValueError, "must be one of k1, k2, k3, abs"),
    Bad("estimator", 3, ValueError, "must be one of k1, k2, k3, abs"),
    Bad("gradient", "none", ValueError, "must be one of path, k2, ratio, ratio_detached"),
    Bad("gradient", None, ValueError, "must be one of path, k2, ratio, ratio_detached"),
    *KL_LIMITS,
]


@pytest.mark.parametrize("bad", [*BAD_HEADS, *BAD_MASKS, *BAD_OVERWRITES], ids=str)
def test_token_logprob_refuses(bad):
    check_refused(token_logprob, bad)


@pytest.mark.parametrize("bad", [*POLICY, *BAD_BATCHES], ids=str)
def test_policy_loss_refuses(bad):
    check_refused(policy_loss, bad)


@pytest.mark.parametrize("bad", [*ONE_PASS, *BAD_BATCHES], ids=str)
def test_grpo_loss_refuses(bad):
    check_refused(grpo_loss, bad)


@pytest.mark.parametrize("bad", KL, ids=str)
def test_kl_estimate_refuses(bad):
    check_refused(kl_estimate, bad)


# Offsets that do not cut [0, N) into sequences, read on the CPU only.
@pytest.mark.parametrize("values", [(1, 6), (0, 5), (0, 7), (0, 4, 2, 6), (6, 0), (-1, 6)])
def test_cu_seqlens_must_cut_the_tokens(values):
    with pytest.raises(
        ValueError, match=r"cu_seqlens must rise from 0 to the number of tokens \(6\), got \["
    ):
        policy_loss(
            **{**PACKED, "advantage": torch.ones(len(values) - 1)}, cu_seqlens=offsets(*values)
        )


@pytest.mark.parametrize("function", [token_logprob, policy_loss, grpo_loss, kl_estimate])
def test_the_arguments_that_the_tables_break_are_valid(function):
    function(**valid_arguments(function))
