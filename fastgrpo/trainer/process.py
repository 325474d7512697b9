"""Process supervision: every line of a completion is rewarded, and a token is worth the lines that end at or after it.

Source: DeepSeekMath, section 4.1.3 (Shao et al. 2024, arXiv:2402.03300).
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastgrpo.advantages import process_advantage
from fastgrpo.trainer.rollout import Rollout
from fastgrpo.trainer.tasks.base import Problem, Task


def line_ends(pieces: Sequence[str]) -> tuple[list[str], list[int]]:
    """The lines of a completion, and the index of the last token of each, from the text of each token."""
    lines, ends, line = list[str](), list[int](), ""
    for index, piece in enumerate(pieces):
        line += piece
        if piece.endswith("\n") or index + 1 == len(pieces):
            lines.append(line.removesuffix("\n"))
            ends.append(index)
            line = ""
    return lines, ends


def step_advantage(
    task: Task,
    tokenizer: Any,
    problems: Sequence[Problem],  # one per completion
    rollout: Rollout,
    group_size: int,
) -> tuple[Tensor, float]:
    """The advantage of every token, packed [N], and the mean reward of a line."""
    text = lru_cache(None)(lambda token: tokenizer.decode([token], skip_special_tokens=True))
    rewards, ends, owner = list[float](), list[int](), list[int]()
    for number, (problem, ids) in enumerate(zip(problems, rollout.completion_ids, strict=True)):
        lines, last = line_ends([text(token) for token in ids])
        earned = task.line_rewards(problem, lines)
        if rollout.truncated[number]:
            earned[-1] = 0.0  # it may have been cut in the middle
        rewards += earned
        ends += last
        owner += [number] * len(last)
    offsets = torch.tensor([0, *rollout.lengths]).cumsum(0)
    advantage = process_advantage(
        torch.tensor(rewards),
        torch.tensor(ends),
        torch.tensor(owner),
        length=int(offsets[-1]),
        group_size=group_size,
        cu_seqlens=offsets.int(),
    )
    return advantage, sum(rewards) / len(rewards)
