"""From rewards to advantages: groups, process and turn rewards, GAE, shaping and filters."""

from fastgrpo.advantages.critic import GAE, ValueLoss, gae, reward_to_go, value_loss
from fastgrpo.advantages.process import process_advantage
from fastgrpo.advantages.shaping import (
    Rows,
    drop_rows,
    dynamic_sampling_filter,
    is_truncated,
    kl_in_reward,
    soft_overlong_penalty,
    token_reward,
)
from fastgrpo.advantages.whitening import whiten
from fastgrpo.functional.group_advantage import GroupAdvantage, group_advantage
from fastgrpo.functional.segment_scan import segment_scan

__all__ = [
    "GAE",
    "GroupAdvantage",
    "Rows",
    "ValueLoss",
    "drop_rows",
    "dynamic_sampling_filter",
    "gae",
    "group_advantage",
    "is_truncated",
    "kl_in_reward",
    "process_advantage",
    "reward_to_go",
    "segment_scan",
    "soft_overlong_penalty",
    "token_reward",
    "value_loss",
    "whiten",
]
