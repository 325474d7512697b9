"""Every GRPO-family objective as one frozen record of orthogonal choices; the published ones are presets.

Per token, with d = logprob - old_logprob, s the (pooled) log-ratio and r = exp(s):

    token_loss = policy(r, advantage) + kl.beta * KL(policy || target)
    loss       = sum_t weight_t * token_loss_t - entropy_coef * sum_t weight_t * entropy_t

`weight` comes from `reduce` alone, so no kernel knows the name of a loss. A preset is data; a new
objective is one method.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from fastgrpo.choices import (
    ANY,
    INF,
    KL,
    Correction,
    Gamma,
    Gate,
    Interval,
    Reduce,
    Sigmoid,
    check_types,
    choice,
    interval,
    number,
    require,
    typed,
)
from fastgrpo.encoding import Encoded
from fastgrpo.spec import MAX_GATES, Level
from fastgrpo.words import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping


def _clip(low: float, high: float, delta: float | None = None) -> dict[str, Any]:
    """PPO bounds; `delta` caps the unclipped branch of min(r A, clip(r) A), whatever the sign of A."""
    for name, value in (
        ("epsilon", low),
        ("epsilon_high", high),
        ("delta", 1.0 if delta is None else delta),
    ):
        number(name, value)
    require(0 <= low < 1, "epsilon must be in [0, 1)", low)
    require(high >= 0, "epsilon_high must be >= 0", high)
    require(delta is None or delta > 0, "delta must be > 0", delta)
    stop = INF if delta is None else delta
    return {"positive": (-INF, min(1 + high, stop)), "negative": (1 - low, max(1 + high, stop))}


PRESET_ARGUMENTS = ("beta", "epsilon", "epsilon_high", "delta")


class _Presets(type):
    """Has the class name its presets where one is misspelt."""

    if not TYPE_CHECKING:

        def __getattr__(cls, name: str) -> object:
            own = [n for n, value in vars(cls).items() if isinstance(value, classmethod)]
            presets = [n for n in own if not n.startswith(("_", "from_"))]
            raise AttributeError(
                f"Objective has no preset {name!r}.{did_you_mean(name, presets)} Presets: {', '.join(presets)}"
            )


@typed
@dataclass(frozen=True, kw_only=True)
class Objective(Encoded, metaclass=_Presets):
    """What is optimised, as independent choices; build it from a preset and `replace` fields, or field by field.

    `surrogate` "ratio": -A * r with the gradient stopped outside the bounds of A's sign; "logp": -A * sg(bounded r) *
    logprob with the gradient kept; any other name must be registered by `fastgrpo.register_surrogate`. Log-ratios are
    clamped to +-`d_clamp` (gradient 0 outside; the metrics count it); None turns the clamp off.
    `entropy_reduce` gives the entropy bonus a reduction of its own, always with a local D (TRL: the mean over tokens).
    """

    name: str = "custom"
    level: Literal["token", "seq_mean", "seq_sum"] = "token"
    pool_grad: Literal["shared", "local"] = "shared"
    log_clip: Interval | None = None
    d_clamp: float | None = 20.0
    pool_bounds: Interval = ANY
    surrogate: str = "ratio"
    surrogate_params: tuple[float, ...] = ()
    positive: Interval = ANY
    negative: Interval = ANY
    shape: Sigmoid | Gamma | None = None
    gates: tuple[Gate, ...] = ()
    correction: Correction | None = None
    kl: KL = KL()  # noqa: RUF009 (frozen)
    reduce: Reduce = Reduce()  # noqa: RUF009 (frozen)
    entropy_coef: float = 0.0
    entropy_reduce: Reduce | None = None

    def __post_init__(self) -> None:
        """Reject what cannot be meant."""
        check_types(self)
        choice("level", self.level, tuple(x.name.lower() for x in Level))
        choice("pool_grad", self.pool_grad, ("shared", "local"))
        for name in ("positive", "negative", "pool_bounds"):
            interval(name, getattr(self, name))
        if self.log_clip is not None:
            interval("log_clip", self.log_clip)
        require(
            self.d_clamp is None or self.d_clamp > 0, "d_clamp must be None or > 0", self.d_clamp
        )
        require(math.isfinite(self.entropy_coef), "entropy_coef must be finite", self.entropy_coef)
        require(
            len(self.surrogate_params) <= 8,
            "surrogate_params holds at most 8 numbers",
            self.surrogate_params,
        )
        require(not (self.surrogate_params and self.surrogate in ("ratio", "logp")),
                 "surrogate_params belong to a registered surrogate", self.surrogate)  # fmt: skip
        bounded = self.positive != ANY or self.negative != ANY
        require(
            not (bounded and self.shape is not None),
            "a shape replaces the bounds: give one of them",
            self.shape,
        )
        custom = self.surrogate not in ("ratio", "logp")
        require(not (custom and (bounded or self.shape is not None)),
                 "a registered surrogate does its own clipping: no bounds, no shape", self.surrogate)  # fmt: skip
        pooled = self.level != "token" or self.pool_grad == "shared"
        require(pooled, "pool_grad='local' needs level seq_mean or seq_sum", self.level)
        both = self.correction is not None and self.correction.applies_to == "policy_and_kl"
        require(
            not (both and self.folds_correction),
            "a Gamma shape takes the correction into its ratio: Correction.applies_to must be 'policy'",
            self.correction,
        )
        bypass = self.correction is not None and self.correction.bypass
        live = [g for g in self.gates if g.between != "old_rollout"]
        require(
            not bypass or len(live) == len(self.gates),
            "with Correction.bypass the old policy is the rollout: gate between='theta_rollout'",
            self.gates,
        )
        require(
            len(live) <= MAX_GATES, f"at most {MAX_GATES} gates may look at the policy", len(live)
        )

    def replace(self, **changes: Any) -> "Objective":
        """Return a copy with some fields changed.

        Raises:
            TypeError: There is no such field.
        """
        known = [field.name for field in fields(self)]
        unknown = next((name for name in changes if name not in known), None)
        if unknown is not None:
            preset = f" Pass it to a preset, as in Objective.grpo({unknown}=...)."
            hint = preset if unknown in PRESET_ARGUMENTS else did_you_mean(unknown, known)
            raise TypeError(f"Objective has no field {unknown!r}.{hint} Fields: {', '.join(known)}")
        return replace(self, **changes)

    @property
    def folds_correction(self) -> bool:
        """Whether the rollout correction enters the sequence ratio (VESPO) instead of multiplying the term."""
        return isinstance(self.shape, Gamma)

    @property
    def is_token_local(self) -> bool:
        """Whether a token's gradient coefficient depends on nothing but its own row."""
        return self.level == "token" and all(g.pool == "token" for g in self.policy_gates)

    # Presets. Each carries its paper's clip bounds and reduction; beta = 0 unless asked for.

    @classmethod
    def grpo(cls, *, epsilon: float = 0.2, epsilon_high: float | None = None, delta: float | None = None,
             beta: float = 0.0) -> "Objective":  # fmt: skip
        """Shao et al. 2024 (arXiv 2402.03300), Eq. 3; the paper's beta is 0.04."""
        high = epsilon if epsilon_high is None else epsilon_high
        return cls(name="grpo", **_clip(epsilon, high, delta), kl=KL(beta=beta))

    @classmethod
    def dapo(cls, *, epsilon: float = 0.2, epsilon_high: float = 0.28, delta: float | None = None,
             beta: float = 0.0) -> "Objective":  # fmt: skip
        """Yu et al. 2025 (arXiv 2503.14476): clip-higher, mean over tokens (`Reduce(per="prompt")` as printed)."""
        return cls(
            name="dapo",
            **_clip(epsilon, epsilon_high, delta),
            kl=KL(beta=beta),
            reduce=Reduce(per="token"),
        )

    @classmethod
    def bnpo(
        cls, *, epsilon: float = 0.2, epsilon_high: float | None = None, beta: float = 0.0
    ) -> "Objective":
        """Xiao et al. 2025 (arXiv 2506.02864): GRPO's bounds, mean over the tokens of the batch."""
        high = epsilon if epsilon_high is None else epsilon_high
        return cls(
            name="bnpo", **_clip(epsilon, high), kl=KL(beta=beta), reduce=Reduce(per="token")
        )

    @classmethod
    def dr_grpo(cls, max_length: int, *, epsilon: float = 0.2, epsilon_high: float | None = None,
                beta: float = 0.0) -> "Objective":  # fmt: skip
        """Liu et al. 2025 (arXiv 2503.20783): constant length normaliser, for advantages with scale="none"."""
        high = epsilon if epsilon_high is None else epsilon_high
        reduce = Reduce(per="constant", length=max_length)
        return cls(name="dr_grpo", **_clip(epsilon, high), kl=KL(beta=beta), reduce=reduce)

    @classmethod
    def ppo(cls, *, epsilon: float = 0.2, dual_clip: float | None = None) -> "Objective":
        """Schulman et al. 2017 (arXiv 1707.06347); Eq. 1 of DeepSeekMath: advantages from `gae`, KL in the reward."""
        cap = INF if dual_clip is None else dual_clip
        require(cap > 1, "dual_clip must be > 1", dual_clip)
        bounds = _clip(epsilon, epsilon) | {"negative": (1 - epsilon, cap)}
        return cls(name="ppo", **bounds)

    @classmethod
    def gspo(
        cls, *, epsilon: float = 3e-4, epsilon_high: float = 4e-4, beta: float = 0.0
    ) -> "Objective":
        """Zheng et al. 2025 (arXiv 2507.18071): ratio of the whole sequence, geometric mean over tokens."""
        return cls(name="gspo", level="seq_mean", **_clip(epsilon, epsilon_high), kl=KL(beta=beta))

    @classmethod
    def gspo_token(
        cls, *, epsilon: float = 3e-4, epsilon_high: float = 4e-4, beta: float = 0.0
    ) -> "Objective":
        """GSPO-token, section 4.3 of arXiv 2507.18071: GSPO's ratio, each token its own gradient."""
        return replace(
            cls.gspo(epsilon=epsilon, epsilon_high=epsilon_high, beta=beta),
            name="gspo_token",
            pool_grad="local",
        )

    @classmethod
    def luspo(
        cls, *, epsilon: float = 3e-4, epsilon_high: float = 4e-4, beta: float = 0.0
    ) -> "Objective":
        """Length-unbiased GSPO (arXiv 2602.05261): token losses summed per sequence, averaged over sequences."""
        return replace(
            cls.gspo(epsilon=epsilon, epsilon_high=epsilon_high, beta=beta),
            name="luspo",
            reduce=Reduce(power=0.0),
        )

    @classmethod
    def gmpo(
        cls, *, epsilon: float = 0.4, epsilon_high: float | None = None, beta: float = 0.0
    ) -> "Objective":
        """Zhao et al. 2025 (arXiv 2507.20673): geometric mean of ratios clipped per token in log space."""
        high = epsilon if epsilon_high is None else epsilon_high
        return cls(name="gmpo", level="seq_mean", log_clip=(-epsilon, high), kl=KL(beta=beta))

    @classmethod
    def cispo(
        cls, *, epsilon_low: float | None = None, epsilon_high: float = 5.0, beta: float = 0.0
    ) -> "Objective":
        """MiniMax 2025 (arXiv 2506.13585): detached ratio clamped to [epsilon_low, epsilon_high], absolute bounds.

        ScaleRL (arXiv 2510.13786) uses epsilon_high = 5. verl's convention is (1 - eps, 1 + eps).
        """
        bounds = (0.0 if epsilon_low is None else epsilon_low, epsilon_high)
        return cls(
            name="cispo",
            surrogate="logp",
            positive=bounds,
            negative=bounds,
            kl=KL(beta=beta),
            reduce=Reduce(per="token"),
        )

    @classmethod
    def sapo(
        cls, *, tau_positive: float = 1.0, tau_negative: float = 1.05, beta: float = 0.0
    ) -> "Objective":
        """Soft adaptive policy optimisation (arXiv 2511.20347): a sigmoid instead of a clip."""
        return cls(
            name="sapo",
            shape=Sigmoid(positive=tau_positive, negative=tau_negative),
            kl=KL(beta=beta),
        )

    @classmethod
    def vespo(
        cls, *, positive: Interval = (2.0, 3.0), negative: Interval = (3.0, 2.0), beta: float = 0.0
    ) -> "Objective":
        """VESPO (arXiv 2602.10693): gamma weight of the sequence ratio, log-ratio within [log 1e-8, 20]."""
        return cls(name="vespo", level="seq_sum", surrogate="logp", shape=Gamma(positive=positive, negative=negative),
                   pool_bounds=(math.log(1e-8), 20.0), kl=KL(beta=beta), reduce=Reduce(per="token"))  # fmt: skip

    @classmethod
    def rloo(cls, *, epsilon: float = 0.2, epsilon_high: float | None = None) -> "Objective":
        """Ahmadian et al. 2024 (arXiv 2402.14740) with TRL's clipped sequence ratio; leave-one-out advantages."""
        high = epsilon if epsilon_high is None else epsilon_high
        return cls(name="rloo", level="seq_sum", **_clip(epsilon, high))

    @classmethod
    def reinforce(cls) -> "Objective":
        """Williams 1992: -A * logprob, token losses summed per sequence."""
        return cls(
            name="reinforce",
            surrogate="logp",
            positive=(1.0, 1.0),
            negative=(1.0, 1.0),
            reduce=Reduce(power=0.0),
        )

    @classmethod
    def gpg(cls) -> "Objective":
        """Chu et al. 2025 (arXiv 2504.02546): REINFORCE with the mean over tokens."""
        return replace(cls.reinforce(), name="gpg", reduce=Reduce(per="token"))

    @classmethod
    def topr(cls) -> "Objective":
        """Le Roux et al. 2025 (arXiv 2503.14286): weight 1 for good tokens, the ratio in [0, 1] for bad ones."""
        return cls(
            name="topr",
            surrogate="logp",
            positive=(1.0, 1.0),
            negative=(0.0, 1.0),
            reduce=Reduce(power=0.0),
        )

    @classmethod
    def dppo_tv(cls, *, low: float = 0.2, high: float = 0.2, cap: float = 20.0) -> "Objective":
        """DPPO (arXiv 2602.04879): a token is dropped once its probability has moved too far the wanted way."""
        return cls._dppo("tv", low, high, cap)

    @classmethod
    def dppo_kl(cls, *, low: float = 0.2, high: float = 0.2, cap: float = 20.0) -> "Objective":
        """DPPO (arXiv 2602.04879) with the binary KL of the sampled token instead of its total variation."""
        return cls._dppo("binary_kl", low, high, cap)

    @classmethod
    def _dppo(
        cls, stat: Literal["tv", "binary_kl"], low: float, high: float, cap: float
    ) -> "Objective":
        gates = (
            Gate(stat=stat, high=high, when="positive"),
            Gate(stat=stat, low=-low, when="negative"),
        )
        name = "dppo_tv" if stat == "tv" else "dppo_kl"
        return cls(
            name=name,
            surrogate="logp",
            positive=(0.0, cap),
            negative=(0.0, cap),
            gates=gates,
            reduce=Reduce(per="token"),
        )

    @classmethod
    def dro(cls, *, beta: float) -> "Objective":
        """Richemond et al. 2024 (arXiv 2405.19107): -A * logprob + beta / 2 * (logprob - old)^2."""
        kl = KL(beta=beta, estimator="k2", target="old", clamp_in=None)
        return replace(cls.reinforce(), name="dro", kl=kl, reduce=Reduce(per="token"))

    @classmethod
    def from_trl(cls, config: Any) -> "Objective":
        """The objective that a `trl.GRPOConfig` describes; raises on an option that is not covered."""
        from fastgrpo.convert import objective_from_trl

        return objective_from_trl(config)

    @classmethod
    def from_verl(cls, config: "Mapping[str, Any]") -> "Objective":
        """The objective that verl's actor config describes; raises on an option that is not covered."""
        from fastgrpo.convert import objective_from_verl

        return objective_from_verl(config)
