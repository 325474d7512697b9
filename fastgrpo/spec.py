"""The numbers that Python, Triton and C++ agree on: codes of an objective's choices and the layout of its parameters.

A loss reaches a kernel as two small things: `spec`, a list of integers that says *which* formula (a kernel is
specialised on it), and `params`, a float tensor that holds every threshold and coefficient (read at run time, so no
value causes a recompile). `csrc/spec.h` mirrors this file; a test compares the two.
"""

from enum import IntEnum


class Level(IntEnum):
    """How the log-ratios of a sequence are pooled before the exponential."""

    TOKEN = 0
    SEQ_MEAN = 1
    SEQ_SUM = 2


class PoolGrad(IntEnum):
    """Gradient of a pooled log-ratio: its true derivative, or each token's own share (GSPO-token)."""

    SHARED = 0
    LOCAL = 1


class Surrogate(IntEnum):
    """The policy term: a bounded ratio, a log-prob under a bounded detached weight, or a registered function."""

    RATIO = 0
    LOGP = 1
    CUSTOM = 2


class Shape(IntEnum):
    """How the ratio is bounded: hard limits, SAPO's sigmoid, VESPO's gamma weight."""

    HARD = 0
    SIGMOID = 1
    GAMMA = 2


class Estimator(IntEnum):
    """KL estimators of Schulman's note, with delta = target log-prob - log-prob."""

    NONE = 0
    K1 = 1  # -delta
    K2 = 2  # delta^2 / 2
    K3 = 3  # exp(delta) - 1 - delta
    ABS = 4  # |delta|


class KLGrad(IntEnum):
    """Which gradient goes with the value of the KL estimator."""

    PATH = 0  # the estimator's own derivative
    K2 = 1  # straight-through: the derivative of k2
    RATIO = 2  # value and derivative of ratio * estimator
    RATIO_DETACHED = 3  # min(ratio, cap), detached, times value and derivative of the estimator


class KLTarget(IntEnum):
    """The policy that the KL term pulls towards."""

    REF = 0
    OLD = 1


class Stat(IntEnum):
    """What a gate measures, with u = first log-prob - second log-prob and p, q their probabilities."""

    RATIO = 0  # exp(u)
    K1 = 1  # u
    K2 = 2  # u^2 / 2
    K3 = 3  # exp(u) - 1 - u
    TV = 4  # p - q (signed)
    BINARY_KL = 5  # sign(p - q) * KL(Bernoulli(q) || Bernoulli(p))
    ENTROPY = 6  # entropy of the policy at this token


class Between(IntEnum):
    """The two policies that a gate compares."""

    THETA_OLD = 0
    THETA_ROLLOUT = 1


class Pool(IntEnum):
    """How a gate's statistic is reduced before it is compared with its bounds."""

    TOKEN = 0
    SEQ_SUM = 1
    SEQ_MEAN = 2
    SEQ_MAX = 3


class When(IntEnum):
    """The tokens that a gate applies to, by the sign of the advantage."""

    ALWAYS = 0
    POSITIVE = 1
    NEGATIVE = 2


class Scope(IntEnum):
    """What a closed gate removes."""

    POLICY = 0
    POLICY_AND_KL = 1


# spec = [level, pool_grad, surrogate, shape, estimator, kl_grad, kl_target, number of gates,
#         then (stat, between, pool, when, scope) for each gate]
SPEC_HEAD = 8
SPEC_GATE = 5
MAX_GATES = 4

# params: one entry per name, then MAX_GATES pairs (low, high). An absent limit is infinite, never a flag.
PARAMS = (
    "pos_low",  # bounds on the ratio where the advantage is > 0
    "pos_high",
    "neg_low",  # bounds on the ratio elsewhere
    "neg_high",
    "d_clamp",  # |log-ratio| is clamped to this, gradient of the clamped value
    "log_low",  # GMPO: advantage > 0: log-ratio <= log_high; advantage < 0: log-ratio >= log_low
    "log_high",
    "pool_low",  # bounds on the pooled log-ratio, before the exponential
    "pool_high",
    "shape_pos_a",  # sigmoid: tau; gamma: k
    "shape_pos_b",  # gamma: lambda
    "shape_neg_a",
    "shape_neg_b",
    "beta",  # weight of the KL term; exactly 0 removes it from loss and gradient
    "kl_clamp_in",  # |delta| is clamped to this
    "kl_clamp_out",  # |estimator| is clamped to this
    "kl_ratio_cap",  # RATIO_DETACHED: upper bound of the weight
    "user_0",  # parameters of a registered surrogate
    "user_1",
    "user_2",
    "user_3",
    "user_4",
    "user_5",
    "user_6",
    "user_7",
)
NUM_PARAMS = len(PARAMS) + 2 * MAX_GATES

# Rows of the metrics tensor [len(METRICS), 4], columns (sum, count, min, max) over live tokens.
METRICS = (
    "policy_loss",  # policy term after token_weight and gates
    "kl",  # KL estimate after clamps and ratio weight, before beta and kl_weight (0 without a target)
    "ratio",  # exp of the (clamped, pooled) log-ratio, before the bounds
    "coefficient",  # gain: -d policy term / d log-prob / advantage as applied (0 where clipped or gated)
    "log_ratio",  # raw log-prob - old log-prob, before any clamp
    "clip_low",  # 1 where advantage < 0 and ratio < neg_low
    "clip_high",  # 1 where advantage > 0 and ratio > pos_high
    "clip_region",  # 1 where either holds
    "clip_dual",  # 1 where advantage < 0 and ratio > neg_high
    "gate_closed",  # 1 where a gate removed the token
    "clamp_log_ratio",  # 1 where the d_clamp acted
    "clamp_kl",  # 1 where a KL clamp acted
    "entropy",  # 0 if no entropy is given
    "logprob",
    "fault",  # 1 where log-prob, old, ref or the token's loss is not finite
    "active",  # 1 where the token's gradient coefficient is not exactly 0
)
NUM_METRICS = len(METRICS)
