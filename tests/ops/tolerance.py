"""Tolerances derived from what a kernel computes, and the comparison of a whole result with the float64 reference.

With eps the unit of the accumulation dtype (float32, or float64 for float64 logits) and |x| the largest scaled logit:

    logprob, lse   4 eps |x|                 x is rounded once or twice before it is exponentiated
    entropy        4 eps |x| (1 + H)         sum of p_j (x_j - m): the same roundings times the log-probs that p weighs
    ratio          relative 2 d(logprob)     exp turns an absolute error of the log-prob into a relative one
    dlogits        one rounding of its dtype, plus |g| (4 eps |x| + d(ratio)) scale / T for upstream gradient g
"""

from dataclasses import dataclass

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
        coldest = float(temperature.min()) if isinstance(temperature, Tensor) else temperature
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

    def dlogits(self, upstream: float, dtype: torch.dtype) -> float:
        """Error of the logits' gradient besides its own rounding, for an upstream gradient of this size."""
        subnormal = float(torch.finfo(dtype).smallest_normal) * torch.finfo(dtype).eps
        return upstream * self.slope * (4 * self.eps * self.x + 2 * self.logprob) + subnormal


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
    finite = expected.entropy[expected.entropy.isfinite()]
    largest = float(finite.max()) if finite.numel() else 0.0
    assert_matches_reference(actual.entropy, expected.entropy, atol=tol.entropy(largest))
    token, loss = loss_tolerance(tol, expected, advantage, objective)
    assert_matches_reference(actual.token_loss, expected.token_loss, atol=token, rtol=4 * tol.eps)
    assert_matches_reference(actual.loss, expected.loss, atol=loss, rtol=4 * tol.eps)
    if compare_gradient and actual.dlogits is not None and expected.dlogits is not None:
        upstream = expected.dlogprob
        size = float(upstream[upstream.isfinite()].abs().max()) if upstream.numel() else 0.0
        bonus = abs(objective.entropy_coef) * (1.0 + tol.x)
        atol = tol.dlogits(size + bonus, actual.dlogits.dtype)
        assert_matches_reference(actual.dlogits, expected.dlogits, atol=atol)


def loss_tolerance(
    tol: Tolerance, expected: Scored, advantage: Tensor, objective: Objective
) -> tuple[float, float]:
    """Absolute error of a token's loss and of the loss: sensitivity to the log-prob times the log-prob's error."""
    live = float(expected.metrics.count())
    ratio = float(expected.metrics.max("ratio")) if live else 0.0
    kl = float(expected.metrics.max("kl").abs()) if live else 0.0
    gain = float(advantage[advantage.isfinite()].abs().max()) if advantage.numel() else 0.0
    worst = float(expected.metrics.min("logprob").abs()) if live else 0.0
    sensitivity = gain * max(ratio, 1.0) * (1.0 + worst) + objective.kl.beta * (1.0 + 2 * kl)
    token = 4 * tol.logprob * sensitivity
    return token, token * max(1.0, live if objective.reduce.power == 0 else 1.0)
