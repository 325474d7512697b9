"""Tolerances derived from what a kernel computes, and the comparison of a whole result with the float64 reference.

With eps the unit of the accumulation dtype (float32, or float64 for float64 logits) and |x| the largest scaled logit:

    logprob, lse   4 eps |x|                 x is rounded once or twice before it is exponentiated
    entropy        4 eps |x| (1 + H)         sum of p_j (x_j - m): the same roundings times the log-probs that p weighs
    ratio          relative 2 d(logprob)     exp turns an absolute error of the log-prob into a relative one
    dlogits        one rounding of its dtype, plus |g| (4 eps |x| + d(ratio)) scale / T for upstream gradient g
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo import Objective
from fastgrpo.reference.token_logprob import accumulate_dtype
from fastgrpo.testing import assert_matches_reference
from tests.ops.common import Scored


@dataclass(frozen=True)
class Tolerance:
    """Absolute errors that rounding explains, for logits [..., V] read with a temperature and a scale."""

    eps: float
    x: float  # largest |x|, at least 1
    slope: float  # largest dx / dlogits

    @classmethod
    def of(
        cls,
        logits: Tensor,
        temperature: float | Tensor = 1.0,
        scale: float = 1.0,
        softcap: float | None = None,
    ) -> "Tolerance":
        """Bounds for these logits."""
        finite = logits.detach()[logits.isfinite()].double()
        largest = float(finite.abs().max()) if finite.numel() else 1.0
        coldest = temperature
        if isinstance(temperature, Tensor):
            coldest = float(temperature.min()) if temperature.numel() else 1.0
        x = largest * scale if softcap is None else min(largest * scale, softcap)
        eps = torch.finfo(accumulate_dtype(logits.dtype)).eps
        return cls(eps, max(x / coldest, 1.0), scale / coldest)

    @property
    def logprob(self) -> float:
        """Error of a log-prob."""
        return 4 * self.eps * self.x

    def entropy(self, largest: float) -> float:
        """Error of an entropy when the largest one is `largest`."""
        return 4 * self.eps * self.x * (1.0 + largest)

    def dlogits(
        self, upstream: float, dtype: torch.dtype, upstream_error: float | None = None
    ) -> float:
        """Error of the logits' gradient besides its own rounding, for an upstream gradient of this size and error."""
        if upstream_error is None:
            upstream_error = upstream * 2 * self.logprob
        subnormal = float(torch.finfo(dtype).smallest_normal) * torch.finfo(dtype).eps
        return self.slope * (upstream * 4 * self.eps * self.x + upstream_error) + subnormal


def assert_scored(
    actual: Scored,
    expected: Scored,
    logits: Tensor,
    advantage: Tensor,
    *,
    objective: Objective | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    compare_gradient: bool = True,
) -> None:
    """Every output of `actual` lies within the derived tolerance of the float64 `expected`."""
    objective = objective or Objective.grpo()
    tol = Tolerance.of(logits, temperature, logit_scale, logit_softcap)
    assert_matches_reference(actual.logprob, expected.logprob, atol=tol.logprob)
    atol = tol.entropy(largest(expected.entropy))
    assert_matches_reference(actual.entropy, expected.entropy, atol=atol)
    bounds = loss_tolerance(tol, expected, advantage, objective)
    assert_matches_reference(
        actual.token_loss, expected.token_loss, atol=bounds.token, rtol=4 * tol.eps
    )
    assert_matches_reference(actual.loss, expected.loss, atol=bounds.loss, rtol=4 * tol.eps)
    if compare_gradient and actual.dlogits is not None and expected.dlogits is not None:
        atol = tol.dlogits(bounds.upstream, actual.dlogits.dtype, bounds.upstream_error)
        assert_matches_reference(actual.dlogits, expected.dlogits, atol=atol)


class LossTolerance(NamedTuple):
    """Absolute errors of a token loss, of the loss and of the upstream gradient, and the size of the latter."""

    token: float
    loss: float
    upstream_error: float
    upstream: float


def loss_tolerance(
    tol: Tolerance, expected: Scored, advantage: Tensor, objective: Objective
) -> LossTolerance:
    """Sensitivity to the log-prob times the log-prob's error: first derivative for losses, second for gradients."""
    live = float(expected.metrics.count())
    ratio = _largest_ratio(expected, objective) if live else 0.0
    kl = _largest_kl(expected, objective) if live else 0.0
    worst = largest(expected.logprob)
    gain = largest(advantage)
    # VESPO's weight exp(lambda (1 - r)) r^k has the logarithmic derivative k - lambda r.
    steepness = 1.0 + 3.0 * min(ratio, 100.0) if objective.shape is not None else 1.0
    policy = gain * max(ratio, 1.0) * (1.0 + worst) * steepness
    sensitivity = policy + objective.kl.beta * (1.0 + 2 * kl) * max(ratio, 1.0)
    token = 4 * tol.logprob * sensitivity
    sizes = expected.dlogprob if expected.dlogprob is not None else torch.zeros(0)
    bonus = abs(objective.entropy_coef) * expected.weight * (1.0 + tol.x)
    entropy = abs(objective.entropy_coef) * tol.entropy(largest(expected.entropy))
    return LossTolerance(
        token,
        (token + entropy) * max(1.0, live * expected.weight),
        token * expected.weight,
        largest(sizes) + bonus,
    )


def _largest_ratio(expected: Scored, objective: Objective) -> float:
    """Largest importance ratio; where a fault makes the metric NaN, what the log-probs of the other tokens allow."""
    ratio = float(expected.metrics.max("ratio"))
    if math.isfinite(ratio):
        return ratio
    if expected.old is None or expected.old.numel() == 0:
        return 1.0
    step = min(largest(expected.logprob.reshape(-1) - expected.old.double()), 20.0)
    tokens = expected.old.numel() if objective.level == "seq_sum" else 1
    return math.exp(min(step * tokens, 80.0))


def _largest_kl(expected: Scored, objective: Objective) -> float:
    """Largest KL estimate; where a fault makes the metric NaN, what the losses of the other tokens allow."""
    kl = float(expected.metrics.max("kl"))
    if math.isfinite(kl) or not objective.kl.beta:
        return largest(expected.metrics.max("kl"))
    return largest(expected.token_loss) / objective.kl.beta


def largest(values: Tensor) -> float:
    """Largest finite magnitude, 0 without any."""
    finite = values[values.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0
