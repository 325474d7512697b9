"""From the arguments of a loss to the flat tensors that its op takes: validation, reduction weights, corrections."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrpo.functional.checks import (
    as_mask,
    describe,
    flatten,
    require_detached,
    require_device,
    require_float,
    require_shape,
)
from fastgrpo.functional.numbers import number_tensor
from fastgrpo.objective import Objective
from fastgrpo.reduction import Layout, check_groups, reduction_weight, require_objective
from fastgrpo.reference import SURROGATES
from fastgrpo.rollout_correction import apply_correction


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """What the caller of a loss may pass besides the policy itself; see `fastgrpo.losses.policy_loss`."""

    advantage: Tensor
    mask: Tensor
    old_logprob: Tensor | None = None
    ref_logprob: Tensor | None = None
    rollout_logprob: Tensor | None = None
    token_weight: Tensor | None = None
    kl_weight: Tensor | None = None
    group_size: int | None = None
    group_ids: Tensor | None = None
    objective: Objective
    normalizer: float | Tensor | None = None
    cu_seqlens: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class LossBatch:
    """Flat per-token tensors in the order of the ops' schemas; an absent one has 0 elements."""

    advantage: Tensor
    mask: Tensor
    weight: Tensor
    old: Tensor
    ref: Tensor
    rollout: Tensor
    log_weight: Tensor
    token_weight: Tensor
    kl_weight: Tensor
    entropy_weight: Tensor
    cu_seqlens: Tensor
    params: Tensor
    spec: list[int]
    surrogate: str
    rollout_metrics: tuple[tuple[str, ...], Tensor] | None

    def sides(self) -> tuple[Tensor, ...]:
        """The tensors between `weight` and the entropy in the ops' schemas."""
        return (
            self.old,
            self.ref,
            self.rollout,
            self.log_weight,
            self.token_weight,
            self.kl_weight,
        )


def sequence_shape(
    value: Tensor, cu_seqlens: Tensor | None, name: str, trailing: str = ""
) -> torch.Size:
    """Shape of the tokens without the trailing dimension; raises unless [B, T], or packed [N] with cu_seqlens."""
    dims, rest = value.dim() - len(trailing), f", {trailing}" if trailing else ""
    if cu_seqlens is None and dims != 2:
        raise ValueError(
            f"{name} must hold padded [B, T{rest}] tokens, or packed [N{rest}] tokens with cu_seqlens, "
            f"got {describe(value)}"
        )
    if cu_seqlens is not None and dims != 1:
        raise ValueError(
            f"{name} must hold packed [N{rest}] tokens when cu_seqlens is given, got {describe(value)}"
        )
    return value.shape[:dims]


class _Flattener:
    """Checks per-token and per-sequence arguments against one shape and flattens them."""

    def __init__(self, layout: Layout, like: Tensor, dtype: torch.dtype) -> None:
        self.layout, self.shape = layout, layout.shape
        self.like, self.dtype = like, dtype

    def absent(self) -> Tensor:
        """Return a new tensor each time: Dynamo refuses one tensor as two arguments of an autograd Function."""
        return torch.empty(0, dtype=self.dtype, device=self.like.device)

    def per_token(self, name: str, value: Tensor | None) -> Tensor:
        if value is None:
            return self.absent()
        self._check(name, value)
        require_shape(name, value, self.shape, "one value per token")
        return flatten(value.detach(), self.dtype)

    def per_token_or_sequence(self, name: str, value: Tensor) -> Tensor:
        self._check(name, value)
        num_sequences = self.layout.num_sequences
        if value.dim() == 1 and (len(self.shape) == 2 or value.shape[0] != self.shape[0]):
            rule = "one value per sequence"
            require_shape(
                name, value, (num_sequences,), f"{rule}, or {tuple(self.shape)}: one per token"
            )
            return self.layout.spread(value.detach().to(self.dtype))
        require_shape(
            name, value, self.shape, f"one per token, or ({num_sequences},): one per sequence"
        )
        return flatten(value.detach(), self.dtype)

    def _check(self, name: str, value: Tensor) -> None:
        require_float(name, value)
        require_device(name, value, self.like, "the policy's tokens")
        require_detached(name, value)


