"""What a sampler hands to the trainer, and the protocol that every sampler keeps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

ABOVE = 1e-3
"""How far rounding (of bfloat16 logits, in a server) may put a log-probability above 0."""


class SamplerError(RuntimeError):
    """A sampler cannot go on; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """B = prompts x num_samples completions; the samples of one prompt are neighbours."""

    prompt_ids: list[list[int]]
    # Each ends with the end token or one to pause at, unless it was cut at the maximum length.
    completion_ids: list[list[int]]
    # [length] float32 each, at the sampling temperature; NaN: not sampled; None: the sampler cannot say.
    logprob: list[Tensor] | None
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
        pause_ids: Sequence[int] = (),
    ) -> Rollout:
        """`num_samples` completions per prompt, up to the end token or the first of `pause_ids`; temperature 0 takes
        the likeliest token.
        """


def check(rollout: Rollout, asked: int, vocabulary: int) -> Rollout:
    """What a sampler returned for `asked` completions, if it can be trained on.

    Raises:
        SamplerError: There are more or fewer; or one has no token, one outside the vocabulary, or log-probabilities
            that are none (NaN stands for a token that was not sampled, but not for all).
    """
    given = [len(rollout.prompt_ids), len(rollout.completion_ids), len(rollout.truncated)]
    if given != [asked] * 3:
        raise SamplerError(f"the sampler returned {given[1]} completions, {asked} were asked for")
    for number, ids in enumerate(rollout.completion_ids):
        what = f"the sampler returned completion {number}"
        if not ids:
            raise SamplerError(f"{what} without a token: not even its end")
        if min(ids) < 0 or max(ids) >= vocabulary:
            raise SamplerError(
                f"{what} with token {min(ids) if min(ids) < 0 else max(ids)}, and the model has {vocabulary}"
            )
        if rollout.logprob is None:
            continue
        logprob = rollout.logprob[number]
        known = logprob[~logprob.isnan()]
        if len(logprob) != len(ids) or not len(known) or known.isinf().any() or known.max() > ABOVE:
            raise SamplerError(
                f"{what} of {len(ids)} tokens with log-probabilities {logprob.tolist()[:8]}"
            )
    return rollout


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
