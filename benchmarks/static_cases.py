"""What `static_check` compiles: every launcher in the variants that differ in machine code, and their budgets."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrpo.choices import Gate
from fastgrpo.kernels import grpo_loss, kl_estimate, policy_loss, scale_gradient, token_logprob
from fastgrpo.objective import Objective
from fastgrpo.spec import Estimator, KLGrad

READ, WRITE, BOTH = (False,), (True,), (False, True)
# Instructions per element on sm_90 for aligned rows without softcap (DESIGN 5 of the project).
FORWARD, BACKWARD, ONE_PASS = 10.0, 8.0, 16.0


@dataclass(frozen=True)
class Case:
    """One call of a launcher."""

    name: str
    launch: Callable[[], object]
    item_bytes: int = 0  # of the logits
    passes: tuple[bool, ...] = ()  # loops that stream the row: storing or not
    budget: float | None = None  # of all these loops together
    everywhere: bool = False  # also for the architectures without budgets


class _Rows:
    """Two rows of logits and what goes with them; only addresses, strides and types matter."""

    def __init__(self, vocabulary: int, dtype: torch.dtype, softcap: bool = False) -> None:
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        self.logits = torch.zeros(2, vocabulary, dtype=dtype)
        self.token_ids = torch.zeros(2, dtype=torch.int64)
        self.temperature = torch.ones(1, dtype=acc)
        self.logit_params = torch.ones(2 if softcap else 0, dtype=acc)
        self.number = torch.ones(2, dtype=acc)
        self.none = torch.empty(0, dtype=acc)
        self.mask = torch.ones(2, dtype=torch.bool)
        self.cu_seqlens = torch.tensor([0, 2], dtype=torch.int32)

    def forward(self, entropy: bool) -> object:
        return token_logprob.forward(
            self.logits, self.token_ids, self.mask, self.temperature, self.logit_params, entropy
        )

    def backward(self, entropy: bool) -> None:
        x = self.number
        token_logprob.backward(
            self.logits, self.token_ids, self.temperature, self.logit_params, x, x, x, x,
            x if entropy else self.none, self.logits,
        )  # fmt: skip

    def policy_arguments(self, full: bool) -> list[Tensor]:
        """Old, ref, rollout, log_weight, token_weight and kl_weight: all of them, or the first two."""
        return [self.number] * 6 if full else [self.number] * 2 + [self.none] * 4

    def params(self, objective: Objective) -> Tensor:
        return torch.tensor(objective.params(), dtype=self.number.dtype)

    def grpo(
        self, objective: Objective, bonus: bool = False, full: bool = False, gradient: bool = True
    ) -> object:
        x = self.number
        return grpo_loss.grpo_loss(
            self.logits, self.token_ids, self.temperature, self.logit_params, x, self.mask, x,
            *self.policy_arguments(full), x if bonus else self.none, self.cu_seqlens, self.params(objective),
            x[:1], objective.spec(), "", True, self.logits if gradient else self.none,
        )  # fmt: skip

    def policy(self, objective: Objective, full: bool) -> object:
        x = self.number
        sides = [x, x] if full else [self.none, self.none]
        return policy_loss.policy_loss(
            x, x, self.mask, x, *self.policy_arguments(full), *sides, self.cu_seqlens, self.params(objective),
            objective.spec(), "",
        )  # fmt: skip


def _every_pool() -> Objective:
    gates = (
        Gate(stat="binary_kl", high=1.0, pool="seq_max"),
        Gate(stat="k3", high=1.0, pool="seq_mean"),
        Gate(stat="tv", high=1.0),
        Gate(stat="k1", high=1.0, pool="seq_sum", between="theta_rollout", scope="policy_and_kl"),
    )
    return Objective.gspo(beta=0.1).replace(gates=gates)


def cases() -> list[Case]:
    """All cases, those with a budget first in each group."""
    bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
    qwen, gemma, gpt2 = 151_936, 256_000, 50_257
    grpo, dppo = Objective.grpo(beta=0.04), Objective.dppo_kl()
    wide, single, half = _Rows(qwen, bf16), _Rows(qwen, fp32), _Rows(32_000, fp16)
    capped, odd, double = _Rows(gemma, bf16, True), _Rows(gpt2, bf16), _Rows(1000, fp64)
    small = _Rows(1000, bf16)
    x, none = wide.number, wide.none
    return [
        Case("forward bf16", lambda: wide.forward(False), 2, READ, FORWARD),
        Case("forward bf16 entropy", lambda: wide.forward(True), 2, READ, FORWARD, True),
        Case("forward fp16 entropy V=32000", lambda: half.forward(True), 2, READ, FORWARD),
        Case("forward fp32 entropy", lambda: single.forward(True), 4, READ, FORWARD),
        Case("forward bf16 entropy V=1000", lambda: small.forward(True), 2, READ, FORWARD),
        Case("forward bf16 entropy unaligned", lambda: odd.forward(True), 2, READ),
        Case("forward bf16 entropy softcap", lambda: capped.forward(True), 2, READ),
        Case("forward fp64 entropy", lambda: double.forward(True)),
        Case("backward bf16", lambda: wide.backward(False), 2, WRITE, BACKWARD, True),
        Case("backward bf16 entropy", lambda: wide.backward(True), 2, WRITE, BACKWARD),
        Case("backward fp16 V=32000", lambda: half.backward(False), 2, WRITE, BACKWARD),
        Case("backward fp32", lambda: single.backward(False), 4, WRITE, BACKWARD),
        Case("backward bf16 entropy unaligned", lambda: odd.backward(True), 2, WRITE),
        Case("backward bf16 entropy softcap", lambda: capped.backward(True), 2, WRITE),
        Case("backward fp64 entropy", lambda: double.backward(True)),
        Case("one pass bf16 grpo", lambda: wide.grpo(grpo), 2, BOTH, ONE_PASS, True),
        Case("one pass fp32 grpo", lambda: single.grpo(grpo), 4, BOTH, ONE_PASS),
        Case("one pass bf16 dppo, all inputs", lambda: wide.grpo(dppo, full=True), 2, BOTH, ONE_PASS),
        Case("one pass bf16 grpo, entropy bonus", lambda: wide.grpo(grpo, bonus=True), 2, BOTH, ONE_PASS),
        Case("one pass bf16 grpo, no gradient", lambda: wide.grpo(grpo, gradient=False), 2, READ),
        Case("one pass bf16 grpo unaligned", lambda: odd.grpo(grpo), 2, BOTH),
        Case("one pass bf16 grpo softcap", lambda: capped.grpo(grpo), 2, BOTH),
        Case("policy grpo", lambda: wide.policy(grpo, False), everywhere=True),
        Case("policy gspo", lambda: wide.policy(Objective.gspo(beta=0.1), False)),
        Case("policy vespo, all inputs", lambda: wide.policy(Objective.vespo(), True)),
        Case("policy sapo", lambda: wide.policy(Objective.sapo(), False)),
        Case("policy dppo, all inputs", lambda: wide.policy(dppo, True)),
        Case("policy gspo, 4 gates, all inputs", lambda: wide.policy(_every_pool(), True)),
        Case("policy gspo, 4 gates, fp64", lambda: double.policy(_every_pool(), True)),
        Case(
            "kl k3",
            lambda: kl_estimate.kl_estimate(
                x, x, none, torch.ones(3), Estimator.K3.value, KLGrad.PATH.value
            ),
            everywhere=True,
        ),
        Case("scale bf16", lambda: scale_gradient.scale_gradient_(wide.logits, x[:1]), everywhere=True),
    ]  # fmt: skip
