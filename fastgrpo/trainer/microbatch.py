"""A step's completions in the portions that go through the model at once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrpo.objective import Objective
from fastgrpo.reduction import global_normalizer
from fastgrpo.trainer.batch import TokenBatch, make_batch, micro_batches
from fastgrpo.trainer.rollout import Rollout


@dataclass(slots=True)
class MicroBatch:
    """Some completions of a step, and what is known about their N tokens."""

    tokens: TokenBatch
    advantage: Tensor  # [B]
    rollout_logprob: Tensor | None  # [N]
    ref_logprob: Tensor | None = None  # [N]
    old_logprob: Tensor | None = None  # [N]; None while the policy is still the one that sampled


def split(
    rollout: Rollout,
    advantage: Tensor,  # [B]
    *,
    size: int,
    drop_zero_advantage: bool,
    pad_id: int,
    device: torch.device,
) -> list[MicroBatch]:
    """Micro-batches of at most `size` completions, similar lengths together."""
    kept = list(range(len(rollout.lengths)))
    if drop_zero_advantage:
        kept = advantage.nonzero()[:, 0].tolist()
    total = [len(rollout.prompt_ids[i]) + rollout.lengths[i] for i in kept]
    batches = []
    for group in micro_batches(total, size):
        rows = [kept[i] for i in group]
        tokens = make_batch(
            [rollout.prompt_ids[i] for i in rows], [rollout.completion_ids[i] for i in rows], pad_id
        )
        sampled = None
        if rollout.logprob is not None:
            sampled = torch.cat([rollout.logprob[i] for i in rows]).to(device)
        batches.append(MicroBatch(tokens.to(device), advantage[rows].to(device), sampled))
    return batches


def denominator(rollout: Rollout, objective: Objective, device: torch.device) -> Tensor:
    """D of the objective's reduction over the whole step, whatever the micro-batches and whoever is left out."""
    offsets = torch.tensor([0, *rollout.lengths]).cumsum(0)
    mask = torch.ones(int(offsets[-1]), dtype=torch.bool)
    return global_normalizer(mask, objective, cu_seqlens=offsets.int()).to(device)
