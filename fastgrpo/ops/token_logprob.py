"""`fastgrpo::token_logprob_fwd` and `fastgrpo::token_logprob_bwd`: schemas, reference kernels and fakes."""

import torch
from torch import Tensor

from fastgrpo import reference
from fastgrpo.ops.define import mutating_op
from fastgrpo.reference.token_logprob import accumulate_dtype


@torch.library.custom_op("fastgrpo::token_logprob_fwd", mutates_args=())
def token_logprob_fwd(
    logits: Tensor,  # [N, V], last dimension contiguous
    token_ids: Tensor,  # [N] int64
    mask: Tensor,  # [N] bool, or [0]: every row is live
    temperature: Tensor,  # [1] or [N]
    logit_params: Tensor,  # [0], [1] = (scale) or [2] = (scale, softcap)
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logprob [N], entropy [N] or [0], lse [N] (logit units)."""
    return reference.token_logprob_fwd(
        logits, token_ids, mask, temperature, logit_params, with_entropy
    )


@token_logprob_fwd.register_fake
def _(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor,
    temperature: Tensor,
    logit_params: Tensor,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    dtype = accumulate_dtype(logits.dtype)
    entropy = logits.new_empty(rows if with_entropy else 0, dtype=dtype)
    return logits.new_empty(rows, dtype=dtype), entropy, logits.new_empty(rows, dtype=dtype)


@mutating_op("fastgrpo::token_logprob_bwd", mutated="dlogits")
def token_logprob_bwd(
    logits: Tensor,  # [N, V]
    token_ids: Tensor,  # [N]
    temperature: Tensor,  # [1] or [N]
    logit_params: Tensor,  # [0], [1] or [2]
    logprob: Tensor,  # [N]
    entropy: Tensor,  # [N] or [0]
    lse: Tensor,  # [N]
    dlogprob: Tensor,  # [N] or [0]
    dentropy: Tensor,  # [N] or [0]
    dlogits: Tensor,  # [N, V], written; may be the memory of logits
) -> None:
    """Write the gradient of the logits; rows without an upstream gradient are not read."""
    gradient = reference.token_logprob_bwd(
        logits, token_ids, temperature, logit_params, logprob, entropy, lse, dlogprob, dentropy
    )
    dlogits.copy_(gradient)


@token_logprob_bwd.register_fake
def _(
    logits: Tensor,
    token_ids: Tensor,
    temperature: Tensor,
    logit_params: Tensor,
    logprob: Tensor,
    entropy: Tensor,
    lse: Tensor,
    dlogprob: Tensor,
    dentropy: Tensor,
    dlogits: Tensor,
) -> None:
    return None
