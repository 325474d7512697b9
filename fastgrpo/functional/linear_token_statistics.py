"""`linear_token_statistics`: log-prob, entropy and further statistics of the policy from hidden states in one pass."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fastgrpo.functional.linear.gemm import Precision
from fastgrpo.functional.linear.inputs import LinearOptions
from fastgrpo.functional.linear.statistics import OUTPUTS
from fastgrpo.functional.linear_token_logprob import apply_scoring


class TokenStatistics(NamedTuple):
    """Result of `linear_token_statistics`; what was not asked for is None."""

    logprob: Tensor  # [...] float32 (float64 for float64 hidden states)
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logit: Tensor | None = None
    is_top1: Tensor | None = None  # [...] bool


def linear_token_statistics(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    token_ids: Tensor,  # [...]
    *,
    outputs: Sequence[str] = ("entropy", *OUTPUTS),
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    logits_precision: Precision = "auto",
    workspace_bytes: int | None = None,
    capacity: int | None = None,
) -> TokenStatistics:
    """`linear_token_logprob` with more to look at, each from the same logits x (scaled, soft-capped, over temperature).

    Args:
        hidden: See `linear_token_logprob`, as for all arguments but `outputs`.
        weight: See `linear_token_logprob`.
        token_ids: See `linear_token_logprob`.
        outputs: Any of "entropy" (differentiable, as is the log-prob), "log_sum_sq_probs" = log sum p^2,
            "mean_logit" = mean of x, and "is_top1": the token is the first most likely one.
        bias: See `linear_token_logprob`.
        temperature: See `linear_token_logprob`.
        mask: See `linear_token_logprob`; masked slots hold 0 (False).
        logit_scale: See `linear_token_logprob`.
        logit_softcap: See `linear_token_logprob`.
        logits_precision: See `linear_token_logprob`.
        workspace_bytes: See `linear_token_logprob`.
        capacity: See `linear_token_logprob`.

    Returns:
        TokenStatistics, the outputs of TRL's fused head in TRL's order.
    """
    unknown = sorted(set(outputs) - {"entropy", *OUTPUTS})
    if unknown:
        raise ValueError(f"outputs must be among entropy, {', '.join(OUTPUTS)}, got {unknown}")
    extra = tuple(name for name in OUTPUTS if name in outputs)
    logprob, entropy, *values = apply_scoring(
        hidden,
        weight,
        token_ids,
        bias=bias,
        temperature=temperature,
        mask=mask,
        with_entropy="entropy" in outputs,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        options=LinearOptions(logits_precision, workspace_bytes, capacity),
        outputs=extra,
    )
    found = dict(zip(extra, values, strict=True))
    if "entropy" in outputs:
        found["entropy"] = entropy
    return TokenStatistics(logprob, **found)
