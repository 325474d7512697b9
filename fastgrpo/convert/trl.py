"""`trl.GRPOConfig` (TRL 1.15 and later) to `Objective`, with exactly TRL's clamps, bounds and reductions."""

import math
from collections.abc import Collection
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from fastgrpo.choices import KL, Correction, Gamma, Gate, Reduce, Sigmoid
from fastgrpo.objective import Objective


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Options that the objective is made of.
MAPPED = _names(
    "loss_type epsilon epsilon_high delta importance_sampling_level beta use_bias_correction_kl sapo_temperature_pos "
    "sapo_temperature_neg vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg max_completion_length "
    "off_policy_mask_threshold use_vllm vllm_importance_sampling_correction vllm_importance_sampling_mode "
    "vllm_importance_sampling_clip_min vllm_importance_sampling_clip_max vllm_importance_sampling_cap "
    "entropy_coef"
)
# Options that change the loss from outside the objective: `handled` says that the caller sees to them.
CALLER = _names(
    "top_entropy_quantile use_adaptive_entropy entropy_coef vllm_importance_sampling_correction"
)
# Options that act before the loss (advantages, masks, tokens, temperature, sampling) or after it (logging).
ELSEWHERE = _names(
    "reward_weights scale_rewards multi_objective_aggregation mask_truncated_completions num_generations "
    "num_generations_eval temperature top_p top_k min_p generation_kwargs chat_template_kwargs repetition_penalty "
    "cache_implementation model_init_kwargs trust_remote_code router_aux_loss_coef disable_dropout "
    "cast_lm_head_to_fp32 remove_unused_columns ds3_gather_for_generation shuffle_dataset pad_to_multiple_of "
    "generation_batch_size steps_per_generation num_iterations learning_rate vllm_mode vllm_model_impl "
    "vllm_enable_sleep_mode vllm_structured_outputs_regex vllm_server_base_url vllm_server_host vllm_server_port "
    "vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length "
    "vllm_tensor_parallel_size sync_ref_model ref_model_mixup_alpha ref_model_sync_steps entropy_coef_min "
    "entropy_coef_max entropy_coef_delta entropy_target max_tool_calling_iterations log_completions log_multimodal "
    "num_completions_to_print log_unique_prompts log_completions_hub_repo use_transformers_continuous_batching "
    "transformers_continuous_batching_config use_transformers_paged"
)
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LOSS_TYPES = (*CLIPPED, "cispo", "sapo", "vespo")
REDUCES = {
    "grpo": Reduce(),
    "sapo": Reduce(),
    "luspo": Reduce(power=0.0),
    "bnpo": Reduce(per="token"),
    "dapo": Reduce(per="token"),
    "cispo": Reduce(per="token"),
    "vespo": Reduce(per="token"),
}


def objective_from_trl(
    config: Any, *, handled: Collection[str] = (), sampler_scored: bool | None = None
) -> Objective:
    """Return the objective that a `trl.GRPOConfig` describes.

    TRL's normalisers are per micro-batch for grpo, sapo, luspo, bnpo and dr_grpo (pass `normalizer` = B or the live
    tokens, times the accumulation steps) and per optimizer step for dapo, cispo and vespo.

    Args:
        config: The configuration.
        handled: Options among `CALLER` that the caller applies itself, around the loss.
        sampler_scored: Whether the off-policy mask compares with the sampler's log-probs (`rollout_logprob`) instead
            of the old policy's; TRL does so where it has them. None: `config.use_vllm`.

    Raises:
        ValueError: An option is not covered, is missing, or is unknown and not at its default.

    Source: huggingface/trl, `GRPOTrainer._compute_loss` of 1.16.
    """
    unknown = sorted(set(handled) - CALLER)
    if unknown:
        raise ValueError(
            f"handled must name options among {', '.join(sorted(CALLER))}, got {unknown}"
        )
    _refuse_unknown(config)

    def read(name: str) -> Any:
        if not hasattr(config, name):
            raise ValueError(f"the TRL configuration has no option {name!r}: TRL >= 1.15 is needed")
        return getattr(config, name)

    loss_type, level = read("loss_type"), read("importance_sampling_level")
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, got {loss_type!r}")
    if level not in ("token", "sequence"):
        raise ValueError(f"importance_sampling_level must be token or sequence, got {level!r}")
    scored = read("use_vllm") if sampler_scored is None else sampler_scored
    objective = Objective(
        name=f"trl-{loss_type}",
        level="token" if level == "token" else "seq_mean",
        d_clamp=None,
        reduce=(
            Reduce(per="constant", length=read("max_completion_length"))
            if loss_type == "dr_grpo"
            else REDUCES[loss_type]
        ),
        kl=_kl(read, loss_type),
        gates=_gates(read("off_policy_mask_threshold"), scored),
        correction=_correction(read, handled),
        **_entropy(read, handled),
    )
    return objective.replace(**_policy(read, loss_type))


