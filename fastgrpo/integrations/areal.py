"""AReaL 1.0: its log-prob and entropy function.

    import fastgrpo.integrations.areal as fast; fast.SCORES.enable()    # in every trainer process

AReaL's engines import `gather_logprobs_entropy` by name; every module of AReaL that holds it gets the replacement. A
tensor-parallel group of more than one rank is refused.
"""

import torch.distributed as dist
from torch import Tensor

from fastgrpo.functional.token_logprob import token_logprob
from fastgrpo.integrations.swap import Swap


def gather_logprobs_entropy(
    logits: Tensor,  # [..., V]
    labels: Tensor,  # [...]
    temperature: float | Tensor = 1.0,
    tp_group: "dist.ProcessGroup | None" = None,
    chunk_size: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the labels; the chunk size has no use here."""
    if tp_group is not None and dist.get_world_size(tp_group) > 1:
        raise ValueError(
            "tp_group of more than one rank is not covered: set tensor parallelism to 1"
        )
    scores = token_logprob(logits, labels, temperature=temperature, with_entropy=True)
    assert scores.entropy is not None
    return scores.logprob, scores.entropy


SCORES = Swap(
    "areal", "areal.engine.fsdp_engine", "gather_logprobs_entropy", gather_logprobs_entropy
)