def check_objective(objective: object) -> None:
    """Raise unless this is an Objective whose surrogate exists."""
    objective = require_objective(objective)
    if objective.surrogate not in ("ratio", "logp", *SURROGATES):
        raise ValueError(
            f"objective.surrogate must be ratio, logp or a name given to fastgrpo.register_surrogate, got "
            f"{objective.surrogate!r}"
        )


def prepare(
    inputs: LossInputs,
    shape: torch.Size,
    like: Tensor,
    dtype: torch.dtype,
    has_entropy: bool,
) -> LossBatch:
    """Check every argument before any work and return the flat batch."""
    objective = inputs.objective
    check_objective(objective)
    layout = Layout.of(shape, inputs.cu_seqlens, like.device)
    flat = _Flattener(layout, like, dtype)
    mask = flatten(as_mask(inputs.mask, shape, like, "the policy"), torch.bool)
    _check_presence(inputs, has_entropy)
    check_groups(inputs.group_size, inputs.group_ids, layout.num_sequences, like)
    advantage = flat.per_token_or_sequence("advantage", inputs.advantage)
    old = flat.per_token("old_logprob", inputs.old_logprob)
    rollout = flat.per_token("rollout_logprob", inputs.rollout_logprob)
    correction = apply_correction(
        objective,
        advantage=advantage,
        mask=mask,
        old=old,
        rollout=rollout,
        token_weight=flat.per_token("token_weight", inputs.token_weight),
        kl_weight=flat.per_token("kl_weight", inputs.kl_weight),
        cu_seqlens=layout.cu_seqlens,
    )
    weight = reduction_weight(
        correction.mask,
        layout,
        objective,
        inputs.normalizer,
        inputs.group_size,
        inputs.group_ids,
        dtype,
    )
    gates = any(gate.between == "theta_rollout" for gate in objective.policy_gates)
    return LossBatch(
        advantage=advantage,
        mask=correction.mask,
        weight=weight,
        old=correction.old,
        ref=flat.per_token("ref_logprob", inputs.ref_logprob),
        rollout=rollout if gates else flat.absent(),
        log_weight=correction.log_weight,
        token_weight=correction.token_weight,
        kl_weight=correction.kl_weight,
        entropy_weight=_entropy_weight(inputs, weight, correction.mask, layout),
        cu_seqlens=layout.cu_seqlens,
        params=number_tensor(objective.params(), dtype, like.device),
        spec=objective.spec(),
        surrogate="" if objective.surrogate in ("ratio", "logp") else objective.surrogate,
        rollout_metrics=correction.metrics,
    )


def _entropy_weight(inputs: LossInputs, weight: Tensor, mask: Tensor, layout: Layout) -> Tensor:
    """Weight of each token in the entropy bonus: the policy's reduction unless it has its own; [0] without a bonus."""
    objective = inputs.objective
    if not objective.entropy_coef:
        return weight.new_empty(0)
    if objective.entropy_reduce is not None:
        own = objective.replace(reduce=objective.entropy_reduce)
        groups = (inputs.group_size, inputs.group_ids)
        weight = reduction_weight(mask, layout, own, None, *groups, weight.dtype)
    return weight * objective.entropy_coef


def _check_presence(inputs: LossInputs, has_entropy: bool) -> None:
    """Raise where the objective needs a tensor that was not given."""
    objective = inputs.objective
    kl = objective.kl
    if kl.beta and kl.target == "ref" and inputs.ref_logprob is None:
        raise ValueError(f"ref_logprob is required by objective.kl.beta = {kl.beta}, got None")
    uses_rollout = objective.correction is not None or any(
        gate.between != "theta_old" for gate in objective.gates
    )
    if uses_rollout and inputs.rollout_logprob is None:
        raise ValueError(
            "rollout_logprob is required by the objective's correction or gates, got None"
        )
    if objective.entropy_coef and not has_entropy:
        raise ValueError(
            f"entropy (of grpo_loss: with_entropy=True) is required by objective.entropy_coef = "
            f"{objective.entropy_coef}, got None"
        )
    if any(gate.stat == "entropy" for gate in objective.gates) and not has_entropy:
        raise ValueError("entropy is required by an entropy gate, got None")