def _refuse_unknown(config: Any) -> None:
    """Raise on an option of TRL's own configuration class that this file has never heard of, unless at its default."""
    if not is_dataclass(config):
        return
    own = vars(type(config)).get("__annotations__", {})
    for field in fields(config):
        if field.name not in own or field.name in MAPPED | CALLER | ELSEWHERE:
            continue
        value = getattr(config, field.name)
        if value != _default(field):
            raise ValueError(
                f"{type(config).__name__}.{field.name} = {value!r} is not known to this version of fastgrpo; "
                "it may change the loss"
            )


def _default(field: "Field[Any]") -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _policy(read: Any, loss_type: str) -> dict[str, Any]:
    """The policy term of a loss type."""
    low = read("epsilon")
    high = low if read("epsilon_high") is None else read("epsilon_high")
    if loss_type == "cispo":
        return {"surrogate": "logp", "positive": (0.0, high), "negative": (0.0, high)}
    if loss_type == "sapo":
        tau = (read("sapo_temperature_pos"), read("sapo_temperature_neg"))
        return {"shape": Sigmoid(positive=tau[0], negative=tau[1])}
    if loss_type == "vespo":
        pairs = {
            sign: (read(f"vespo_k_{sign}"), max(read(f"vespo_lambda_{sign}"), 1e-4))
            for sign in ("pos", "neg")
        }
        return {
            "level": "seq_sum",
            "surrogate": "logp",
            "d_clamp": 20.0,
            "pool_bounds": (math.log(1e-8), 20.0),
            "shape": Gamma(positive=pairs["pos"], negative=pairs["neg"]),
        }
    clipped = Objective.grpo(epsilon=low, epsilon_high=high, delta=read("delta"))
    return {"positive": clipped.positive, "negative": clipped.negative}


def _kl(read: Any, loss_type: str) -> KL:
    """K3 without clamps, times the ratio where TRL corrects its bias."""
    beta, corrected = read("beta"), read("use_bias_correction_kl")
    if loss_type == "vespo" and beta and corrected:
        raise ValueError(
            "loss_type='vespo' with beta > 0 and use_bias_correction_kl=True is not covered: TRL weights its KL by the "
            "token's ratio, the policy term by the sequence's; set use_bias_correction_kl=False"
        )
    return KL(beta=beta, gradient="ratio" if corrected else "path", clamp_in=None)


def _gates(threshold: float | None, sampler_scored: bool) -> tuple[Gate, ...]:
    """Off-policy sequence mask: bad sequences whose mean log(sampler / policy) exceeds the threshold."""
    if threshold is None:
        return ()
    return (
        Gate(
            stat="k1",
            low=-threshold,
            between="theta_rollout" if sampler_scored else "theta_old",
            pool="seq_mean",
            when="negative",
        ),
    )


def _correction(read: Any, handled: Collection[str]) -> Correction | None:
    """Importance weights between the trainer and vLLM; NaN log-probs weigh 1."""
    name = "vllm_importance_sampling_correction"
    if not read("use_vllm") or not read(name) or name in handled:
        return None
    mode = read("vllm_importance_sampling_mode")
    level, separator, action = mode.rpartition("_")
    if not separator or level not in ("token", "sequence") or action not in ("truncate", "mask"):
        raise ValueError(
            "vllm_importance_sampling_mode must be token_truncate, token_mask, sequence_truncate or sequence_mask, "
            f"got {mode!r}"
        )
    low, high = (read(f"vllm_importance_sampling_clip_{end}") for end in ("min", "max"))
    return Correction(
        level="token" if level == "token" else "seq_sum",
        mode=action,
        low=0.0 if low is None else low,
        high=math.inf if high is None else high,
        log_clamp=None,
    )


def _entropy(read: Any, handled: Collection[str]) -> dict[str, Any]:
    """Entropy bonus: a mean over the tokens of the micro-batch, whatever the loss type's reduction is."""
    quantile = read("top_entropy_quantile")
    if quantile < 1.0 and "top_entropy_quantile" not in handled:
        raise ValueError(
            f"top_entropy_quantile = {quantile} is a mask over the whole batch, not an objective: pass "
            "token_weight=fastgrpo.masks.top_entropy_weight(...) and handled=('top_entropy_quantile',)"
        )
    if "entropy_coef" in handled:
        return {}
    if read("use_adaptive_entropy") and "use_adaptive_entropy" not in handled:
        raise ValueError(
            "use_adaptive_entropy=True changes entropy_coef at every step: replace `entropy_coef` of the objective "
            "yourself and pass handled=('use_adaptive_entropy',)"
        )
    coefficient = read("entropy_coef")
    if not coefficient:
        return {}
    if quantile < 1.0:
        raise ValueError(
            "entropy_coef with top_entropy_quantile < 1 is not covered: TRL takes the bonus over the masked tokens only"
        )
    return {"entropy_coef": coefficient, "entropy_reduce": Reduce(per="token")}
