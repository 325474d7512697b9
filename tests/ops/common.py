"""What the op tests share: two ways from logits to a loss, the float64 reference, plain formulas."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgrpo import (
    Objective,
    grpo_loss,
    linear_grpo_loss,
    linear_token_logprob,
    policy_loss,
    reference,
    token_logprob,
)
from fastgrpo.batch import LossInputs, prepare
from fastgrpo.choices import KL, Correction, Gate, Reduce
from fastgrpo.functional.token_logprob import logit_params_tensor, rows, temperature_tensor
from fastgrpo.metrics import Metrics

EPS32 = torch.finfo(torch.float32).eps
INF, NAN = float("inf"), float("nan")
LOW_PRECISION = (torch.float16, torch.bfloat16)
PATHS = ("two_step", "one_pass")  # token_logprob then policy_loss, or grpo_loss
LINEAR_PATHS = ("linear_two_step", "linear_one_pass")  # the same from hidden states, see `as_head`

# Every preset once, and every mechanism that no preset uses (gates on a pooled statistic, KL gradients, corrections).
PRESETS: Mapping[str, Objective] = {
    "grpo": Objective.grpo(),
    "grpo_kl": Objective.grpo(beta=0.04),
    "grpo_delta": Objective.grpo(delta=2.0),
    "dapo": Objective.dapo(),
    "bnpo": Objective.bnpo(),
    "dr_grpo": Objective.dr_grpo(16),
    "ppo": Objective.ppo(dual_clip=3.0),
    "gspo": Objective.gspo(),
    "gspo_token": Objective.gspo_token(),
    "luspo": Objective.luspo(),
    "gmpo": Objective.gmpo(),
    "cispo": Objective.cispo(),
    "sapo": Objective.sapo(),
    "vespo": Objective.vespo(),
    "rloo": Objective.rloo(),
    "reinforce": Objective.reinforce(),
    "gpg": Objective.gpg(),
    "topr": Objective.topr(),
    "dppo_tv": Objective.dppo_tv(),
    "dppo_kl": Objective.dppo_kl(),
    "dro": Objective.dro(beta=0.1),
}
MECHANISMS: Mapping[str, Objective] = {
    "kl_k2_ratio": Objective.dapo(beta=0.1).replace(
        kl=KL(beta=0.1, estimator="k2", gradient="ratio")
    ),
    "kl_k3_k2": Objective.grpo().replace(kl=KL(beta=0.1, gradient="k2")),
    "kl_capped": Objective.gspo().replace(kl=KL(beta=0.1, gradient="ratio_detached", clamp_out=5)),
    "per_prompt": Objective.dapo().replace(reduce=Reduce(per="prompt")),
    "entropy_bonus": Objective.grpo().replace(entropy_coef=0.01),
    "gate_sequence": Objective.grpo().replace(
        gates=(Gate(stat="k3", high=0.05, pool="seq_mean", scope="policy_and_kl"),)
    ),
    "gate_rollout": Objective.dapo().replace(
        gates=(Gate(stat="k2", high=0.5, between="theta_rollout", pool="seq_max"),)
    ),
    "four_gates": Objective.grpo().replace(  # as many as there may be, one of each pooling
        gates=(
            Gate(stat="ratio", low=0.6, high=1.6),
            Gate(stat="k2", high=0.4, pool="seq_sum", when="positive"),
            Gate(stat="k3", high=0.1, pool="seq_mean", when="negative"),
            Gate(stat="tv", low=-0.3, high=0.3, pool="seq_max", between="theta_rollout"),
        )
    ),
    "gate_mask": Objective.dapo().replace(
        gates=(Gate(stat="ratio", low=0.5, high=2.0, between="old_rollout", scope="mask"),)
    ),
    "truncated_is": Objective.grpo(beta=0.04).replace(
        correction=Correction(high=1.2, applies_to="policy_and_kl")
    ),
}
OBJECTIVES = {**PRESETS, **MECHANISMS}


@dataclass
class Scored:
    """Outcome of a loss on logits, whichever way it was computed."""

    loss: Tensor
    token_loss: Tensor
    logprob: Tensor
    entropy: Tensor
    dlogits: Tensor | None
    metrics: Metrics
    dlogprob: Tensor | None = None  # d loss / d logprob; the reference only, like the next
    weight: float = 0.0  # largest reduction weight of a token
    old: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Every output tensor by name."""
        named = {
            "loss": self.loss,
            "token_loss": self.token_loss,
            "logprob": self.logprob,
            "entropy": self.entropy,
            "metrics": self.metrics.data,
        }
        return named if self.dlogits is None else {**named, "dlogits": self.dlogits}


_LOGIT_OPTIONS = ("temperature", "logit_scale", "logit_softcap")


