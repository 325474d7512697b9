"""A step seen from near: the completions of one question, and which of their tokens the step made likelier."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastgrpo.trainer.microbatch import MicroBatch, Portion
from fastgrpo.trainer.setup import Run

COMPLETIONS = 8
"""As many are shown."""


@dataclass(frozen=True, slots=True)
class Marked:
    """A completion, token by token."""

    tokens: list[str]
    log_ratio: list[float]  # new policy over the one that sampled; 0 where nobody sampled the token
    advantage: list[float]  # of each token, all equal but under process supervision and PPO


@dataclass(frozen=True, slots=True)
class CloseUp:
    """What the report shows of a step."""

    step: int
    prompt: str
    completions: list[Marked]

    @classmethod
    def of(cls, stored: dict[str, Any]) -> "CloseUp":
        """From the nested dictionaries that `dataclasses.asdict` makes of one."""
        return cls(**{**stored, "completions": [Marked(**one) for one in stored["completions"]]})


@torch.no_grad()
def close_up(run: Run, step: int, portions: list[Portion]) -> CloseUp | None:
    """The question that taught most, by the sizes of its advantages; None without the sampler's log-probabilities."""
    found = [
        (worth, batch, rows)
        for batch in (batch for portion in portions for batch in portion.batches if batch.counts)
        if batch.rollout_logprob is not None
        for rows, worth in _questions(batch)
    ]
    if not found:
        return None
    _, batch, rows = max(found, key=lambda one: one[0])
    log_ratio = (run.policy(batch.tokens).float() - batch.rollout_logprob).nan_to_num(0.0)
    advantage = _per_token(batch)
    ends = batch.tokens.cu_seqlens.tolist()
    decode: Any = run.tokenizer.decode
    marked = []
    for row in rows[:COMPLETIONS]:
        own = slice(ends[row], ends[row + 1])
        ids = batch.tokens.token_ids[own].tolist()
        texts = [decode([i]) for i in ids]
        marked.append(Marked(texts, log_ratio[own].tolist(), advantage[own].tolist()))
    return CloseUp(step, decode(list(_prompt(batch, rows[0]))), marked)


def _questions(batch: MicroBatch) -> list[tuple[list[int], float]]:
    """Rows of each question of a micro-batch, best and worst taking turns, and the sum of their advantages' sizes."""
    rows: dict[tuple[int, ...], list[int]] = {}
    for row in range(len(batch)):
        rows.setdefault(_prompt(batch, row), []).append(row)
    ends, advantage = batch.tokens.cu_seqlens.tolist(), _per_token(batch)
    mean = [float(advantage[a:b].mean()) for a, b in pairwise(ends)]
    questions = []
    for own in rows.values():
        order = sorted(own, key=mean.__getitem__)
        turns = [order.pop(-1 if number % 2 == 0 else 0) for number in range(len(order))]
        questions.append((turns, sum(abs(mean[row]) for row in own)))
    return questions


def _prompt(batch: MicroBatch, row: int) -> tuple[int, ...]:
    width, first = batch.tokens.input_ids.shape[1], int(batch.tokens.cu_seqlens[row])
    length = int(batch.tokens.predict[first]) - row * width + 1
    return tuple(batch.tokens.input_ids[row, :length].tolist())


def _per_token(batch: MicroBatch) -> Tensor:
    """Advantages as [N]."""
    if len(batch.advantage) != len(batch):
        return batch.advantage
    return batch.advantage.repeat_interleave(batch.tokens.cu_seqlens.diff())
