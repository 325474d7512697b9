"""verl 0.9: policy losses, advantages and the fused head.

    actor_rollout_ref.model.external_lib=fastgrpo.integrations.verl      # imports this module in every worker
    actor_rollout_ref.actor.policy_loss.loss_mode=fastgrpo               # or fastgrpo_gspo, fastgrpo_cispo, ...
    actor_rollout_ref.model.use_fused_kernels=True                       # with
    actor_rollout_ref.model.fused_kernel_options.impl_backend=triton     # the head below
    algorithm.adv_estimator=fastgrpo

Importing registers everything. KL and entropy terms stay verl's, which adds them to what the loss returns. The head
takes any vocabulary and one temperature per token; a tensor-parallel group of more than one rank is refused.
"""

import importlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from verl.trainer.ppo import core_algos

from fastgrpo.advantages import group_advantage
from fastgrpo.functional.linear_token_logprob import linear_token_logprob
from fastgrpo.integrations.contracts import contract
from fastgrpo.integrations.verl_loss import MODES, make_policy_loss

contract("verl").check()
kernel: Any = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
_original_head = kernel.linear_cross_entropy


def outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    """verl's `grpo` estimator: groups of any size by id, equal rewards exactly 0, a lone completion its own reward."""
    number = {name: k for k, name in enumerate(dict.fromkeys(index))}
    ids = torch.tensor([number[name] for name in index], device=token_level_rewards.device)
    reward = token_level_rewards.sum(-1)
    found = group_advantage(
        reward, group_ids=ids, scale="group" if norm_adv_by_std_in_grpo else "none", eps=epsilon
    )
    alone = torch.bincount(ids, minlength=len(number))[ids] == 1
    single = reward / (1.0 + epsilon) if norm_adv_by_std_in_grpo else reward
    advantage = torch.where(alone, single, found.advantage)[:, None] * response_mask
    return advantage, advantage


def linear_cross_entropy(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [...]
    temperature: float | Tensor = 1.0,
    reduction: str = "none",
    dist_process_group: "dist.ProcessGroup | None" = None,
) -> tuple[Tensor, Tensor]:
    """Flat log-probs and entropies of the labels, as verl's fused kernel returns them."""
    if reduction.lower() != "none":
        raise ValueError(f"reduction must be none, got {reduction!r}")
    if dist_process_group is not None and dist.get_world_size(dist_process_group) > 1:
        raise ValueError(
            "dist_process_group of more than one rank is not covered: set tensor parallelism to 1"
        )
    flat = hidden.reshape(-1, hidden.shape[-1])
    if isinstance(temperature, Tensor) and temperature.numel() > 1:
        temperature = temperature.expand(labels.shape).reshape(-1)
    scores = linear_token_logprob(
        flat, weight, labels.reshape(-1), temperature=temperature, with_entropy=True
    )
    assert scores.entropy is not None
    return scores.logprob, scores.entropy


def enable() -> None:
    """Serve `use_fused_kernels` with fastgrpo's head; verl's models import the symbol at each call."""
    kernel.linear_cross_entropy = linear_cross_entropy


def disable() -> None:
    """Put verl's own head back."""
    kernel.linear_cross_entropy = _original_head


for _mode in MODES:
    core_algos.register_policy_loss(f"fastgrpo_{_mode}")(make_policy_loss(_mode))
core_algos.register_policy_loss("fastgrpo")(make_policy_loss("vanilla"))
core_algos.register_adv_est("fastgrpo")(outcome_advantage)
enable()
