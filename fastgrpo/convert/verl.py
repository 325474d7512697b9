"""verl's actor configuration (0.9) to `Objective`, with exactly verl's clamps, bounds and reductions."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from fastgrpo.choices import KL, Correction, Gate, Reduce, Sigmoid
from fastgrpo.objective import Objective

# Options that the caller may see to itself: no denominator, and a length that is known only with the batch.
CALLER = frozenset({"token-sum", "loss_scale_factor"})
ESTIMATORS = {
    "kl": "k1",
    "k1": "k1",
    "abs": "abs",
    "mse": "k2",
    "k2": "k2",
    "low_var_kl": "k3",
    "k3": "k3",
}
LOSS_MODES = (
    "vanilla",
    "gspo",
    "sapo",
    "gpg",
    "cispo",
    "geo_mean",
    "dro",
    "dppo_tv",
    "dppo_kl",
    "bypass_mode",
)
AGGREGATIONS = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)
RS_STATS = ("k1", "k2", "k3")
RS_POOLS = ("token", "seq_sum", "seq_mean", "seq_max")


def read(config: Any, path: str, default: Any = ...) -> Any:
    """Read a dotted option of a mapping, an omegaconf node or a dataclass."""
    value = config
    for name in path.split("."):
        found = value.get(name, ...) if isinstance(value, Mapping) else getattr(value, name, ...)
        if found is ...:
            if default is ...:
                raise ValueError(f"verl's actor configuration has no option {path!r}")
            return default
        value = found
    return value


def objective_from_verl(
    config: Any, *, rollout_correction: Any = None, handled: Collection[str] = ()
) -> Objective:
    """Return the objective that verl's actor configuration describes.

    Without `batch_num_tokens` and `global_batch_size` verl counts the batch itself and leaves fully masked sequences
    out; with them, pass `normalizer` = their value / dp_size.

    Args:
        config: `actor_rollout_ref.actor`, as a mapping, an omegaconf node or an `ActorConfig`.
        rollout_correction: `algorithm.rollout_correction`: verl's trainer applies it before the loss. In bypass mode
            verl passes the sampler's log-probs as the old policy's; do the same.
        handled: "token-sum" if the caller passes `normalizer` = 1 / dp_size; "loss_scale_factor" if it replaces
            `reduce.length` by the padded width, which verl takes for None.

    Raises:
        ValueError: An option is not covered or missing.

    Source: verl-project/verl, `core_algos.py`, `rollout_corr_helper.py` and `workers/utils/losses.py` of 0.9.1.
    """
    mode = read(config, "policy_loss.loss_mode", "vanilla")
    if mode not in LOSS_MODES:
        raise ValueError(
            f"policy_loss.loss_mode = {mode!r} is not covered; covered: {', '.join(LOSS_MODES)} (clip_cov and kl_cov "
            "need statistics of the batch: pass token_weight from fastgrpo.masks)"
        )
    reduce = _reduce(config, handled)
    bypass = mode == "bypass_mode" or bool(read(rollout_correction or {}, "bypass_mode", False))
    if bypass:
        inner = rollout_correction or read(config, "policy_loss.rollout_correction")
        changes: dict[str, Any] = _bypass(config, inner)
        correction: dict[str, Any] = {}
    else:
        changes = _policy(config, mode)
        correction = _rollout_correction(rollout_correction, mode)
    own_gates = changes.get("gates", ())
    changes = {**{"reduce": reduce, "kl": _kl(config)}, **changes, **correction}
    changes["gates"] = own_gates + correction.get("gates", ())
    if read(config, "use_kl_loss", False) and mode == "dro":
        raise ValueError(
            "use_kl_loss=True with policy_loss.loss_mode='dro' is not covered: dro already pulls to the old policy"
        )
    if read(config, "use_kl_loss", False) and changes["reduce"] != reduce:
        raise ValueError(
            f"use_kl_loss=True with policy_loss.loss_mode={mode!r} is not covered: the mode forces a reduction and "
            "verl's KL term has one of its own"
        )
    coefficient = read(config, "entropy_coeff", 0.0)
    own = reduce if changes["reduce"] != reduce else None
    return Objective(
        name=f"verl-{mode}",
        entropy_coef=coefficient,
        entropy_reduce=own if coefficient else None,
        **changes,
    )


def _clip_range(config: Any) -> tuple[float, float]:
    """Read clip_ratio_low and clip_ratio_high, each falling back to clip_ratio."""
    both = read(config, "clip_ratio", 0.2)
    ends = (read(config, f"clip_ratio_{end}", None) for end in ("low", "high"))
    low, high = (both if end is None else end for end in ends)
    return low, high


def _policy(config: Any, mode: str) -> dict[str, Any]:
    """The policy term of a loss mode."""
    low, high = _clip_range(config)
    clip = {"positive": (-math.inf, 1 + high), "negative": (1 - low, math.inf)}
    if mode == "vanilla":
        cap = read(config, "clip_ratio_c", 3.0)
        if not cap > 1:
            raise ValueError(f"clip_ratio_c must be > 1, got {cap!r}")
        return {**clip, "negative": (1 - low, cap)}
    if mode == "gspo":
        limits = {"pool_bounds": (-math.inf, 10.0), "d_clamp": None}
        return {**clip, **limits, "level": "seq_mean", "pool_grad": "local"}
    if mode == "cispo":
        return {"surrogate": "logp"} | dict.fromkeys(("positive", "negative"), (1 - low, 1 + high))
    if mode in ("dppo_tv", "dppo_kl"):
        make = Objective.dppo_tv if mode == "dppo_tv" else Objective.dppo_kl
        preset = make(low=low, high=high, cap=read(config, "clip_ratio_c", 20.0))
        names = ("surrogate", "positive", "negative", "gates")
        return {name: getattr(preset, name) for name in names}
    if mode == "sapo":
        tau = (read(config, "tau_pos", 1.0), read(config, "tau_neg", 1.05))
        return {
            "shape": Sigmoid(positive=tau[0], negative=tau[1]),
            "reduce": Reduce(count_empty=False),
        }
    if mode == "geo_mean":
        clip_log = {"log_clip": (-low, high), "d_clamp": None}
        return {"level": "seq_mean", "reduce": Reduce(), **clip_log}
    plain: dict[str, Any] = {"surrogate": "logp", "positive": (1.0, 1.0), "negative": (1.0, 1.0)}
    if mode == "dro":
        beta = read(config, "policy_loss.dro_beta", None)
        if not beta or beta <= 0:
            raise ValueError(f"policy_loss.dro_beta must be > 0 for loss_mode='dro', got {beta!r}")
        return plain | {"kl": KL(beta=beta, estimator="k2", target="old", clamp_in=None)}
    return plain


def _reduce(config: Any, handled: Collection[str]) -> Reduce:
    """Map loss_agg_mode."""
    mode = read(config, "loss_agg_mode", "token-mean")
    if mode not in AGGREGATIONS:
        raise ValueError(f"loss_agg_mode must be one of {', '.join(AGGREGATIONS)}, got {mode!r}")
    if mode == "token-sum" and mode not in handled:
        raise ValueError(
            "loss_agg_mode='token-sum' has no denominator: pass normalizer=1 / dp_size to the loss and "
            "handled=('token-sum',)"
        )
    if mode.startswith("token"):
        return Reduce(per="token")
    if mode == "seq-mean-token-mean":
        return Reduce(count_empty=False)
    if mode == "seq-mean-token-sum":
        return Reduce(power=0.0, count_empty=False)
    length = read(config, "loss_scale_factor", None)
    if length is None and "loss_scale_factor" not in handled:
        raise ValueError(
            "loss_agg_mode='seq-mean-token-sum-norm' without loss_scale_factor divides by the padded width of each "
            "batch: set loss_scale_factor, or replace reduce.length and pass handled=('loss_scale_factor',)"
        )
    return Reduce(per="constant", length=1 if length is None else length, count_empty=False)


def _kl(config: Any) -> KL:
    """Map use_kl_loss and kl_loss_*; a suffix "+" takes the gradient of k2, unclamped."""
    if not read(config, "use_kl_loss", False):
        return KL()
    name = read(config, "kl_loss_type", "low_var_kl")
    plus = name.endswith("+")
    estimator = ESTIMATORS.get(name.removesuffix("+"))
    if estimator is None:
        raise ValueError(
            f"kl_loss_type must be one of {', '.join(ESTIMATORS)}, with or without '+', got {name!r}"
        )
    return KL(
        beta=read(config, "kl_loss_coef", 0.001),
        estimator=estimator,  # type: ignore[arg-type]
        gradient="k2" if plus else "path",
        clamp_in=20.0 if estimator == "k3" and not plus else None,
        clamp_out=10.0 if estimator == "k3" else None,
    )


def _threshold(name: str, value: Any) -> tuple[float | None, float]:
    """Read "upper" or "lower_upper"."""
    lower, separator, upper = str(value).partition("_")
    try:
        return (float(lower), float(upper)) if separator else (None, float(lower))
    except ValueError:
        raise ValueError(f"{name} must be a number or 'lower_upper', got {value!r}") from None


def _rollout_correction(settings: Any, mode: str) -> dict[str, Any]:
    """Importance weights and rejection between old policy and sampler, decided before the loss."""
    if settings is None:
        return {}
    level = read(settings, "rollout_is", None)
    changes: dict[str, Any] = {}
    if level is not None:
        if level not in ("token", "sequence"):
            raise ValueError(f"rollout_is must be token, sequence or None, got {level!r}")
        if mode == "geo_mean" and level == "token":
            raise ValueError(
                "rollout_is='token' with loss_mode='geo_mean' is not covered: verl pools the truncated token weights"
            )
        low, high = _threshold("rollout_is_threshold", read(settings, "rollout_is_threshold", 2.0))
        changes["correction"] = Correction(
            level="token" if level == "token" else "seq_sum",
            mode="truncate" if low is None else "mask",
            low=0.0 if low is None else low,
            high=high,
            normalize=read(settings, "rollout_is_batch_normalize", False),
            applies_to="policy_and_kl" if mode == "dro" else "policy",
        )
    changes["gates"] = _rejection(settings)
    return changes


def _rejection(settings: Any) -> tuple[Gate, ...]:
    """Map rollout_rs: rejected tokens leave the mask and the denominators.

    verl's k1 is -log(old / rollout) compared with log(lower) and log(upper): bounds on rollout / old.
    """
    names = [name.strip() for name in (read(settings, "rollout_rs", None) or "").split(",")]
    names = list(dict.fromkeys(filter(None, names)))
    if not names:
        return ()
    given = read(settings, "rollout_rs_threshold", None)
    limits = [part.strip() for part in str(given).split(",")] if given is not None else []
    if len(limits) == 1:
        limits *= len(names)
    if len(limits) != len(names):
        raise ValueError(f"rollout_rs_threshold must hold 1 or {len(names)} values, got {given!r}")
    gates = []
    for name, limit in zip(names, limits, strict=True):
        words: tuple[Any, str, Any] = name.rpartition("_")
        pool, _, stat = words
        if stat not in RS_STATS or pool not in RS_POOLS or name == "seq_max_k1":
            raise ValueError(f"rollout_rs option {name!r} is not known to verl 0.9")
        lower, upper = _threshold("rollout_rs_threshold", limit)
        if stat == "k1":
            lower = 1 / upper if lower is None else lower
            bounds = (-math.log(upper), -math.log(lower))
        elif lower is None:
            bounds = (-math.inf, upper)
        else:
            raise ValueError(
                f"rollout_rs_threshold of {name} must be one upper bound, got {limit!r}"
            )
        gates.append(
            Gate(
                stat=stat,
                low=bounds[0],
                high=bounds[1],
                between="old_rollout",
                pool=pool,
                scope="mask",
            )
        )
    return tuple(gates)


def _bypass(config: Any, settings: Any) -> dict[str, Any]:
    """Two policies: PPO's clip against the sampler, or REINFORCE under the current policy's importance weight."""
    if read(settings, "rollout_rs", None):
        raise ValueError(
            "rollout_rs in bypass mode is not covered: verl rejects by the current policy, denominators included"
        )
    kind = read(settings, "loss_type", "ppo_clip")
    if kind == "ppo_clip":
        return _policy(config, "vanilla")
    if kind != "reinforce":
        raise ValueError(
            f"rollout_correction.loss_type must be ppo_clip or reinforce, got {kind!r}"
        )
    if read(settings, "rollout_is_batch_normalize", False):
        raise ValueError("rollout_is_batch_normalize in bypass mode is not covered")
    level = read(settings, "rollout_is", None)
    if level is None:
        return _policy(config, "gpg")
    if level not in ("token", "sequence"):
        raise ValueError(f"rollout_is must be token, sequence or None, got {level!r}")
    low, high = _threshold("rollout_is_threshold", read(settings, "rollout_is_threshold", 2.0))
    cap = high if low is None else math.inf
    changes: dict[str, Any] = {
        "surrogate": "logp",
        "positive": (0.0, cap),
        "negative": (0.0, cap),
    }
    if level == "sequence":
        changes |= {"level": "seq_sum", "d_clamp": None, "pool_bounds": (-20.0, 20.0)}
    if low is not None:
        pool: Any = "token" if level == "token" else "seq_sum"
        changes["gates"] = (Gate(stat="k1", low=math.log(low), high=math.log(high), pool=pool),)
    return changes
