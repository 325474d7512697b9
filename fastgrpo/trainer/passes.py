"""Forward and backward over the micro-batches of an update, and what to do if that fails."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastgrpo.objective import Objective
from fastgrpo.trainer.microbatch import MicroBatch, Portion
from fastgrpo.trainer.ppo import value_backward
from fastgrpo.trainer.state import Scored, State
from fastgrpo.trainer.tally import Tally


class TrainingStopped(RuntimeError):
    """Training cannot go on; the text says why and what to change."""


@dataclass(slots=True)
class _Attempt:
    tally: Tally = field(default_factory=Tally)
    logprob: list[Tensor | None] = field(default_factory=list)


def backward(state: State, portion: Portion, objective: Objective) -> Tally:
    """Adds up the gradient of a portion; out of memory, the same gradient in smaller micro-batches."""
    while True:
        attempt = _Attempt()
        failure = _try(state, portion, objective, attempt)
        if failure is None:
            break
        del attempt  # with it the graph; the exception and its frames are gone already
        _use_less(state, portion, failure)
    for batch, logprob in zip(portion.batches, attempt.logprob, strict=True):
        if batch.old_logprob is None:  # the policy that sampled, as later updates have to know it
            batch.old_logprob = logprob
    attempt.tally.updates = 1
    return attempt.tally


def _try(state: State, portion: Portion, objective: Objective, attempt: _Attempt) -> str | None:
    """All passes; the message of an out-of-memory error if there was one."""
    ranks = state.run.ranks
    normalizer = portion.normalizer / ranks.world_size  # gradients are averaged over ranks
    if state.critic is not None:
        num_tokens = float(ranks.sum(torch.tensor(portion.num_tokens))) / ranks.world_size
    try:
        for number, batch in enumerate(portion.batches):
            last = number == len(portion.batches) - 1
            with ranks.quiet(state.model, last):
                result = state.model(
                    batch.tokens,
                    advantage=batch.advantage,
                    old_logprob=batch.old_logprob,
                    ref_logprob=batch.ref_logprob,
                    rollout_logprob=batch.rollout_logprob if objective.correction else None,
                    objective=objective,
                    normalizer=normalizer,
                )
                (result.loss if batch.counts else result.loss * 0).backward()
            if batch.counts:
                attempt.tally.add(result, batch)
            if state.critic is not None:
                attempt.tally.add_value(value_backward(state, batch, num_tokens, last))
            attempt.logprob.append(result.logprob)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return str(error).strip().partition("\n")[0]
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the allocator of the CPU had no memory left."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def _use_less(state: State, portion: Portion, failure: str) -> None:
    """Halves the micro-batches of this portion and of all that come."""
    largest = max(len(batch) for batch in portion.batches)
    size = max(1, largest // 2)
    if state.run.ranks.world_size > 1:
        raise TrainingStopped(
            f"Out of memory on rank {state.run.ranks.rank} ({failure}). With several processes the size is not changed "
            f"on the way: set --per-device-train-batch-size {size}."
        )
    if largest == 1:
        raise TrainingStopped(
            f"Out of memory with one completion per pass ({failure}): lower --max-completion-length or the model's "
            "size, or use --parallel fsdp2 on more devices."
        )
    state.optimizer.zero_grad(set_to_none=False)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    halves: list[MicroBatch] = []
    for batch in portion.batches:
        halves += batch.halves() if len(batch) > size else [batch]
    portion.batches = halves
    state.micro_batch_size = size


def skip_or_stop(state: State, scored: Scored) -> None:
    """The weights stay as they are; too many such updates in a row end the run."""
    scored.skipped += 1
    state.bad_updates += 1
    if state.bad_updates >= state.run.config.max_bad_steps:
        raise TrainingStopped(
            f"{state.bad_updates} updates in a row had a loss or gradient that is not finite (grad norm "
            f"{scored.grad_norm}); all were skipped, the weights are those before them. Lower --learning-rate, or look "
            "at metric `fault` for tokens whose log-probability is not finite."
        )
