"""The parts of an objective that have parameters of their own: shapes, gates, corrections, KL and reduction."""

import math
from dataclasses import dataclass, fields
from numbers import Real
from types import UnionType
from typing import Literal, TypeVar, get_args, get_origin

from fastgrpo.spec import KLGrad, Pool, Stat, When

Interval = tuple[float, float]
INF = math.inf
ANY: Interval = (-INF, INF)

Record = TypeVar("Record")
_KINDS: dict[str, dict[str, tuple[type, ...]]] = {}


def require(condition: bool, rule: str, value: object) -> None:
    """Raise ValueError with the rule unless the condition holds."""
    if not condition:
        raise ValueError(f"{rule}, got {value!r}")


def number(name: str, value: object) -> None:
    """Raise TypeError unless the value is a real number; text, as a configuration file may hold it, is none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")


def typed(record: type[Record]) -> type[Record]:
    """Class decorator: keeps which types each field of a dataclass may have, for `check_types`."""
    kinds = {}
    for f in fields(record):  # type: ignore[arg-type]
        parts = get_args(f.type) if isinstance(f.type, UnionType) else (f.type,)
        if Interval in parts:  # `interval` tells it better
            continue
        known = (part if isinstance(part, type) else get_origin(part) for part in parts)
        kinds[f.name] = tuple(kind for kind in known if isinstance(kind, type))
    _KINDS[record.__name__] = {name: allowed for name, allowed in kinds.items() if allowed}
    return record


def check_types(record: object) -> None:
    """Raise TypeError unless every field has the type that it declares (choices by name are checked apart)."""
    owner = type(record).__name__
    for name, kinds in _KINDS[owner].items():
        value = getattr(record, name)
        if value is None and type(None) in kinds:
            continue
        if float in kinds:
            number(f"{owner}.{name}", value)
        elif not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
            raise TypeError(
                f"{owner}.{name} must be {wanted}, got {type(value).__name__} {value!r}"
            )


def choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise unless the value is one of the allowed names."""
    require(value in allowed, f"{name} must be one of {', '.join(allowed)}", value)


def interval(name: str, value: Interval) -> None:
    """Raise unless the value is a pair (low, high) with low <= high."""
    rule = f"{name} must be a pair (low, high) with low <= high"
    require(isinstance(value, tuple) and len(value) == 2, rule, value)
    for limit in value:
        number(f"{name} limit", limit)
    require(value[0] <= value[1], rule, value)


def positive_number(name: str, value: float) -> None:
    """Raise unless the value is > 0."""
    require(value > 0, f"{name} must be > 0", value)


@typed
@dataclass(frozen=True, kw_only=True)
class Sigmoid:
    """Soft bound of SAPO: weight = 4 / tau * sigmoid(tau * (r - 1)), tau by the sign of the advantage."""

    positive: float = 1.0
    negative: float = 1.05

    def __post_init__(self) -> None:
        """Check the temperatures."""
        check_types(self)
        positive_number("Sigmoid.positive", self.positive)
        positive_number("Sigmoid.negative", self.negative)


@typed
@dataclass(frozen=True, kw_only=True)
class Gamma:
    """Weight of VESPO: r^k * exp(lambda * (1 - r)), (k, lambda) by the sign of the advantage."""

    positive: Interval = (2.0, 3.0)
    negative: Interval = (3.0, 2.0)

    def __post_init__(self) -> None:
        """Check that every parameter is positive."""
        for name, pair in (("positive", self.positive), ("negative", self.negative)):
            rule = f"Gamma.{name} must be two numbers > 0"
            require(isinstance(pair, tuple) and len(pair) == 2, rule, pair)
            for value in pair:
                number(f"Gamma.{name} entry", value)
                require(value > 0, rule, pair)


@typed
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
        check_types(self)
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


@typed
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
        check_types(self)
        choice("Correction.level", self.level, ("token", "seq_sum", "seq_mean"))
        choice("Correction.mode", self.mode, ("truncate", "mask"))
        choice("Correction.applies_to", self.applies_to, ("policy", "policy_and_kl"))
        interval("Correction (low, high)", (self.low, self.high))
        require(self.low >= 0, "Correction.low must be >= 0", self.low)
        limit = self.log_clamp
        require(limit is None or limit > 0, "Correction.log_clamp must be None or > 0", limit)
        alone = all(getattr(self, f.name) == f.default for f in fields(self) if f.name != "bypass")
        require(alone or not self.bypass, "Correction.bypass excludes the other fields", self)


@typed
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
        check_types(self)
        require(0 <= self.beta < INF, "KL.beta must be finite and >= 0", self.beta)
        choice("KL.estimator", self.estimator, ("k1", "k2", "k3", "abs"))
        choice("KL.gradient", self.gradient, tuple(g.name.lower() for g in KLGrad))
        choice("KL.target", self.target, ("ref", "old"))
        for name in ("clamp_in", "clamp_out"):
            value = getattr(self, name)
            require(value is None or value > 0, f"KL.{name} must be None or > 0", value)
        positive_number("KL.ratio_cap", self.ratio_cap)


@typed
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
        check_types(self)
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
