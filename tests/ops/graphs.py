"""One small batch and every differentiable output of the package as a scalar of its logits."""

import torch

from fastgrpo import grpo_loss, kl_estimate, policy_loss, token_logprob
from fastgrpo.testing import make_inputs

B, T, V = 2, 3, 11
DATA = make_inputs(B, T, V, seed=30)
IDS, MASK, ADVANTAGE = DATA.token_ids, torch.ones(B, T, dtype=torch.bool), DATA.advantage
ONE_PASS = "grpo_loss"
OVERWRITERS = ("token_logprob", "entropy", "grpo_loss")  # take overwrite_logits
NAMES = ("token_logprob", "entropy", "policy_loss", "token_loss", "kl_estimate", ONE_PASS)


def scalar(name, logits, **options):
    """A scalar loss of [B, T, V] logits through one differentiable output of the package."""
    if name == ONE_PASS:
        return grpo_loss(logits, IDS, ADVANTAGE, MASK, old_logprob=DATA.old_logprob, **options).loss
    if name in ("token_logprob", "entropy"):
        out = token_logprob(logits, IDS, with_entropy=True, **options)
        return (out.logprob if name == "token_logprob" else out.entropy).square().sum()
    logprob = torch.log_softmax(logits, -1).gather(-1, IDS[..., None])[..., 0]
    if name == "kl_estimate":
        return kl_estimate(logprob, DATA.ref_logprob).sum()
    out = policy_loss(logprob, ADVANTAGE, MASK, old_logprob=DATA.old_logprob)
    return out.loss if name == "policy_loss" else out.token_loss.square().sum()


def leaf():
    return DATA.logits.clone().requires_grad_()


def gradient(name, **options):
    logits = leaf()
    (grad,) = torch.autograd.grad(scalar(name, logits, **options), logits)
    return grad
