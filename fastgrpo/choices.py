"""The parts of an objective that have parameters of their own: shapes, gates, corrections, KL and reduction."""

import math
from dataclasses import dataclass, fields
from typing import Literal

from fastgrpo.spec import KLGrad, Pool, Stat, When

Interval = tuple[float, float]
INF = math.inf
ANY: Interval = (-INF, INF)


def require(condition: bool, rule: str, value: object) -> None:
    """Raise ValueError with the rule unless the condition holds."""
    if not condition:
        raise ValueError(f"{rule}, got {value!r}")


def choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise unless the value is one of the allowed names."""
    require(value in allowed, f"{name} must be one of {', '.join(allowed)}", value)


def interval(name: str, value: Interval) -> None:
    """Raise unless the value is a pair (low, high) with low <= high."""
    ok = isinstance(value, tuple) and len(value) == 2 and value[0] <= value[1]
    require(ok, f"{name} must be a pair (low, high) with low <= high", value)


def positive_number(name: str, value: float) -> None:
    """Raise unless the value is > 0."""
    require(value > 0, f"{name} must be > 0", value)


@dataclass(frozen=True, kw_only=True)
class Sigmoid:
    """Soft bound of SAPO: weight = 4 / tau * sigmoid(tau * (r - 1)), tau by the sign of the advantage."""

    positive: float = 1.0
    negative: float = 1.05

    def __post_init__(self) -> None:
        """Check the temperatures."""
        positive_number("Sigmoid.positive", self.positive)
        positive_number("Sigmoid.negative", self.negative)


@dataclass(frozen=True, kw_only=True)
class Gamma:
    """Weight of VESPO: r^k * exp(lambda * (1 - r)), (k, lambda) by the sign of the advantage."""

    positive: Interval = (2.0, 3.0)
    negative: Interval = (3.0, 2.0)

    def __post_init__(self) -> None:
        """Check that every parameter is positive."""
        for name, pair in (("positive", self.positive), ("negative", self.negative)):
            require(len(pair) == 2 and min(pair) > 0, f"Gamma.{name} must be two numbers > 0", pair)


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Remove tokens whose statistic lies outside [low, high].

    `between` names the two policies compared, log-ratio u = first - second. Gates between (old, rollout) are decided
    before the loss and may also take the token out of the denominators (scope "mask"). See `fastgrpo.spec.Stat`.
    """

    stat: Literal["ratio", "k1", "k2", "k3", "tv", "binary_kl", "entropy"]
    low: float = -INF
    high: float = INF
    between: Literal["theta_old", "theta_rollout", "old_rollout"] = "theta_old"
    pool: Literal["token", "seq_sum", "seq_mean", "seq_max"] = "token"
    when: Literal["always", "positive", "negative"] = "always"
    scope: Literal["policy", "policy_and_kl", "mask"] = "policy"

    def __post_init__(self) -> None:
        """Check names and bounds."""
        choice("Gate.stat", self.stat, tuple(s.name.lower() for s in Stat))
        choice("Gate.between", self.between, ("theta_old", "theta_rollout", "old_rollout"))
        choice("Gate.pool", self.pool, tuple(s.name.lower() for s in Pool))
        choice("Gate.when", self.when, tuple(s.name.lower() for s in When))
        choice("Gate.scope", self.scope, ("policy", "policy_and_kl", "mask"))
        interval("Gate (low, high)", (self.low, self.high))
        bounded = self.low > -INF or self.high < INF
        require(bounded, "Gate needs low or high: without a bound it never closes", self)
        if self.between != "old_rollout":
            require(
                self.scope != "mask",
                "Gate.scope='mask' needs between='old_rollout': denominators are fixed before the policy is scored",
                self.between,
            )
        require(not (self.stat == "entropy" and self.between == "old_rollout"),
                 "Gate.stat='entropy' measures the policy: use between='theta_old'", self.between)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Correction:
    """Weight for the mismatch between the trainer's old policy and the sampler: w = exp(old - rollout), detached.

    `truncate` clamps w to [low, high] (TIS); `mask` sets it to 0 outside (IcePop, MIS). Sequence levels use the sum or
    the mean of the log-ratio, clamped to +-`log_clamp`. `normalize` divides by the mean over the batch's tokens (token
    level) or sequences. `bypass` takes the rollout as the old policy and excludes everything else here.
    """

    level: Literal["token", "seq_sum", "seq_mean"] = "token"
    mode: Literal["truncate", "mask"] = "truncate"
    low: float = 0.0
    high: float = 2.0
    log_clamp: float | None = 20.0
    normalize: bool = False
    applies_to: Literal["policy", "policy_and_kl"] = "policy"
    bypass: bool = False

    def __post_init__(self) -> None:
        """Check names and bounds."""
        choice("Correction.level", self.level, ("token", "seq_sum", "seq_mean"))
        choice("Correction.mode", self.mode, ("truncate", "mask"))
        choice("Correction.applies_to", self.applies_to, ("policy", "policy_and_kl"))
        interval("Correction (low, high)", (self.low, self.high))
        require(self.low >= 0, "Correction.low must be >= 0", self.low)
        limit = self.log_clamp
        require(limit is None or limit > 0, "Correction.log_clamp must be None or > 0", limit)
        alone = all(getattr(self, f.name) == f.default for f in fields(self) if f.name != "bypass")
        require(alone or not self.bypass, "Correction.bypass excludes the other fields", self)


