"""The model as the trainer sees it: a module whose forward ends in log-probabilities or in the loss.

The head and the loss run inside `forward`, never on its result. So the hooks of DDP and FSDP fire once around all of
it, a sharded head is gathered once, and no caller ever holds `[tokens, vocabulary]` logits.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.functional.token_logprob import token_logprob
from fastgrpo.losses import PolicyLoss, grpo_loss
from fastgrpo.objective import Objective
from fastgrpo.trainer.batch import TokenBatch


class Policy(nn.Module):
    """A causal language model of transformers, and the temperature that it is sampled at."""

    def __init__(self, model: nn.Module, temperature: float = 1.0) -> None:
        super().__init__()
        self.model: Any = model
        self.temperature = temperature
        self.head = head_options(self.model.config)

    def logits(self, batch: TokenBatch) -> Tensor:  # [N, V]
        """The head's output at the positions that predict a completion token."""
        hidden = self.model.get_decoder()(input_ids=batch.input_ids, use_cache=False)[0]
        head = self.model.get_output_embeddings()
        logits: Tensor = head(hidden.flatten(0, 1)[batch.predict])
        return logits

    def forward(
        self,
        batch: TokenBatch,
        *,
        advantage: Tensor | None = None,  # [B]; without it only log-probabilities are computed
        old_logprob: Tensor | None = None,  # [N]; None: on-policy
        ref_logprob: Tensor | None = None,  # [N]
        objective: Objective | None = None,
        normalizer: Tensor | None = None,
    ) -> PolicyLoss | Tensor:
        """The loss of a micro-batch, or `[N]` log-probabilities if no advantage is given."""
        logits = self.logits(batch)
        if advantage is None or objective is None:
            return token_logprob(
                logits, batch.token_ids, temperature=self.temperature, **self.head
            ).logprob
        return grpo_loss(
            logits,
            batch.token_ids,
            advantage,
            torch.ones_like(batch.token_ids, dtype=torch.bool),
            old_logprob=old_logprob,
            ref_logprob=ref_logprob,
            objective=objective,
            normalizer=normalizer,
            temperature=self.temperature,
            cu_seqlens=batch.cu_seqlens,
            overwrite_logits=logits.requires_grad,
            **self.head,
        )


def head_options(config: Any) -> dict[str, Any]:
    """What some architectures do to the head's output, as the ops' options."""
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    divisor = getattr(config, "logits_scaling", None) or 1.0  # Granite
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return {"logit_scale": scale / divisor, "logit_softcap": softcap}
