"""`Objective.from_trl` + `policy_loss` against TRL's own `GRPOTrainer._compute_loss`, run from the installed source.

The method runs on a stub: everything it reads from `self` is set here, the log-probs come from a tensor instead of a
model. So loss, gradient and logged metrics are TRL's, and every option of the configuration goes through `from_trl`.
"""

from collections import defaultdict
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastgrpo import Objective, policy_loss
from fastgrpo.choices import Reduce
from fastgrpo.convert import objective_from_trl
from fastgrpo.convert import trl as convert
from tests.formulas import make_batch
from tests.test_losses import close

trl = pytest.importorskip(
    "trl", reason="TRL is not installed: pip install 'fastgrpo[integrations]'"
)
from trl import GRPOConfig  # noqa: E402
from trl.trainer.grpo_trainer import GRPOTrainer  # noqa: E402

ACCUMULATION, STEPS_PER_GENERATION, PROCESSES = 2, 4, 1
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
OPTIONS: dict[str, dict] = {
    "default": {},
    "asymmetric": {"epsilon": 0.1, "epsilon_high": 0.4},
    "delta": {"delta": 1.3},
    "delta-below-clip": {"delta": 0.95},
    "sequence": {"importance_sampling_level": "sequence"},
    "kl": {"beta": 0.04, "use_bias_correction_kl": False},
    "kl-corrected": {"beta": 0.04},
    "kl-corrected-sequence": {"beta": 0.04, "importance_sampling_level": "sequence"},
    "off-policy-mask": {"off_policy_mask_threshold": 0.05},
    "entropy": {"entropy_coef": 0.02},
    "vllm-default": {"use_vllm": True},
    "vllm-token-truncate": {
        "use_vllm": True,
        "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_clip_max": 1.2,
        "vllm_importance_sampling_clip_min": 0.8,
    },
    "vllm-token-mask-everything": {
        "use_vllm": True,
        "vllm_importance_sampling_mode": "token_mask",
        "vllm_importance_sampling_clip_max": 1.2,
        "off_policy_mask_threshold": 0.02,
        "beta": 0.1,
        "use_bias_correction_kl": False,
    },
    "vllm-off": {"use_vllm": True, "vllm_importance_sampling_correction": False},
}


class Accelerator:
    """One process; what `_compute_loss` asks of accelerate."""

    num_processes = PROCESSES
    sync_gradients = True

    def gather(self, x: Tensor) -> Tensor:
        return x

    gather_for_metrics = gather

    def reduce(self, x: Tensor, reduction: str) -> Tensor:
        return x


def make_config(tmp_path, **options: object) -> "GRPOConfig":
    return GRPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=6,
        num_generations=2,
        gradient_accumulation_steps=ACCUMULATION,
        steps_per_generation=STEPS_PER_GENERATION,
        max_completion_length=9,
        sapo_temperature_neg=1.0625,  # TRL rounds it to float32: take a number that float32 holds
        report_to=[],
        **options,
    )


def stub(config: "GRPOConfig", logprob: Tensor, entropy: Tensor) -> SimpleNamespace:
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    return SimpleNamespace(
        args=config,
        loss_type=config.loss_type,
        epsilon_low=config.epsilon,
        epsilon_high=high,
        beta=config.beta,
        importance_sampling_level=config.importance_sampling_level,
        off_policy_mask_threshold=config.off_policy_mask_threshold,
        top_entropy_quantile=config.top_entropy_quantile,
        max_completion_length=config.max_completion_length,
        use_vllm=config.use_vllm,
        vllm_importance_sampling_correction=config.vllm_importance_sampling_correction,
        entropy_coef=config.entropy_coef,
        use_adaptive_entropy=config.use_adaptive_entropy,
        _entropy_bonus_enabled=config.entropy_coef != 0 or config.use_adaptive_entropy,
        aux_loss_enabled=False,
        current_gradient_accumulation_steps=ACCUMULATION,
        accelerator=Accelerator(),
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprob, entropy, None),
    )


