"""The smallest job that shows learning by reinforcement alone: repeat three digits, from random weights.

    371>  ->  371

Its reward has steps (the share of right tokens), so that the first lucky digits already count.
"""

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from fastgrpo.trainer.tasks.base import SPLITS, OutcomeOnly, Problem, Reward, TinyModel
from fastgrpo.trainer.tasks.tokenizer import word_tokenizer

DIGITS = 3


def split_of(number: str) -> str:
    """A fixed tenth of the numbers is for the test, another for validation."""
    bucket = zlib.crc32(number.encode()) % 10
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def as_problem(number: str) -> Problem:
    """The question whose answer is the number."""
    return Problem(f"{number}>", number, number, number)


@dataclass(frozen=True, slots=True)
class RightTokens:
    """The share of places, the end included, that hold the right token."""

    eos_id: int

    def __call__(
        self,
        *,
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        answer: Sequence[str],
        **_: object,
    ) -> list[float]:
        """Compares each completion with the `answer` column, place by place."""
        rewards = []
        for text, ids, gold in zip(completions, completion_ids, answer, strict=True):
            right = sum(a == b for a, b in zip(text, gold, strict=False))
            ended = ids[-1] == self.eos_id and len(text) == len(gold)
            rewards.append((right + ended) / (len(gold) + 1))
        return rewards


@dataclass(frozen=True)
class CopyDigits(OutcomeOnly):
    """The copy job."""

    model: TinyModel = TinyModel(hidden_size=64, intermediate_size=256, initializer_range=0.02)
    about_base: str = "The base model has random weights."
    about_result: str = (
        "Everything it can do it learned from rewards; the numbers tested were never trained on."
    )

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Ten digits and the arrow."""
        return word_tokenizer([*"0123456789", ">"], r"[0-9>]")

    def sample(self, split: str, rng: random.Random, n: int) -> list[Problem]:
        """Numbers of a split, for evaluation each at most once."""
        if split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
        numbers = [f"{i:0{DIGITS}}" for i in range(10**DIGITS)]
        numbers = [number for number in numbers if split_of(number) == split]
        if split == "train":
            return [as_problem(number) for number in rng.choices(numbers, k=n)]
        return [as_problem(number) for number in rng.sample(numbers, min(n, len(numbers)))]

    def demonstration(self, problem: Problem, rng: random.Random, progress: float) -> str:
        """The number itself."""
        return problem.solution

    def rewards(self, eos_id: int) -> dict[str, Reward]:
        """The share of right tokens."""
        return {"right_tokens": RightTokens(eos_id)}

    def parse_answer(self, completion: str) -> str | None:
        """All of the completion."""
        return completion
