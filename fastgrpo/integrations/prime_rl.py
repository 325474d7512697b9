"""prime-rl >= 0.8: any objective as its custom loss, and its fused head.

    [trainer.loss]
    type = "custom"
    import_path = "fastgrpo.integrations.prime_rl.loss"
    [trainer.loss.kwargs]
    preset = "cispo"        # a preset of fastgrpo.Objective; the other entries are its arguments
    epsilon_high = 5.0

    import fastgrpo.integrations.prime_rl as fast; fast.HEAD.enable()    # the head, in every trainer process

prime-rl calls the loss for one sequence at a time and divides the sum over sequences by its own count of tokens, so a
preset that means over tokens gives the sum of this sequence, one that means over a sequence its mean.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastgrpo.functional.linear_token_logprob import linear_token_logprob
from fastgrpo.integrations.swap import Swap
from fastgrpo.losses import policy_loss
from fastgrpo.objective import Objective

LOGGED = ("clip_region", "gate_closed", "log_ratio", "ratio", "active")


class LossInputs(Protocol):
    """What prime-rl passes: one sequence."""

    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    advantages: Tensor
    loss_mask: Tensor


class LossOutputs(NamedTuple):
    """What prime-rl reads from the result."""

    loss: Tensor
    metrics: dict[str, Tensor]


def loss(inputs: LossInputs, *, preset: str = "dppo_tv", **arguments: Any) -> LossOutputs:
    """Loss of one sequence under a preset; the sampler's log-probs are the old policy's, as prime-rl means them."""
    make = getattr(Objective, preset, None)
    if preset.startswith(("_", "from_")) or not callable(make):
        raise ValueError(f"preset must be one of fastgrpo.Objective's, got {preset!r}")
    objective: Objective = make(**arguments)
    reference = getattr(inputs, "ref_logprobs", None)
    if reference is None:
        reference = getattr(inputs, "teacher_logprobs", None)
    logprob = inputs.trainer_logprobs
    ends = torch.tensor([0, logprob.shape[0]], dtype=torch.int32, device=logprob.device)
    result = policy_loss(
        logprob,
        inputs.advantages,
        inputs.loss_mask,
        old_logprob=inputs.inference_logprobs,
        ref_logprob=reference if objective.kl.beta else None,
        token_weight=getattr(inputs, "loss_weights", None),
        objective=objective,
        normalizer=1.0,
        cu_seqlens=ends,
    )
    return LossOutputs(result.loss, {name: result.metrics[name].float() for name in LOGGED})


class FusedHeadFunction:
    """Stands in for prime-rl's autograd function: differentiable entropies, one temperature per token."""

    @staticmethod
    def apply(
        hidden: Tensor, weight: Tensor, labels: Tensor, inv_temperature: Tensor, chunk_size: int
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of the labels; the chunk size is ours to choose."""
        scores = linear_token_logprob(
            hidden, weight, labels, temperature=1.0 / inv_temperature, with_entropy=True
        )
        assert scores.entropy is not None
        return scores.logprob, scores.entropy


HEAD = Swap(
    "prime-rl",
    "prime_rl.trainer.models.layers.lm_head",
    "_SequenceChunkedLogProbEntropyFn",
    FusedHeadFunction,
)
