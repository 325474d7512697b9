"""A step's completions in the portions that go through the model at once."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastgrpo.objective import Objective
from fastgrpo.reduction import global_normalizer
from fastgrpo.trainer.data.batch import TokenBatch, make_batch, micro_batches
from fastgrpo.trainer.sampling.rollout import Rollout


@dataclass(slots=True)
class MicroBatch:
    """Some completions of a step, and what is known about their N tokens."""

    tokens: TokenBatch
    advantage: Tensor  # [B], or [N] under process supervision and PPO
    rollout_logprob: Tensor | None  # [N]
    ref_logprob: Tensor | None = None  # [N]
    old_logprob: Tensor | None = None  # [N]; None while the policy is still the one that sampled
    value: Tensor | None = None  # [N]; with returns, under PPO
    returns: Tensor | None = None  # [N]
    counts: bool = True  # False: only there because every rank must make the same number of passes

    def __len__(self) -> int:
        """Number of completions."""
        return len(self.tokens.input_ids)

    @property
    def num_tokens(self) -> int:
        """Number of completion tokens."""
        return len(self.tokens.token_ids)

    def halves(self) -> "list[MicroBatch]":
        """The same completions as two micro-batches, if there are two."""
        middle = len(self) // 2
        parts = (slice(0, middle), slice(middle, len(self)))
        return [self._rows(part) for part in parts] if middle else [self]

    def _rows(self, rows: slice) -> "MicroBatch":
        t, width = self.tokens, self.tokens.input_ids.shape[1]
        first, last = (int(t.cu_seqlens[i]) for i in (rows.start, rows.stop))

        def cut(per_token: Tensor | None) -> Tensor | None:
            return None if per_token is None else per_token[first:last]

        tokens = TokenBatch(
            t.input_ids[rows],
            t.predict[first:last] - rows.start * width,
            t.token_ids[first:last],
            t.cu_seqlens[rows.start : rows.stop + 1] - first,
        )
        whole = len(self.advantage) == len(self)
        return MicroBatch(
            tokens,
            self.advantage[rows] if whole else self.advantage[first:last],
            rollout_logprob=cut(self.rollout_logprob),
            ref_logprob=cut(self.ref_logprob),
            old_logprob=cut(self.old_logprob),
            value=cut(self.value),
            returns=cut(self.returns),
            counts=self.counts,
        )


@dataclass(slots=True)
class Portion:
    """What one update of the policy trains on."""

    batches: list[MicroBatch]
    normalizer: Tensor  # 0-dim: D over the portion, all ranks included

    @property
    def size(self) -> int:
        """Number of completions that are trained on."""
        return sum(len(batch) for batch in self.batches if batch.counts)

    @property
    def num_tokens(self) -> int:
        """Number of their tokens."""
        return sum(batch.num_tokens for batch in self.batches if batch.counts)

    def pad_to(self, passes: int, spare: MicroBatch) -> None:
        """Adds passes that count for nothing, so that every rank makes as many."""
        spare = replace(spare, counts=False)
        self.batches += [replace(spare) for _ in range(passes - len(self.batches))]


def split(
    rollout: Rollout,
    advantage: Tensor,  # [B], or [N] packed
    *,
    size: int,
    drop_zero_advantage: bool,
    pad_id: int,
    device: torch.device,
    rows: Sequence[int] | None = None,  # which completions; None: all
) -> list[MicroBatch]:
    """Micro-batches of at most `size` completions, similar lengths together."""
    kept = list(range(len(rollout.lengths)) if rows is None else rows)
    shares = advantage.split(rollout.lengths if len(advantage) != len(rollout.lengths) else 1)
    if drop_zero_advantage:
        kept = [i for i in kept if shares[i].any()]
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
        worth = torch.cat([shares[i] for i in rows]).to(device)
        batches.append(MicroBatch(tokens.to(device), worth, sampled))
    return batches


def denominator(lengths: Sequence[int], objective: Objective, device: torch.device) -> Tensor:
    """D of the objective's reduction over completions of these lengths and those of the other ranks, whatever the
    micro-batches and whoever is left out.
    """
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    mask = torch.ones(int(offsets[-1]), dtype=torch.bool)
    return global_normalizer(mask, objective, cu_seqlens=offsets.int()).to(device)
