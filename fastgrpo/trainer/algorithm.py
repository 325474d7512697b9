"""From the options to the algorithm: the objective, the advantages that belong to it, and the learning rate."""

import math
from typing import Any, Literal

from torch import Tensor

from fastgrpo.advantages import GroupAdvantage, group_advantage
from fastgrpo.choices import KL, Correction
from fastgrpo.objective import Objective
from fastgrpo.trainer.options.config import TrainConfig

Scale = Literal["group", "batch", "none"]
UNSCALED = ("dr_grpo", "rloo", "reinforce", "gpg", "topr")
"""Objectives whose papers do not divide advantages by a standard deviation."""


def make_objective(config: TrainConfig) -> Objective:
    """The preset that the options name, with their clip bounds and KL weight."""
    bounds: dict[str, Any] = {}
    if config.epsilon is not None:
        bounds["epsilon"] = config.epsilon
    if config.epsilon_high is not None:
        bounds["epsilon_high"] = config.epsilon_high
    if config.objective == "dr_grpo":
        bounds["max_length"] = config.max_completion_length
    preset: Objective = getattr(Objective, config.objective)(**bounds)
    preset = preset.replace(correction=make_correction(config))
    in_loss = config.objective != "ppo"  # there it is part of the reward
    return preset.replace(kl=KL(beta=config.beta if in_loss else 0.0))


def make_correction(config: TrainConfig) -> Correction | None:
    """Importance weights between policy and sampler, as TRL defines them."""
    if not config.vllm_importance_sampling_correction:
        return None
    level, _, mode = config.vllm_importance_sampling_mode.rpartition("_")
    return Correction(
        level="token" if level == "token" else "seq_sum",
        mode="truncate" if mode == "truncate" else "mask",
        high=config.vllm_importance_sampling_clip_max,
    )


def make_advantage(
    reward: Tensor,  # [B] or [B, K], NaN = not scored
    config: TrainConfig,
) -> GroupAdvantage:
    """What each completion is worth compared with its group."""
    own: Scale = "none" if config.objective in UNSCALED else "group"
    return group_advantage(
        reward,
        group_size=config.num_generations,
        baseline="leave_one_out" if config.objective == "rloo" else "mean",
        scale=config.scale_rewards or own,
        reward_weights=reward_weights(config),
    )


def reward_weights(config: TrainConfig) -> list[float] | None:
    """The numbers in the option `reward_weights`."""
    if config.reward_weights is None:
        return None
    try:
        return [float(word) for word in config.reward_weights.split(",")]
    except ValueError:
        raise ValueError(
            f"--reward-weights must be numbers with commas between, got {config.reward_weights!r}"
        ) from None


def learning_rate_factor(kind: str, step: int, total: int, warmup: int) -> float:
    """Share of the peak learning rate in step 0, 1, ... of `total`: linear warm-up, then the course `kind`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - warmup)
    if kind == "linear":
        return max(0.0, 1.0 - done)
    if kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0