def importance_ratio(config: "GRPOConfig", old: Tensor, sampled: Tensor, mask: Tensor) -> Tensor:
    """The ratio that `_generate_and_score_completions` of 1.16 puts into the inputs."""
    diff = torch.nan_to_num((old - sampled) * mask, nan=0.0)
    mode = config.vllm_importance_sampling_mode
    ratio = (diff.sum(-1, keepdim=True) if mode.startswith("sequence") else diff).exp()
    low, high = config.vllm_importance_sampling_clip_min, config.vllm_importance_sampling_clip_max
    if mode.endswith("truncate"):
        return ratio.clamp(low, high)
    out = torch.zeros_like(ratio, dtype=torch.bool)
    if low is not None:
        out |= ratio < low
    if high is not None:
        out |= ratio > high
    return ratio.masked_fill(out, 0.0)


def normalizer(config: "GRPOConfig", mask: Tensor, num_items: Tensor) -> float:
    """TRL's denominator in the units of our reductions."""
    if config.loss_type in ("cispo", "dapo", "vespo"):
        return float(num_items) / PROCESSES * ACCUMULATION / STEPS_PER_GENERATION
    if config.loss_type == "bnpo":
        return float(mask.sum().clamp(min=1)) * ACCUMULATION
    return mask.shape[0] * ACCUMULATION


def run_both(config: "GRPOConfig", *, seed: int, per_token: bool = False, on_policy: bool = False):
    b = make_batch(seed=seed, per_token=per_token, noise=0.2)
    logprob = b.logprob.clamp(min=-4.0)
    g = torch.Generator().manual_seed(seed)
    old, ref, sampled = (
        logprob + 0.2 * torch.randn(logprob.shape, generator=g, dtype=torch.float64)
        for _ in range(3)
    )
    sampled[0, 1] = float("nan")  # vLLM could not score this token
    entropy = torch.rand(logprob.shape, generator=g, dtype=torch.float64) * 2
    advantage = b.advantage if per_token else b.advantage[:, 0]
    num_items = torch.tensor(61.0)
    inputs = {
        "prompt_ids": torch.zeros(6, 2, dtype=torch.int64),
        "prompt_mask": torch.ones(6, 2, dtype=torch.int64),
        "completion_ids": torch.zeros(6, 7, dtype=torch.int64),
        "completion_mask": torch.ones(6, 7, dtype=torch.int64),
        "tool_mask": b.mask.long(),
        "advantages": advantage,
        "num_items_in_batch": num_items,
        "ref_per_token_logps": ref,
    }
    if not on_policy:
        inputs["old_per_token_logps"] = old
    if config.use_vllm:
        inputs["sampling_per_token_logps"] = sampled
    if config.use_vllm and config.vllm_importance_sampling_correction:
        inputs["importance_sampling_ratio"] = importance_ratio(config, old, sampled, b.mask)
    theirs, their_entropy = logprob.clone().requires_grad_(), entropy.clone().requires_grad_()
    trainer = stub(config, theirs, their_entropy)
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()

    objective = Objective.from_trl(config)
    if objective.entropy_coef:  # TRL divides the bonus by the accumulation steps
        objective = objective.replace(entropy_coef=objective.entropy_coef / ACCUMULATION)
    ours, our_entropy = logprob.clone().requires_grad_(), entropy.clone().requires_grad_()
    out = policy_loss(
        ours, advantage, b.mask, old_logprob=None if on_policy else old, ref_logprob=ref,
        rollout_logprob=sampled if config.use_vllm else None, entropy=our_entropy,
        objective=objective, normalizer=normalizer(config, b.mask, num_items),
    )  # fmt: skip
    out.loss.backward()
    return SimpleNamespace(
        loss=loss.detach(), grad=theirs.grad, entropy_grad=their_entropy.grad,
        metrics=trainer._metrics["train"], out=out, our_grad=ours.grad,
        our_entropy_grad=our_entropy.grad, mask=b.mask,
    )  # fmt: skip


