"""`kl_estimate`: KL divergence estimated at each sampled token."""

from typing import Any

import torch
from torch import Tensor

from fastgrpo.functional.checks import (
    flatten,
    needs_grad,
    require_detached,
    require_device,
    require_float,
    require_number,
    require_shape,
)
from fastgrpo.functional.first_order import first_order_only
from fastgrpo.functional.numbers import number_tensor
from fastgrpo.ops import kl_estimate as ops
from fastgrpo.reference.token_logprob import accumulate_dtype
from fastgrpo.spec import Estimator, KLGrad


class KLEstimateFunction(torch.autograd.Function):
    """The op returns the derivative with the value."""

    @staticmethod
    def forward(
        logprob: Tensor, ref: Tensor, old: Tensor, params: Tensor, estimator: int, gradient: int
    ) -> tuple[Tensor, Tensor]:
        """Run the op."""
        return ops.kl_estimate(logprob, ref, old, params, estimator, gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep the derivative."""
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1])

    @staticmethod
    @first_order_only
    def backward(ctx: Any, dvalue: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        """Scale the stored derivative."""
        (derivative,) = ctx.saved_tensors
        gradient = None if dvalue is None else torch.where(dvalue == 0, 0.0, derivative * dvalue)
        return (gradient, None, None, None, None, None)


def kl_estimate(
    logprob: Tensor,  # [...] float
    ref_logprob: Tensor,  # [...]
    estimator: str = "k3",
    *,
    gradient: str = "path",
    old_logprob: Tensor | None = None,  # [...]
    clamp_in: float | None = 20.0,
    clamp_out: float | None = None,
    ratio_cap: float = 10.0,
) -> Tensor:  # [...] float32 (float64 for float64 input)
    """Estimate KL(policy || reference) at each sampled token, differentiable with respect to `logprob`.

    With delta = ref_logprob - logprob: k1 = -delta, k2 = delta^2 / 2, k3 = exp(delta) - 1 - delta, abs = |delta|.

    Args:
        logprob: Log-probs of the policy.
        ref_logprob: Log-probs of the reference.
        estimator: "k1", "k2", "k3" or "abs".
        gradient: "path", "k2", "ratio" or "ratio_detached", see `fastgrpo.choices.KL`.
        old_logprob: The sampling policy, for the two ratio modes; None: ratio 1.
        clamp_in: Limit of |delta|; None: no limit. A clamped value has gradient 0.
        clamp_out: Limit of the value; None: no limit.
        ratio_cap: Upper bound of the detached ratio.

    Raises:
        TypeError: A tensor is not floating-point.
        ValueError: Shapes or devices disagree, or a name or limit is out of range.

    Source: DeepSeekMath Eq. 4 (arXiv:2402.03300); http://joschu.net/blog/kl-approx.html.
    """
    logprob = require_float("logprob", logprob)
    dtype = accumulate_dtype(logprob.dtype)

    def side(name: str, value: Tensor) -> Tensor:
        require_float(name, value)
        require_shape(name, value, logprob.shape, "the shape of logprob")
        require_device(name, value, logprob, "logprob")
        require_detached(name, value)
        return flatten(value.detach(), dtype)

    estimators = {name: Estimator[name.upper()] for name in ("k1", "k2", "k3", "abs")}
    gradients = {mode.name.lower(): mode for mode in KLGrad}
    if estimator not in estimators:
        raise ValueError(f"estimator must be one of {', '.join(estimators)}, got {estimator!r}")
    if gradient not in gradients:
        raise ValueError(f"gradient must be one of {', '.join(gradients)}, got {gradient!r}")
    limits = {"clamp_in": clamp_in, "clamp_out": clamp_out, "ratio_cap": ratio_cap}
    for name, limit in limits.items():
        if limit is not None and limit != float("inf"):
            require_number(name, limit, above=0.0, rule="None or > 0")
    numbers = [float("inf") if limit is None else limit for limit in limits.values()]
    params = number_tensor(numbers, dtype, logprob.device)
    flat = flatten(logprob, dtype)
    ref = side("ref_logprob", ref_logprob)
    old = flat.new_empty(0) if old_logprob is None else side("old_logprob", old_logprob)
    codes = (int(estimators[estimator]), int(gradients[gradient]))
    if needs_grad(flat):
        value, _ = KLEstimateFunction.apply(flat, ref, old, params, *codes)
    else:
        value, _ = ops.kl_estimate(flat, ref, old, params, *codes)
    return value.view(logprob.shape)
