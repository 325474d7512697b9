"""Process supervision: every line of a completion is rewarded, and a token is worth the lines that end at or after it.

Source: DeepSeekMath, section 4.1.3 (Shao et al. 2024, arXiv:2402.03300).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastgrpo.advantages import process_advantage
from fastgrpo.trainer.sampling.rollout import Rollout
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


@dataclass(frozen=True, slots=True)
class LineRewards:
    """What the S lines of B completions earned."""

    reward: Tensor  # [S]
    end: Tensor  # [S]: index of a line's last token in its completion
    owner: Tensor  # [S]: which completion a line is of
    cu_seqlens: Tensor  # [B + 1] int32: ends of the completions, packed

    def advantage(self, group_size: int) -> Tensor:
        """The advantage of every token, packed [N]: the sum of the lines' z-scores that end at or after it."""
        return process_advantage(
            self.reward,
            self.end,
            self.owner,
            length=int(self.cu_seqlens[-1]),
            group_size=group_size,
            cu_seqlens=self.cu_seqlens,
        )

    def per_token(self) -> Tensor:
        """The reward of every token, packed [N]: a line's on its last token, else 0."""
        tokens = torch.zeros(int(self.cu_seqlens[-1]))
        tokens[self.cu_seqlens[self.owner] + self.end] = self.reward
        return tokens


def reward_lines(
    task: Task,
    tokenizer: Any,
    problems: Sequence[Problem],  # one per completion
    rollout: Rollout,
) -> LineRewards:
    """Rewards every line of every completion."""
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
    return LineRewards(
        torch.tensor(rewards), torch.tensor(ends), torch.tensor(owner), offsets.int()
    )
