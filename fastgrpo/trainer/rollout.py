"""What a sampler hands to the trainer, and the protocol that every sampler keeps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rollout:
    """B = prompts x num_samples completions; the samples of one prompt are neighbours."""

    prompt_ids: list[list[int]]
    completion_ids: list[
        list[int]
    ]  # each ends with the end token, unless it was cut at the maximum length
    logprob: (
        list[Tensor] | None
    )  # [length] float32 each, at the sampling temperature; None: the sampler cannot say
    truncated: list[bool]

    @property
    def lengths(self) -> list[int]:
        """Completion lengths in tokens, the end token included."""
        return [len(ids) for ids in self.completion_ids]


class Sampler(Protocol):
    """Draws completions from the policy."""

    name: str
    rng_state: Tensor  # of the generator that it draws from; can be set

    def refresh(self) -> None:
        """Take over the policy's present weights."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num_samples: int,
        max_new_tokens: int,
        temperature: float,
    ) -> Rollout:
        """`num_samples` completions per prompt; temperature 0 takes the likeliest token."""


def join(parts: Sequence[Rollout]) -> Rollout:
    """Several rollouts as one."""
    if len(parts) == 1:
        return parts[0]
    logprob = [part.logprob for part in parts]
    return Rollout(
        [ids for part in parts for ids in part.prompt_ids],
        [ids for part in parts for ids in part.completion_ids],
        None if None in logprob else [row for rows in logprob for row in rows or []],
        [cut for part in parts for cut in part.truncated],
    )
