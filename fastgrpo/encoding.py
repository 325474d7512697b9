"""From the choices of an objective to what kernels read: its spec and its params (layouts in `fastgrpo.spec`)."""

from fastgrpo.choices import ANY, INF, KL, Gamma, Gate, Interval, Sigmoid
from fastgrpo.spec import (
    MAX_GATES,
    PARAMS,
    Between,
    Estimator,
    KLGrad,
    KLTarget,
    Level,
    Pool,
    PoolGrad,
    Scope,
    Shape,
    Stat,
    Surrogate,
    When,
)


class Encoded:
    """The half of `fastgrpo.Objective` that turns its choices into codes and numbers."""

    level: str
    pool_grad: str
    log_clip: Interval | None
    d_clamp: float | None
    pool_bounds: Interval
    surrogate: str
    surrogate_params: tuple[float, ...]
    positive: Interval
    negative: Interval
    shape: Sigmoid | Gamma | None
    gates: tuple[Gate, ...]
    kl: KL

    @property
    def policy_gates(self) -> tuple[Gate, ...]:
        """Gates that depend on the policy being trained: evaluated inside the kernels."""
        return tuple(g for g in self.gates if g.between != "old_rollout")

    def spec(self) -> list[int]:
        """Codes of the choices, the part that kernels are specialised on (see `fastgrpo.spec`)."""
        surrogate = {"ratio": Surrogate.RATIO, "logp": Surrogate.LOGP}.get(
            self.surrogate, Surrogate.CUSTOM
        )
        shape = {type(None): Shape.HARD, Sigmoid: Shape.SIGMOID, Gamma: Shape.GAMMA}[
            type(self.shape)
        ]
        codes = [
            Level[self.level.upper()],
            PoolGrad[self.pool_grad.upper()],
            surrogate,
            shape,
            Estimator[self.kl.estimator.upper()],
            KLGrad[self.kl.gradient.upper()],
            KLTarget[self.kl.target.upper()],
            len(self.policy_gates),
        ]
        for gate in self.policy_gates:
            codes += [
                Stat[gate.stat.upper()],
                Between[gate.between.upper()],
                Pool[gate.pool.upper()],
                When[gate.when.upper()],
                Scope[gate.scope.upper()],
            ]
        return [int(code) for code in codes]

    def params(self) -> list[float]:
        """Every number of the objective in the order of `fastgrpo.spec.PARAMS`, then the gates' bounds."""
        log_low, log_high = self.log_clip or ANY
        values = {
            "pos_low": self.positive[0],
            "pos_high": self.positive[1],
            "neg_low": self.negative[0],
            "neg_high": self.negative[1],
            "d_clamp": INF if self.d_clamp is None else self.d_clamp,
            "log_low": log_low,
            "log_high": log_high,
            "pool_low": self.pool_bounds[0],
            "pool_high": self.pool_bounds[1],
            "beta": self.kl.beta,
            "kl_clamp_in": self.kl.clamp_in or INF,
            "kl_clamp_out": self.kl.clamp_out or INF,
            "kl_ratio_cap": self.kl.ratio_cap,
        }
        if isinstance(self.shape, Sigmoid):
            values |= {"shape_pos_a": self.shape.positive, "shape_neg_a": self.shape.negative}
        elif isinstance(self.shape, Gamma):
            for sign, (k, lam) in (
                ("pos", self.shape.positive),
                ("neg", self.shape.negative),
            ):
                values |= {f"shape_{sign}_a": k, f"shape_{sign}_b": lam}
        values |= {f"user_{k}": value for k, value in enumerate(self.surrogate_params)}
        bounds = [limit for gate in self.policy_gates for limit in (gate.low, gate.high)]
        bounds += [-INF, INF] * (MAX_GATES - len(self.policy_gates))
        return [values.get(name, 0.0) for name in PARAMS] + bounds
