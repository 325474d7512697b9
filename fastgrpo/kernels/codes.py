"""`fastgrpo.spec` as compile-time constants: Triton reads only globals that are `tl.constexpr`."""

import triton.language as tl

from fastgrpo.spec import (
    MAX_GATES,
    METRICS,
    NUM_METRICS,
    PARAMS,
    SPEC_GATE,
    SPEC_HEAD,
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


def _code(member: int) -> tl.constexpr:
    return tl.constexpr(int(member))


LEVEL_TOKEN, LEVEL_SEQ_MEAN = _code(Level.TOKEN), _code(Level.SEQ_MEAN)
POOL_GRAD_SHARED = _code(PoolGrad.SHARED)
SURROGATE_RATIO, SURROGATE_CUSTOM = _code(Surrogate.RATIO), _code(Surrogate.CUSTOM)
SHAPE_HARD, SHAPE_SIGMOID = _code(Shape.HARD), _code(Shape.SIGMOID)
ESTIMATOR_NONE, ESTIMATOR_K1 = _code(Estimator.NONE), _code(Estimator.K1)
ESTIMATOR_K2, ESTIMATOR_K3 = _code(Estimator.K2), _code(Estimator.K3)
KL_GRAD_K2, KL_GRAD_RATIO = _code(KLGrad.K2), _code(KLGrad.RATIO)
KL_GRAD_RATIO_DETACHED = _code(KLGrad.RATIO_DETACHED)
KL_TARGET_REF = _code(KLTarget.REF)
STAT_RATIO, STAT_K1, STAT_K2 = _code(Stat.RATIO), _code(Stat.K1), _code(Stat.K2)
STAT_K3, STAT_TV, STAT_ENTROPY = _code(Stat.K3), _code(Stat.TV), _code(Stat.ENTROPY)
BETWEEN_THETA_OLD = _code(Between.THETA_OLD)
POOL_TOKEN, POOL_SEQ_MEAN, POOL_SEQ_MAX = (
    _code(Pool.TOKEN),
    _code(Pool.SEQ_MEAN),
    _code(Pool.SEQ_MAX),
)
WHEN_POSITIVE, WHEN_NEGATIVE = _code(When.POSITIVE), _code(When.NEGATIVE)
SCOPE_POLICY_AND_KL = _code(Scope.POLICY_AND_KL)

# Positions in spec.
LEVEL, POOL_GRAD, SURROGATE, SHAPE = (tl.constexpr(k) for k in range(4))
ESTIMATOR, KL_GRAD, KL_TARGET, NUM_GATES = (tl.constexpr(k) for k in range(4, 8))
GATES, GATE_SIZE, GATES_CAPACITY = (tl.constexpr(k) for k in (SPEC_HEAD, SPEC_GATE, MAX_GATES))


def _param(name: str) -> tl.constexpr:
    return tl.constexpr(PARAMS.index(name))


# Positions in params.
POS_LOW, POS_HIGH = _param("pos_low"), _param("pos_high")
NEG_LOW, NEG_HIGH = _param("neg_low"), _param("neg_high")
D_CLAMP, LOG_LOW, LOG_HIGH = _param("d_clamp"), _param("log_low"), _param("log_high")
POOL_LOW, POOL_HIGH = _param("pool_low"), _param("pool_high")
SHAPE_POS_A, SHAPE_POS_B = _param("shape_pos_a"), _param("shape_pos_b")
SHAPE_NEG_A, SHAPE_NEG_B = _param("shape_neg_a"), _param("shape_neg_b")
BETA, USER_0 = _param("beta"), _param("user_0")
KL_CLAMP_IN, KL_CLAMP_OUT = _param("kl_clamp_in"), _param("kl_clamp_out")
KL_RATIO_CAP = _param("kl_ratio_cap")
GATE_BOUNDS = tl.constexpr(len(PARAMS))

METRIC_ROWS = tl.constexpr(1 << (NUM_METRICS - 1).bit_length())
assert METRICS == (
    "policy_loss", "kl", "ratio", "coefficient", "log_ratio", "clip_low", "clip_high", "clip_region", "clip_dual",
    "gate_closed", "clamp_log_ratio", "clamp_kl", "entropy", "logprob", "fault", "active",
), "kernels.policy_metrics.metric_rows lists the metrics in this order"  # fmt: skip
