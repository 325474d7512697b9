"""Eager forward and hand-written backward of every op, in any float dtype: the specification of the package."""

from fastgrpo.reference.group_advantage import group_advantage_bwd, group_advantage_fwd
from fastgrpo.reference.grpo_loss import grpo_loss
from fastgrpo.reference.kl_estimate import kl_estimate
from fastgrpo.reference.policy_loss import SURROGATES, policy_loss
from fastgrpo.reference.segment_scan import segment_scan
from fastgrpo.reference.token_logprob import token_logprob_bwd, token_logprob_fwd

__all__ = [
    "SURROGATES",
    "group_advantage_bwd",
    "group_advantage_fwd",
    "grpo_loss",
    "kl_estimate",
    "policy_loss",
    "segment_scan",
    "token_logprob_bwd",
    "token_logprob_fwd",
]