def as_head(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(hidden [..., N], weight [V, N]) whose product are these finite logits, to the bit; masked rows are NaN.

    Hidden states are the unit vectors, so that the weight's gradient is that of the logits, transposed.
    """
    dead = ~mask.reshape(-1).bool()
    flat = logits.reshape(dead.shape[0], logits.shape[-1])
    width = max(flat.shape[0], 1)  # there is no head of width 0
    hidden = torch.eye(flat.shape[0], width, dtype=logits.dtype).masked_fill(dead[:, None], NAN)
    weight = logits.new_zeros(logits.shape[-1], width)
    weight[:, : flat.shape[0]] = flat.masked_fill(dead[:, None], 0.0).t()
    return hidden.view(*mask.shape, width), weight


def linear_score(
    path: str,
    logits: Tensor,
    token_ids: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    **options: Any,
) -> Scored:
    """`score` by one of the LINEAR_PATHS."""
    hidden, weight = as_head(logits.detach(), mask)
    weight.requires_grad_()
    if path == "linear_one_pass":
        out = linear_grpo_loss(hidden, weight, token_ids, advantage, mask, bias=bias, **options)
        logprob, entropy = out.logprob, out.entropy
    else:
        head = {name: options.pop(name) for name in _LOGIT_OPTIONS if name in options}
        logprob, entropy = linear_token_logprob(
            hidden, weight, token_ids, bias=bias, mask=mask, with_entropy=True, **head
        )
        out = policy_loss(logprob, advantage, mask, entropy=entropy, **options)
    out.loss.backward()
    return Scored(
        out.loss.detach(),
        out.token_loss.detach(),
        logprob.detach(),
        entropy.detach(),
        weight.grad.t()[: mask.numel()].reshape(logits.shape),
        out.metrics,
    )


def score(
    path: str,
    logits: Tensor,
    token_ids: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    grad: bool = True,
    **options: Any,
) -> Scored:
    """Loss, statistics and gradient of the logits by one of the PATHS or LINEAR_PATHS."""
    if path in LINEAR_PATHS:
        return linear_score(path, logits, token_ids, advantage, mask, **options)
    logits = logits.detach()
    leaf = logits.requires_grad_() if grad else logits
    if path == "one_pass":
        out = grpo_loss(leaf, token_ids, advantage, mask, **options)
        logprob, entropy = out.logprob, out.entropy
    else:
        head = {name: options.pop(name) for name in _LOGIT_OPTIONS if name in options}
        logprob, entropy = token_logprob(leaf, token_ids, mask=mask, with_entropy=True, **head)
        out = policy_loss(logprob, advantage, mask, entropy=entropy, **options)
    if grad:
        out.loss.backward()
    return Scored(
        out.loss.detach(),
        out.token_loss.detach(),
        logprob.detach(),
        entropy.detach(),
        leaf.grad,
        out.metrics,
    )


def reference_score(
    logits: Tensor,
    token_ids: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    objective: Objective | None = None,
    **sides: Any,
) -> Scored:
    """The float64 reference on the same stored inputs."""
    wide = logits.detach().double()
    shape = wide.shape[:-1]
    inputs = LossInputs(
        advantage=advantage, mask=mask, objective=objective or Objective.grpo(), **sides
    )
    batch = prepare(inputs, shape, wide, torch.float64, has_entropy=True)
    if isinstance(temperature, Tensor):
        temperature = temperature.double()
    flat = rows(wide)
    dlogits = torch.empty_like(flat)
    loss, token_loss, logprob, entropy, dlogprob, metrics = reference.grpo_loss(
        flat, token_ids.reshape(-1).long(), temperature_tensor(temperature, shape, wide),
        logit_params_tensor(logit_scale, logit_softcap, wide), batch.advantage, batch.mask, batch.weight,
        *batch.sides(), batch.entropy_weight, batch.cu_seqlens, batch.params, wide.new_empty(0),
        batch.spec, batch.surrogate, True, dlogits,
    )  # fmt: skip
    view = (token_loss.view(shape), logprob.view(shape), entropy.view(shape))
    largest = float(batch.weight.max()) if batch.weight.numel() else 0.0
    return Scored(
        loss, *view, dlogits.view(wide.shape), Metrics(metrics), dlogprob, largest, batch.old
    )


def plain_logprob(
    logits: Tensor,
    token_ids: Tensor,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy by torch's own log_softmax, differentiable; independent of the package."""
    x = logits * logit_scale
    if logit_softcap is not None:
        x = logit_softcap * torch.tanh(x / logit_softcap)
    x = x / (temperature[..., None] if isinstance(temperature, Tensor) else temperature)
    log_p = torch.log_softmax(x, dim=-1)
    entropy = -(log_p.exp() * torch.where(log_p == -INF, 0.0, log_p)).sum(-1)
    return log_p.gather(-1, token_ids.long().unsqueeze(-1)).squeeze(-1), entropy


def bitwise_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits (NaN equals itself, -0.0 differs from 0.0)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def assert_same_bits(actual: Scored, expected: Scored, context: str = "") -> None:
    """Every output of two runs agrees to the last bit."""
    other = expected.tensors()
    for name, value in actual.tensors().items():
        assert bitwise_equal(value, other[name]), f"{name} differs {context}"
