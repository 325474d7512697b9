"""The model as the trainer sees it: a module whose forward ends in log-probabilities or in the loss.

The head and the loss run inside `forward`, never on its result: the hooks of DDP and FSDP fire once around all of it,
and a sharded head is gathered once. `[tokens, vocabulary]` logits never exist as a whole.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.functional.linear_token_logprob import linear_token_logprob
from fastgrpo.linear_losses import linear_grpo_loss
from fastgrpo.losses import PolicyLoss
from fastgrpo.objective import Objective
from fastgrpo.trainer.data.batch import TokenBatch


class Policy(nn.Module):
    """A causal language model of transformers, the temperature that it is sampled at, and whether it computes in
    bfloat16.
    """

    def __init__(self, model: nn.Module, temperature: float = 1.0, bf16: bool = False) -> None:
        super().__init__()
        self.model: Any = model
        self.temperature = temperature
        self.bf16 = bf16
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
        head = self.model.get_output_embeddings()
        options = {"bias": head.bias, "temperature": self.temperature, **self.head_options}
        with half_precision(batch, self.bf16):
            hidden = hidden_rows(self.model.get_decoder(), batch)
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


def half_precision(batch: TokenBatch, bf16: bool) -> AbstractContextManager[None]:
    """Products in bfloat16, if so; the head's logits and everything after them stay float32."""
    if not bf16:
        return nullcontext()
    return torch.autocast(batch.input_ids.device.type, torch.bfloat16)


def hidden_rows(decoder: nn.Module, batch: TokenBatch) -> Tensor:  # [N, H]
    """Last hidden states at the positions that predict a completion token."""
    with recomputing(decoder):
        states = decoder(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
        )[0]
    rows: Tensor = states.flatten(0, 1)[batch.predict]
    return rows


def recompute_blocks(model: Any) -> None:
    """Turns gradient checkpointing on.

    Raises:
        ValueError: The architecture has none.
    """
    if not model.supports_gradient_checkpointing:
        raise ValueError(f"--gradient-checkpointing is not possible with {type(model).__name__}")
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


@contextmanager
def recomputing(decoder: Any) -> Iterator[None]:
    """Around a pass: transformers' blocks keep no activations only while they think they train. Their parts do not, so
    there is no dropout; and samplers, which run the same blocks with a cache, are not affected.
    """
    blocks = [b for b in decoder.layers if getattr(b, "gradient_checkpointing", False)]
    blocks = blocks if torch.is_grad_enabled() else []
    for block in blocks:
        block.training = True
    try:
        yield
    finally:
        for block in blocks:
            block.training = False


def head_options(config: Any) -> dict[str, Any]:
    """What some architectures do to the head's output, as the ops' options."""
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    divisor = getattr(config, "logits_scaling", None) or 1.0  # Granite
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return {"logit_scale": scale / divisor, "logit_softcap": softcap}
