"""Rewards that need no knowledge of the job: format, length, and answers compared as mathematics."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


def think_format(*, completions: Sequence[str], **_: Any) -> list[float]:
    """1 for `<think>...</think>` followed by something else, each tag exactly once, else 0."""
    rewards = []
    for text in completions:
        thought, end, rest = text.partition("</think>")
        once = text.count("<think>") == 1 and text.count("</think>") == 1
        rewards.append(
            float(
                once and bool(end) and thought.lstrip().startswith("<think>") and bool(rest.strip())
            )
        )
    return rewards


@dataclass(frozen=True, slots=True)
class SoftOverlong:
    """0 up to a length, then falling linearly to -1 at the maximum (DAPO, arXiv:2503.14476, Eq. 13)."""

    max_length: int
    margin: int  # over how many tokens it falls

    def __call__(self, *, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        """The penalty of each completion."""
        over = [len(ids) - (self.max_length - self.margin) for ids in completion_ids]
        return [-min(1.0, max(0.0, n / self.margin)) for n in over]


def math_verify(
    *, completions: Sequence[str], answer: Sequence[str], **_: Any
) -> list[float | None]:
    """1 where the math-verify library finds the completion's answer equal to the `answer` column, else 0.

    None where it cannot read the right answer itself. Runs in a process of its own, whose time-out replaces the
    library's signals.
    """
    from math_verify import parse, verify  # type: ignore[import-untyped]

    rewards: list[float | None] = []
    for text, gold in zip(completions, answer, strict=True):
        right = parse(f"${gold}$", parsing_timeout=None) or parse(gold, parsing_timeout=None)
        if not right:
            rewards.append(None)
            continue
        given = parse(text, parsing_timeout=None)
        rewards.append(float(verify(right, given, timeout_seconds=None)))
    return rewards
