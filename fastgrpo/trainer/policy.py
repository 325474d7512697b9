"""The model as the trainer sees it: a module whose forward ends in log-probabilities or in the loss.

The head and the loss run inside `forward`, never on its result: the hooks of DDP and FSDP fire once around all of it,
and a sharded head is gathered once. `[tokens, vocabulary]` logits never exist as a whole.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.functional.linear_token_logprob import linear_token_logprob
from fastgrpo.linear_losses import linear_grpo_loss
from fastgrpo.losses import PolicyLoss
from fastgrpo.objective import Objective
from fastgrpo.trainer.batch import TokenBatch


class Policy(nn.Module):
    """A causal language model of transformers, and the temperature that it is sampled at."""

    def __init__(self, model: nn.Module, temperature: float = 1.0) -> None:
        super().__init__()
        self.model: Any = model
        self.temperature = temperature
        self.head_options = head_options(self.model.config)

    def forward(
        self,
        batch: TokenBatch,
        *,
        advantage: Tensor
        | None = None,  # [B] or [N]; without it only log-probabilities are computed
        old_logprob: Tensor | None = None,  # [N]; None: on-policy
        ref_logprob: Tensor | None = None,  # [N]
        rollout_logprob: Tensor | None = None,  # [N]; read by an objective with a correction
        objective: Objective | None = None,
        normalizer: Tensor | None = None,
    ) -> PolicyLoss | Tensor:
        """The loss of a micro-batch, or `[N]` log-probabilities if no advantage is given."""
        hidden, head = (
            hidden_rows(self.model.get_decoder(), batch),
            self.model.get_output_embeddings(),
        )
        options = {"bias": head.bias, "temperature": self.temperature, **self.head_options}
        if advantage is None or objective is None:
            return linear_token_logprob(hidden, head.weight, batch.token_ids, **options).logprob
        return linear_grpo_loss(
            hidden,
            head.weight,
            batch.token_ids,
            advantage,
            torch.ones_like(batch.token_ids, dtype=torch.bool),
            old_logprob=old_logprob,
            ref_logprob=ref_logprob,
            rollout_logprob=rollout_logprob,
            objective=objective,
            normalizer=normalizer,
            cu_seqlens=batch.cu_seqlens,
            **options,
        )


def hidden_rows(decoder: nn.Module, batch: TokenBatch) -> Tensor:  # [N, H]
    """Last hidden states at the positions that predict a completion token."""
    states = decoder(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)[0]
    rows: Tensor = states.flatten(0, 1)[batch.predict]
    return rows


def head_options(config: Any) -> dict[str, Any]:
    """What some architectures do to the head's output, as the ops' options."""
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    divisor = getattr(config, "logits_scaling", None) or 1.0  # Granite
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return {"logit_scale": scale / divisor, "logit_softcap": softcap}
