"""Policy losses with verl's signature, one per loss mode; `fastgrpo.integrations.verl` registers them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgrpo.convert.verl import LOSS_MODES, objective_from_verl, read
from fastgrpo.losses import policy_loss
from fastgrpo.objective import Objective

MODES = tuple(mode for mode in LOSS_MODES if mode != "bypass_mode")
PolicyLossFn = Callable[..., tuple[Tensor, dict[str, float]]]


def _objective(config: Any, mode: str, loss_agg_mode: str, width: int) -> Objective:
    """The policy term of verl's configuration; its KL and entropy terms are added outside."""
    options = {
        "clip_ratio": read(config, "clip_ratio", 0.2),
        "clip_ratio_low": read(config, "clip_ratio_low", None),
        "clip_ratio_high": read(config, "clip_ratio_high", None),
        "clip_ratio_c": read(config, "clip_ratio_c", 3.0),
        "tau_pos": read(config, "tau_pos", 1.0),
        "tau_neg": read(config, "tau_neg", 1.05),
        "loss_agg_mode": loss_agg_mode,
        "loss_scale_factor": read(config, "global_batch_info", {}).get("loss_scale_factor")
        or width,
        "policy_loss": {"loss_mode": mode, "dro_beta": read(config, "policy_loss.dro_beta", None)},
    }
    return objective_from_verl(options, handled=("token-sum",))


def _normalizer(config: Any, objective: Objective, mode: str, loss_agg_mode: str) -> float | None:
    """verl's denominator: of the global batch where it says so, else None for that of this call."""
    info = read(config, "global_batch_info", {})
    ranks = info.get("dp_size", 1)
    if mode == "geo_mean":
        return None
    if loss_agg_mode == "token-sum" and objective.reduce.per == "token":
        return 1.0 / ranks
    name = "batch_num_tokens" if objective.reduce.per == "token" else "global_batch_size"
    total = info.get(name)
    if total is None and ranks > 1:
        raise ValueError(f"(global) {name} is required when dp_size > 1, got dp_size = {ranks}")
    return None if total is None else float(total) / ranks


def make_policy_loss(mode: str) -> PolicyLossFn:
    """A policy loss with verl's signature that computes its loss mode `mode`."""

    def loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        objective = _objective(config, mode, loss_agg_mode, response_mask.shape[-1])
        mask = response_mask.bool()
        weight = rollout_is_weights
        if weight is not None and mode == "geo_mean":  # verl pools the weights like the ratios
            count = mask.sum(-1, keepdim=True) + 1e-8
            weight = (
                torch.log(weight + 1e-10).where(mask, 0.0).sum(-1, keepdim=True) / count
            ).exp()
            weight = weight.expand_as(log_prob)
        result = policy_loss(
            log_prob,
            advantages,
            mask,
            old_logprob=old_log_prob,
            token_weight=weight,
            kl_weight=weight if mode == "dro" else None,
            objective=objective,
            normalizer=_normalizer(config, objective, mode, loss_agg_mode),
        )
        values = result.metrics.to_dict()
        closed = "gate_closed" if mode.startswith("dppo") else "clip_region"
        return result.loss, {
            "actor/pg_clipfrac": values[closed],
            "actor/ppo_kl": values["actor/ppo_kl"],
            "actor/pg_clipfrac_lower": values["clip_dual"],
        }

    loss.__name__ = f"fastgrpo_{mode}"
    return loss
