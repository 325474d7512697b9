"""The head under DeepSpeed ZeRO-3: its weight is empty again by the time of the backward, which gathers it anew."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from trl.trainer import utils

from fastgrpo.functional.linear.inputs import LinearOptions
from fastgrpo.functional.linear.statistics import OUTPUTS
from fastgrpo.functional.linear_token_logprob import LinearTokenLogprobFunction
from fastgrpo.functional.linear_token_statistics import TokenStatistics
from fastgrpo.functional.token_logprob import logit_params_tensor, temperature_tensor


def is_partitioned(weight: Tensor) -> bool:
    """Whether DeepSpeed shards this weight."""
    return hasattr(weight, "ds_status")


class GatheredFunction(LinearTokenLogprobFunction):
    """The head's function with TRL's gathering context around its backward."""

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gather weight and bias, then differentiate as usual."""
        _, weight, bias = ctx.saved_tensors[:3]
        with utils.maybe_gather_lm_head_ctx(weight, bias):
            found: tuple[Tensor | None, ...] = LinearTokenLogprobFunction.backward(ctx, *upstream)
        return found


def score_gathered(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H], gathered by the caller for the forward
    token_ids: Tensor,  # [N]
    *,
    outputs: Sequence[str],
    bias: Tensor | None,
    temperature: float,
    logit_scale: float,
    logit_softcap: float | None,
) -> TokenStatistics:
    """`linear_token_statistics` for a weight that is sharded outside of this call."""
    scale = temperature_tensor(temperature, token_ids.shape, hidden)
    params = logit_params_tensor(logit_scale, logit_softcap, hidden)
    everywhere = torch.empty(0, dtype=torch.bool, device=hidden.device)
    extra = tuple(name for name in OUTPUTS if name in outputs)
    logprob, entropy, *values = GatheredFunction.apply(
        hidden, weight, bias, token_ids, everywhere, scale, params, "entropy" in outputs, LinearOptions(), None, extra
    )  # fmt: skip
    found = dict(zip(extra, values, strict=True))
    return TokenStatistics(logprob, entropy=entropy if "entropy" in outputs else None, **found)
