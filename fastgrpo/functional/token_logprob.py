"""`token_logprob`: log-probability and entropy of the sampled tokens from logits."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgrpo.functional.checks import (
    as_mask,
    data_check,
    describe,
    flatten,
    is_strict,
    needs_grad,
    require_detached,
    require_device,
    require_flag,
    require_float,
    require_number,
    require_shape,
    require_token_ids,
)
from fastgrpo.functional.faults import raise_on_fault
from fastgrpo.functional.first_order import first_order_only
from fastgrpo.functional.numbers import number_tensor
from fastgrpo.ops import token_logprob as ops
from fastgrpo.reference.token_logprob import accumulate_dtype


class TokenLogprob(NamedTuple):
    """Result of `token_logprob`; `entropy` is None unless asked for."""

    logprob: Tensor  # [...] float32 (float64 for float64 logits)
    entropy: Tensor | None  # [...]


class TokenLogprobFunction(torch.autograd.Function):
    """Flat rows in, log-prob and entropy out; the backward recomputes the softmax from the logits."""

    @staticmethod
    def forward(
        logits: Tensor,
        token_ids: Tensor,
        mask: Tensor,
        temperature: Tensor,
        logit_params: Tensor,
        with_entropy: bool,
        overwrite_logits: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the forward op."""
        return ops.token_logprob_fwd(
            logits, token_ids, mask, temperature, logit_params, with_entropy
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep the logits and the row statistics."""
        logits, token_ids, mask, temperature, logit_params, _, ctx.overwrite = inputs
        logprob, entropy, lse = output
        ctx.mark_non_differentiable(lse, *([] if entropy.numel() else [entropy]))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            logits, token_ids, mask, temperature, logit_params, logprob, entropy, lse
        )

    @staticmethod
    @first_order_only
    def backward(
        ctx: Any, dlogprob: Tensor | None, dentropy: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, None, None, None, None, None, None]:
        """Write the gradient of the logits, into their own memory if that was agreed."""
        logits, token_ids, mask, temperature, logit_params, logprob, entropy, lse = (
            ctx.saved_tensors
        )
        if dlogprob is None and dentropy is None:
            return None, None, None, None, None, None, None

        def upstream(gradient: Tensor | None) -> Tensor:
            if gradient is None:
                return logprob.new_empty(0)
            return gradient.contiguous() if not mask.numel() else gradient.where(mask, 0.0)

        dlogits = logits if ctx.overwrite else torch.empty_like(logits)
        ops.token_logprob_bwd(
            logits,
            token_ids,
            temperature,
            logit_params,
            logprob,
            entropy,
            lse,
            upstream(dlogprob),
            upstream(dentropy),
            dlogits,
        )
        return dlogits, None, None, None, None, None, None


def temperature_tensor(temperature: float | Tensor, shape: torch.Size, like: Tensor) -> Tensor:
    """The temperature as a [1] or [N] tensor in the accumulation dtype of `like`."""
    dtype = accumulate_dtype(like.dtype)
    if isinstance(temperature, Tensor):
        require_float("temperature", temperature)
        require_detached("temperature", temperature)
        positive = (temperature > 0) & (temperature < torch.inf)
        data_check(positive, f"temperature must be > 0 and finite, got {describe(temperature)}")
        if temperature.numel() == 1 and temperature.dim() <= 1:
            return temperature.reshape(1).to(like.device, dtype)
        require_shape("temperature", temperature, shape, "a number, or one value per token")
        require_device("temperature", temperature, like, "the logits")
        return flatten(temperature, dtype)
    require_number("temperature", temperature, above=0.0, rule="> 0 and finite")
    return number_tensor([temperature], dtype, like.device)


def logit_params_tensor(logit_scale: float, logit_softcap: float | None, like: Tensor) -> Tensor:
    """(scale, softcap) as a tensor with 0, 1 or 2 entries; what is absent costs nothing."""
    values = []
    require_number("logit_scale", logit_scale, above=0.0, rule="> 0 and finite")
    if logit_softcap is not None:
        require_number("logit_softcap", logit_softcap, above=0.0, rule="None, or > 0 and finite")
        values = [logit_scale, logit_softcap]
    elif logit_scale != 1.0:
        values = [logit_scale]
    return number_tensor(values, accumulate_dtype(like.dtype), like.device)


def rows(logits: Tensor) -> Tensor:
    """Logits as [N, V] with a contiguous last dimension: a view where strides allow it, else one copy."""
    flat = logits.reshape(-1, logits.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def check_logits(logits: object, overwrite_logits: bool) -> Tensor:
    """Raise unless `logits` is [..., V] float with V >= 1, and a view that can be overwritten if it shall be."""
    logits = require_float("logits", logits)
    require_flag("overwrite_logits", overwrite_logits)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have shape [..., V] with V >= 1, got {describe(logits)}")
    if overwrite_logits and logits.numel() and not _can_overwrite(logits):
        raise ValueError(
            "overwrite_logits=True needs logits whose rows lie apart in memory at one common stride, with a contiguous "
            f"last dimension, got {describe(logits)} with strides {logits.stride()}"
        )
    return logits


def _can_overwrite(logits: Tensor) -> bool:
    """Whether the rows are a view of the logits and no two of them share memory (as after `expand`).

    Read from the strides alone: under torch.compile there is no address to compare.
    """
    vocabulary = logits.shape[-1]
    if vocabulary > 1 and logits.stride(-1) != 1:
        return False
    step, least = (
        None,
        vocabulary,
    )  # what the stride of the next dimension to the left must be, or at least be
    for size, stride in zip(
        reversed(logits.shape[:-1]), reversed(logits.stride()[:-1]), strict=True
    ):
        if size == 1:
            continue
        if stride < least or (step is not None and stride != step):
            return False
        step = stride * size
        least = step
    return True


def token_logprob(
    logits: Tensor,  # [..., V] float
    token_ids: Tensor,  # [...] integer, each in [0, V)
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,  # [...] bool
    with_entropy: bool = False,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    overwrite_logits: bool = False,
) -> TokenLogprob:
    """Log-probability that the policy gives to each sampled token, and on request the entropy of each position.

    logprob_i = x_i[token_ids_i] - logsumexp(x_i),  entropy_i = -sum_v p_iv log p_iv,  p_i = softmax(x_i),
    x = softcap * tanh(logit_scale * logits / softcap) / temperature (x = logit_scale * logits / temperature without a
    softcap), accumulated in float32 (float64 for float64 logits). The normaliser leaves the target out, so a token of
    probability 1 - 1e-12 keeps its log-prob and its gradient. -inf logits (top-k, grammar masks) are fine.

    Args:
        logits: Scores over the vocabulary, any leading dimensions. Rows may be strided; a layout whose rows have no
            common stride (such as `logits[:, :-1]`) is copied: pass all positions and a mask instead.
        token_ids: The tokens to score.
        temperature: A number > 0, or a tensor with one value per token.
        mask: True where a token counts. Other slots are not read: log-prob, entropy and gradient there are exactly 0.
        with_entropy: Also return the entropy (differentiable, computed in the same pass).
        logit_scale: Factor on the logits before the softcap (Cohere, Granite).
        logit_softcap: Softcap of the final logits (Gemma 2).
        overwrite_logits: Let backward write the gradient into the memory of `logits`, whose values are then lost. A
            second backward, or a producer that saved its output, raises autograd's version error.

    Returns:
        TokenLogprob(logprob, entropy), float32 (float64 for float64 logits).

    Raises:
        TypeError: A tensor has the wrong dtype.
        ValueError: Shapes or devices disagree, or a number is out of range. A token id outside [0, V) on a live token
            gives NaN in that row; `fastgrpo.checks("strict")` raises on it.

    Source: the policy term of Shao et al. 2024 (arXiv:2402.03300), Eq. 3.
    """
    logits = check_logits(logits, overwrite_logits)
    require_flag("with_entropy", with_entropy)
    shape = logits.shape[:-1]
    ids = require_token_ids(token_ids, shape, logits, "logits")
    live = logits.new_empty(0, dtype=torch.bool)
    if mask is not None:
        live = flatten(as_mask(mask, shape, logits, "logits"), torch.bool)
    scale = temperature_tensor(temperature, shape, logits)
    params = logit_params_tensor(logit_scale, logit_softcap, logits)
    if needs_grad(logits):
        logprob, entropy, _ = TokenLogprobFunction.apply(
            rows(logits), ids, live, scale, params, with_entropy, overwrite_logits
        )
    else:
        logprob, entropy, _ = ops.token_logprob_fwd(
            rows(logits), ids, live, scale, params, with_entropy
        )
    if is_strict():
        raise_on_fault(
            "token_logprob", logprob.isnan(), shape, logits.shape[-1],
            token_ids=token_ids, logits=logits, temperature=temperature,
        )  # fmt: skip
    return TokenLogprob(logprob.view(shape), entropy.view(shape) if with_entropy else None)
