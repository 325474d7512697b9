"""NeMo-RL >= 0.6: a loss-function object for its policy workers.

    from fastgrpo import Objective
    from fastgrpo.integrations.nemo_rl import FastGRPOLossFn
    loss_fn = FastGRPOLossFn(Objective.dapo())       # where the recipe builds ClippedPGLossFn

Takes the next-token log-probs that NeMo-RL computes; the loss is a sum over this micro-batch divided by the global
count that NeMo-RL passes in, so that micro-batches and ranks add up.
"""

from enum import Enum
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from fastgrpo.losses import policy_loss
from fastgrpo.objective import Objective

try:
    from nemo_rl.algorithms.loss.interfaces import LossInputType, LossType
except ImportError:  # the same names, so that the object can be made and tested without NeMo-RL

    class LossType(Enum):  # type: ignore[no-redef]
        """How NeMo-RL normalises a loss over ranks."""

        TOKEN_LEVEL = "token_level"
        SEQUENCE_LEVEL = "sequence_level"

    class LossInputType(Enum):  # type: ignore[no-redef]
        """What a loss reads."""

        LOGIT = "logit"
        LOGPROB = "logprob"


LOGGED = SimpleNamespace(
    probs_ratio="ratio",
    probs_ratio_clamped="coefficient",
    kl_penalty="kl",
    clip_fraction="clip_region",
    fault="fault",
)


class FastGRPOLossFn:
    """Any objective as NeMo-RL's loss function."""

    input_type = LossInputType.LOGPROB

    def __init__(self, objective: Objective | None = None) -> None:
        """Keep the objective; its reduction decides whether NeMo-RL hands over tokens or sequences to divide by."""
        self.objective = objective or Objective.grpo()
        if self.objective.entropy_coef:
            raise ValueError(
                "objective.entropy_coef must be 0: NeMo-RL passes log-probs, no entropy"
            )
        if self.objective.reduce.per == "prompt":
            raise ValueError(
                "objective.reduce per='prompt' is not covered: NeMo-RL passes no prompt ids"
            )
        by_token = self.objective.reduce.per == "token"
        self.loss_type = LossType.TOKEN_LEVEL if by_token else LossType.SEQUENCE_LEVEL

    def __call__(
        self,
        next_token_logprobs: Tensor,  # [B, T - 1]
        data: Any,  # advantages, prev_logprobs, generation_logprobs, token_mask [B, T], sample_mask [B]
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor,
        **_: Any,
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss and metrics of a micro-batch."""
        mask = (data["token_mask"][:, 1:] * data["sample_mask"][:, None]).bool()
        by_token = self.loss_type is LossType.TOKEN_LEVEL
        objective, total = self.objective, global_valid_toks if by_token else global_valid_seqs
        uses_rollout = objective.correction is not None or objective.gates
        result = policy_loss(
            next_token_logprobs,
            data["advantages"][:, 1:],
            mask,
            old_logprob=data["prev_logprobs"][:, 1:],
            ref_logprob=data["reference_policy_logprobs"][:, 1:] if objective.kl.beta else None,
            rollout_logprob=data["generation_logprobs"][:, 1:] if uses_rollout else None,
            objective=objective,
            normalizer=total.clamp(min=1),
        )
        metrics = result.metrics.to_dict()
        logged = {name: metrics[row] for name, row in vars(LOGGED).items()}
        valid = {"num_valid_samples": float(data["sample_mask"].sum())}
        return result.loss, {"loss": float(result.loss.detach()), **logged, **valid}
