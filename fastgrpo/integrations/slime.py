"""slime: its policy loss from the logits on, in fastgrpo's kernels.

    --loss-type custom_loss --custom-loss-function-path fastgrpo.integrations.slime.policy_loss_function

Reads slime's own options (advantage estimator, clips, KL loss, TIS, entropy) and leaves the reduction over samples and
ranks to slime's `sum_of_sample_mean`. What is not covered raises, tensor and context parallelism among it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgrpo.choices import KL, Correction
from fastgrpo.functional.token_logprob import token_logprob
from fastgrpo.losses import policy_loss
from fastgrpo.objective import Objective

ESTIMATORS = {"k1": "k1", "k2": "k2", "k3": "k3", "low_var_kl": "k3"}
NOT_COVERED = (
    "use_opsm",
    "use_unbiased_kl",
    "get_mismatch_metrics",
    "custom_tis_function_path",
    "custom_pg_loss_reducer_function_path",
    "allgather_cp",
)


def objective_from_slime(args: Any) -> Objective:
    """The objective that slime's arguments describe; raises on an option that is not covered."""
    for name in NOT_COVERED:
        if getattr(args, name, None):
            raise ValueError(f"slime's {name} is not covered: use --loss-type policy_loss with it")
    for name in ("tensor_model_parallel_size", "context_parallel_size"):
        if getattr(args, name, 1) > 1:
            raise ValueError(f"slime's {name} must be 1, got {getattr(args, name)}")
    low = args.eps_clip
    high = low if getattr(args, "eps_clip_high", None) is None else args.eps_clip_high
    kind = args.advantage_estimator
    if kind == "cispo":
        objective = Objective.cispo(epsilon_low=1 - low, epsilon_high=1 + high)
    else:
        cap = getattr(args, "eps_clip_c", None)
        bounds = Objective.grpo(epsilon=low, epsilon_high=high)
        negative = (bounds.negative[0], float("inf") if cap is None else cap)
        level: Any = "seq_mean" if kind == "gspo" else "token"
        objective = Objective(level=level, positive=bounds.positive, negative=negative)
    correction = None
    if getattr(args, "use_tis", False):
        correction = Correction(
            low=getattr(args, "tis_clip_low", 0.0), high=args.tis_clip, log_clamp=None
        )
    return objective.replace(
        name=f"slime-{kind}", d_clamp=None, kl=_kl(args), correction=correction
    )


def _kl(args: Any) -> KL:
    if not getattr(args, "use_kl_loss", False) or not args.kl_loss_coef:
        return KL()
    estimator: Any = ESTIMATORS.get(args.kl_loss_type)
    if estimator is None:
        raise ValueError(
            f"kl_loss_type must be one of {', '.join(ESTIMATORS)}, got {args.kl_loss_type!r}"
        )
    limit = 10.0 if args.kl_loss_type == "low_var_kl" else None
    return KL(beta=args.kl_loss_coef, estimator=estimator, clamp_in=None, clamp_out=limit)


def policy_loss_function(
    args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """slime's custom loss: logits [1, T, V] of packed samples in, loss and logged values out."""
    objective = objective_from_slime(args)
    if batch.get("rollout_top_p_token_ids") is not None:
        raise ValueError("slime's top-p replay is not covered: use --loss-type policy_loss with it")
    lengths = batch["response_lengths"]
    index, ids = _responses(batch, logits)
    every = logits.new_zeros(logits.shape[1], dtype=torch.int64)
    # The whole of the logits and a mask: indexed rows of them would be copied.
    scores = token_logprob(
        logits[0], every.index_copy(0, index, ids), mask=every.bool().index_fill(0, index, True),
        temperature=getattr(args, "rollout_temperature", 1.0), with_entropy=True,
    )  # fmt: skip
    assert scores.entropy is not None
    logprob, entropy = scores.logprob[index], scores.entropy[index]
    sides: dict[str, Any] = {
        name: torch.cat(batch[key]) for name, key in _sides(args, objective).items()
    }
    ends = torch.tensor([0, *lengths]).cumsum(0).int().to(logits.device)
    mask = torch.cat(batch["loss_masks"]).bool()
    result = policy_loss(
        logprob, torch.cat(batch["advantages"]).to(logprob.dtype), mask,
        entropy=entropy, objective=objective, cu_seqlens=ends, **sides,
    )  # fmt: skip
    entropy_loss = sum_of_sample_mean(entropy)
    loss = sum_of_sample_mean(result.token_loss) - args.entropy_coef * entropy_loss
    values = result.metrics
    log = {
        "loss": loss.detach().clone(),
        "entropy_loss": entropy_loss.detach().clone(),
        "pg_clipfrac": values["clip_region"].to(loss.dtype),
        "ppo_kl": values["actor/ppo_kl"].to(loss.dtype),
    }
    return loss, log


def _responses(batch: dict[str, Any], logits: Tensor) -> tuple[Tensor, Tensor]:
    """Positions that predict response tokens, and those tokens, sample after sample."""
    rows, ids, end = [], [], 0
    lengths = (batch["total_lengths"], batch["response_lengths"])
    for tokens, total, response in zip(batch["unconcat_tokens"], *lengths, strict=True):
        end += total
        rows.append(torch.arange(end - response - 1, end - 1))
        ids.append(tokens[-response:])
    return torch.cat(rows).to(logits.device), torch.cat(ids)


def _sides(args: Any, objective: Objective) -> dict[str, str]:
    """Our argument -> slime's key, for the log-probs that the objective reads."""
    old = "rollout_log_probs" if getattr(args, "use_rollout_logprobs", False) else "log_probs"
    sides = {"old_logprob": old}
    if objective.kl.beta:
        sides["ref_logprob"] = "ref_log_probs"
    if objective.correction is not None:
        sides["rollout_logprob"] = "rollout_log_probs"
    return sides
