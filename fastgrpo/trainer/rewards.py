"""Scoring completions: reward functions with TRL's signature, and the exact answer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrpo.trainer.tasks.base import Problem, Reward

NOT_SCORED = float("nan")


@dataclass(frozen=True, slots=True)
class ExactAnswer:
    """1 where the completion ended by itself and its final answer is the right one, else 0."""

    parse: Callable[[str], str | None]
    eos_id: int

    def __call__(
        self,
        *,
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        answer: Sequence[str],
        **_: object,
    ) -> list[float]:
        """Scores completions against the `answer` column."""
        return [
            float(ids[-1] == self.eos_id and self.parse(text) == gold)
            for text, ids, gold in zip(completions, completion_ids, answer, strict=True)
        ]


def score(
    rewards: Mapping[str, Reward],
    problems: Sequence[Problem],  # one per completion
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
) -> Tensor:  # [B, K] float32
    """Rewards of every completion, one column per reward function; None (not applicable) becomes NaN."""
    columns = []
    for name, reward in rewards.items():
        values = reward(
            prompts=[p.prompt for p in problems],
            completions=list(completions),
            completion_ids=list(completion_ids),
            answer=[p.answer for p in problems],
            solution=[p.solution for p in problems],
        )
        if len(values) != len(completions):
            raise ValueError(
                f"reward {name} must return {len(completions)} values, got {len(values)}"
            )
        columns.append([NOT_SCORED if v is None else float(v) for v in values])
    return torch.tensor(columns).T.contiguous()