CASES = [
    (loss_type, option)
    for loss_type in LOSS_TYPES
    for option in OPTIONS
    if not (loss_type == "vespo" and option.startswith(("kl-corrected", "vllm-default")))
]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("loss_type", "option"), CASES)
def test_loss_gradient_and_metrics_equal_trl(loss_type, option, tmp_path):
    config = make_config(tmp_path, loss_type=loss_type, **OPTIONS[option])
    number = CASES.index((loss_type, option))
    r = run_both(config, seed=number, per_token=number % 3 == 1 and loss_type != "vespo")
    close(r.out.loss.detach(), r.loss, "loss")
    close(r.our_grad, r.grad, "gradient")
    if option == "entropy":
        close(r.our_entropy_grad, r.entropy_grad, "entropy gradient")
    got = r.out.metrics
    assert got["entropy"].item() == pytest.approx(r.metrics["entropy"][0], rel=1e-6)
    if config.beta:
        assert got["kl"].item() == pytest.approx(r.metrics["kl"][0], rel=1e-6)
    # TRL counts sequences at sequence level, and sees the ratio after delta: the adapter recomputes those.
    token_level = option not in ("sequence", "kl-corrected-sequence", "delta-below-clip")
    if loss_type in convert.CLIPPED and token_level:
        for name in ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"):
            assert got[name].item() == pytest.approx(r.metrics[name][0], rel=1e-6, abs=1e-9)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_on_policy_without_old_logprobs(loss_type, tmp_path):
    r = run_both(make_config(tmp_path, loss_type=loss_type), seed=3, on_policy=True)
    close(r.out.loss.detach(), r.loss, "loss")
    close(r.our_grad, r.grad, "gradient")


# Options -------------------------------------------------------------------------------------------------------------


def test_every_option_of_the_installed_configuration_is_classified():
    own = {f.name for f in fields(GRPOConfig) if f.name in vars(GRPOConfig)["__annotations__"]}
    known = convert.MAPPED | convert.CALLER | convert.ELSEWHERE
    assert own <= known, f"new in TRL {trl.__version__}: {sorted(own - known)}"


REFUSED: dict[str, tuple[dict, str]] = {
    "loss_type": ({"loss_type": "real"}, "loss_type must be one of"),
    "level": ({"importance_sampling_level": "sequence_token"}, "importance_sampling_level"),
    "quantile": ({"top_entropy_quantile": 0.2}, "top_entropy_quantile"),
    "adaptive": ({"use_adaptive_entropy": True}, "use_adaptive_entropy"),
    "vespo-kl": ({"loss_type": "vespo", "beta": 0.1}, "use_bias_correction_kl"),
    "mode": (
        {"use_vllm": True, "vllm_importance_sampling_mode": "geometric_mask"},
        "vllm_importance_sampling_mode",
    ),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_an_option_that_is_not_covered_is_named(name, tmp_path):
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        Objective.from_trl(make_config(tmp_path, **options))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_handled_options_are_left_to_the_caller(tmp_path):
    config = make_config(
        tmp_path, top_entropy_quantile=0.2, entropy_coef=0.1, use_adaptive_entropy=True
    )
    handled = ("top_entropy_quantile", "entropy_coef", "use_adaptive_entropy")
    assert objective_from_trl(config, handled=handled).entropy_coef == 0.0
    with pytest.raises(ValueError, match="entropy_coef with top_entropy_quantile"):
        objective_from_trl(config, handled=handled[::2])
    with pytest.raises(ValueError, match="handled must name"):
        objective_from_trl(config, handled=("beta",))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_unknown_option_raises_unless_at_its_default(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "ELSEWHERE", convert.ELSEWHERE - {"mask_truncated_completions"})
    assert Objective.from_trl(make_config(tmp_path)).reduce == Reduce(per="token")
    with pytest.raises(ValueError, match="mask_truncated_completions = True is not known"):
        Objective.from_trl(make_config(tmp_path, mask_truncated_completions=True))


def test_a_missing_option_is_named():
    with pytest.raises(ValueError, match="no option 'loss_type'"):
        Objective.from_trl(SimpleNamespace())
