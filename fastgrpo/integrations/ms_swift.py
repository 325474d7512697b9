"""ms-swift 4.6: log-probs and entropies of its GRPO trainer, as an external plugin.

    swift rlhf --rlhf_type grpo --external_plugins fastgrpo_swift.py ...
    # fastgrpo_swift.py
    import fastgrpo.integrations.ms_swift as fast; fast.enable()

Replaces one method, `GRPOTrainer._get_logps_via_local_forward`, which scores the last tokens of a batch.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from fastgrpo.functional.token_logprob import token_logprob
from fastgrpo.integrations.contracts import contract

MODULE, METHOD = "swift.rlhf_trainers.grpo_trainer", "_get_logps_via_local_forward"
_original: Any = None


def local_forward(
    self: Any,
    model: Any,
    model_inputs: dict[str, Any],
    logits_to_keep: int,
    input_ids: Tensor,
    compute_entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of the last tokens at the trainer's temperature, entropies on request."""
    logits = model(**model_inputs).logits
    length = logits.shape[1]
    position = torch.arange(length, device=logits.device)
    live = (position >= length - 1 - logits_to_keep) & (position < length - 1)
    # The whole of the logits and a mask: a slice of them would be copied.
    scores = token_logprob(
        logits,
        torch.roll(input_ids[:, -length:], -1, dims=1),
        mask=live.expand(logits.shape[:2]),
        temperature=self.temperature,
        with_entropy=compute_entropy,
    )
    kept = slice(length - 1 - logits_to_keep, length - 1)
    entropy = None if scores.entropy is None else scores.entropy[:, kept]
    return scores.logprob[:, kept], entropy


def enable() -> None:
    """Replace the method; a second call does nothing."""
    global _original
    trainer = importlib.import_module(MODULE).GRPOTrainer
    if getattr(trainer, METHOD, None) is local_forward:
        return
    contract("ms-swift").check()
    _original = getattr(trainer, METHOD)
    setattr(trainer, METHOD, local_forward)


def disable() -> None:
    """Put ms-swift's own method back."""
    trainer = importlib.import_module(MODULE).GRPOTrainer
    if getattr(trainer, METHOD, None) is local_forward:
        setattr(trainer, METHOD, _original)
