"""Peers that exist for GPUs only and are seldom installed: FlashAttention's and Apple's cross-entropy, verl's kernels.

A cross-entropy is minus a log-prob, so each is followed by the loss written out. QuACK's head is not here: it takes no
weight per token, and a GRPO loss is one.
"""

import torch
from torch import Tensor

from fastgrpo.bench.problems import Problem
from fastgrpo.bench.providers import linear, logits
from fastgrpo.bench.providers.base import Contestant, Unavailable, provider


def needs_gpu(tensor: Tensor | None) -> None:
    """Say why a peer does not take part."""
    if tensor is None or tensor.device.type != "cuda":
        raise Unavailable("its kernels need a GPU")


def _flash_attention(problem: Problem) -> logits.Score:
    needs_gpu(problem.logits)
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    def score(z: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        losses, _ = cross_entropy_loss(z.flatten(0, 1), token_ids.flatten())
        return -losses.view(token_ids.shape), None

    return score


@provider("logprob", "FlashAttention", needs="flash_attn", note="cross-entropy")
def flash_attention_logprob(problem: Problem) -> Contestant:
    """FlashAttention's Triton cross-entropy."""
    return logits.logprob_by(problem, _flash_attention(problem))


@provider("loss", "FlashAttention", needs="flash_attn", note="cross-entropy, the loss written out")
def flash_attention_loss(problem: Problem) -> Contestant:
    """The same with the loss."""
    return logits.loss_by(problem, _flash_attention(problem))


@provider("linear", "CCE", needs="cut_cross_entropy", note="exact mode, the loss written out")
def cut_cross_entropy(problem: Problem) -> Contestant:
    """Cut cross-entropy without its filter of small gradients, on the live rows."""
    needs_gpu(problem.hidden)
    from cut_cross_entropy import linear_cross_entropy

    def score(hidden: Tensor, weight: Tensor) -> Tensor:
        ids = torch.where(
            problem.mask, problem.token_ids, -100
        ).flatten()  # ignored rows are skipped
        rows = hidden.flatten(0, 1)
        loss = linear_cross_entropy(rows, weight, ids, reduction="none", impl="cce_exact")
        return -loss.view(problem.mask.shape).float()

    return linear.loss_by(problem, score)


@provider(
    "linear", "verl", entropy=True, needs="verl", note="its Triton kernels, the loss written out"
)
def verl_kernels(problem: Problem) -> Contestant:
    """verl's fused head."""
    needs_gpu(problem.hidden)
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    def score(hidden: Tensor, weight: Tensor) -> Tensor:
        ids = problem.token_ids.flatten()
        logprob, _ = linear_cross_entropy(hidden.flatten(0, 1), weight, ids, 1.0, "none")
        return logprob.view(problem.mask.shape)

    return linear.loss_by(problem, score)