@dataclass(frozen=True, kw_only=True)
class KL:
    """KL term beta * estimator(policy, target); DeepSeekMath Eq. 4 is k3 towards the reference.

    `gradient`: "path" differentiates the estimator, "k2" keeps its value with the gradient of k2 (straight-through),
    "ratio" multiplies by the importance ratio (unbiased), "ratio_detached" by min(ratio, ratio_cap) without gradient.
    """

    beta: float = 0.0
    estimator: Literal["k1", "k2", "k3", "abs"] = "k3"
    gradient: Literal["path", "k2", "ratio", "ratio_detached"] = "path"
    target: Literal["ref", "old"] = "ref"
    clamp_in: float | None = 20.0
    clamp_out: float | None = None
    ratio_cap: float = 10.0

    def __post_init__(self) -> None:
        """Check names and ranges."""
        require(0 <= self.beta < INF, "KL.beta must be finite and >= 0", self.beta)
        choice("KL.estimator", self.estimator, ("k1", "k2", "k3", "abs"))
        choice("KL.gradient", self.gradient, tuple(g.name.lower() for g in KLGrad))
        choice("KL.target", self.target, ("ref", "old"))
        for name in ("clamp_in", "clamp_out"):
            value = getattr(self, name)
            require(value is None or value > 0, f"KL.{name} must be None or > 0", value)
        positive_number("KL.ratio_cap", self.ratio_cap)


@dataclass(frozen=True, kw_only=True)
class Reduce:
    """From token losses to the loss: the weight of each live token, 1 / D times a factor of its sequence.

    per       factor of sequence i       D counts    published as
    token     1                          tokens      DAPO, BNPO
    sequence  |o_i| ** power             sequences   GRPO (power -1), LUSPO (power 0)
    prompt    1 / tokens of its prompt   prompts     DAPO's printed objective
    constant  1 / length                 sequences   Dr. GRPO

    D is local unless `normalizer` is passed to the loss. `count_empty`: sequences without live tokens count.
    """

    per: Literal["token", "sequence", "prompt", "constant"] = "sequence"
    power: float = -1.0
    length: int | None = None
    count_empty: bool = True

    def __post_init__(self) -> None:
        """Check that `length` is there exactly when it is used."""
        choice("Reduce.per", self.per, ("token", "sequence", "prompt", "constant"))
        require(math.isfinite(self.power), "Reduce.power must be finite", self.power)
        if self.per != "sequence":
            require(self.power == -1.0, "Reduce.power belongs to per='sequence'", self.power)
        if self.per == "constant":
            require(
                self.length is not None and self.length > 0,
                "Reduce.length must be > 0",
                self.length,
            )
        else:
            require(self.length is None, "Reduce.length belongs to per='constant'", self.length)
