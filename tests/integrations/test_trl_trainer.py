"""TRL's own trainers on tiny models, once with TRL's head and once with fastgrpo: every logged number must agree.

The same seed gives the same prompts and completions, so losses, gradient norms and metrics of three optimizer steps are
compared one by one, in float32 to 1e-6.
"""

import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: pip install 'fastgrpo[integrations]'")
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import utils

import fastgrpo.integrations.trl as door
from fastgrpo.integrations.trl_loss import LossRequest
from tests.integrations import tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
# Wall-clock readings; everything else that TRL logs is compared.
TIMES = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
TIMES |= {"total_flos", "mfu", "tokens_per_second"}
CORE: dict[str, dict] = {
    "dapo": {},
    "grpo-beta-iterations": {"loss_type": "grpo", "beta": 0.1, "num_iterations": 2},
    "vespo": {"loss_type": "vespo"},
    "dr_grpo-entropy": {"loss_type": "dr_grpo", "entropy_coef": 0.05},
    "bnpo-top-entropy-delta": {
        "loss_type": "bnpo",
        "top_entropy_quantile": 0.5,
        "delta": 1.5,
        "num_iterations": 2,
    },
    "accumulation-temperature": {"gradient_accumulation_steps": 2, "temperature": 0.7},
    "gemma2-gspo": {
        "model": "gemma2",
        "importance_sampling_level": "sequence",
        "loss_type": "grpo",
        "num_iterations": 2,
    },
    "lora": {"model": "llama", "lora": True, "beta": 0.05},
}
MORE: dict[str, dict] = {
    "sapo": {"loss_type": "sapo", "num_iterations": 2},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0, "num_iterations": 2},
    "luspo-sequence": {
        "loss_type": "luspo",
        "importance_sampling_level": "sequence",
        "num_iterations": 2,
    },
    "off-policy-mask": {"off_policy_mask_threshold": 0.01, "num_iterations": 3},
    "adaptive-entropy": {
        "use_adaptive_entropy": True,
        "entropy_target": 5.0,
        "entropy_coef": 0.01,
        "gradient_accumulation_steps": 2,
    },
    "checkpointing": {"gradient_checkpointing": True, "model": "llama"},
    "scale-batch": {"scale_rewards": "batch"},
    "scale-none-truncated": {"scale_rewards": "none", "mask_truncated_completions": True},
    "normalise-then-sum": {"multi_objective_aggregation": "normalize_then_sum", "rewards": 2},
    "fp32-head": {"cast_lm_head_to_fp32": True, "model": "llama"},
    "moe": {"model": "qwen3_moe", "router_aux_loss_coef": 0.01},
    "generations-of-two-steps": {
        "steps_per_generation": 4,
        "gradient_accumulation_steps": 2,
        "loss_type": "dapo",
    },
    "kl-uncorrected-gemma2": {
        "model": "gemma2",
        "beta": 0.1,
        "use_bias_correction_kl": False,
        "loss_type": "grpo",
    },
    "sync-ref": {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1},
    "padded-multiple": {"pad_to_multiple_of": 8},
    "sequence-kl-entropy": {
        "importance_sampling_level": "sequence",
        "beta": 0.05,
        "entropy_coef": 0.01,
        "loss_type": "luspo",
        "num_iterations": 2,
    },
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny.save_model(kind, folder) for kind in tiny.CONFIGS}


@pytest.fixture(autouse=True)
def _trl_is_left_as_it_was():
    before = utils._ChunkedLogProbFunction
    yield
    door.disable()
    assert utils._ChunkedLogProbFunction is before


def make_trainer(trainer_class, models: dict[str, str], folder: Path, options: dict, **extra):
    options = dict(options)
    kind, lora = options.pop("model", "qwen2"), options.pop("lora", False)
    rewards = [tiny.reward] * options.pop("rewards", 1)
    steps = options.pop("max_steps", 3)
    config = GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=options.pop("bf16", False),
        per_device_train_batch_size=options.pop("per_device_train_batch_size", 4),
        num_generations=4,
        max_completion_length=6,
        max_steps=steps,
        logging_steps=1,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        save_strategy=options.pop("save_strategy", "no"),
        seed=3,
        **options,
    )
    if lora:
        from peft import LoraConfig

        extra["peft_config"] = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    return trainer_class(
        model=models[kind],
        reward_funcs=rewards,
        args=config,
        train_dataset=tiny.prompts(),
        processing_class=tiny.tokenizer(),
        **extra,
    )


def history(trainer, **train: object) -> list[dict[str, float]]:
    trainer.train(**train)
    return trainer.state.log_history


def assert_same(ours: list[dict], theirs: list[dict], tolerance: float = 1e-6) -> None:
    assert len(ours) == len(theirs)
    compared = 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - TIMES:
            if a[name] is None and b[name] is None:  # TRL's minimum over no sequence
                continue
            x, y = float(a[name]), float(b[name])
            same = math.isclose(x, y, rel_tol=tolerance, abs_tol=tolerance)
            assert same or (math.isnan(x) and math.isnan(y)), f"{name}: {x!r} want {y!r}"
            compared += 1
    assert compared >= 20


def compare(models, tmp_path, options: dict, trainer_class) -> tuple[object, object]:
    theirs = make_trainer(GRPOTrainer, models, tmp_path / "theirs", options)
    wanted = history(theirs)
    assert any(abs(float(log.get("grad_norm", 0.0))) > 1e-4 for log in wanted), (
        "nothing was learned"
    )
    ours = make_trainer(trainer_class, models, tmp_path / "ours", options)
    before = door.report()
    assert_same(history(ours), wanted)
    served = door.report()
    assert served["fastgrpo"] > before["fastgrpo"]
    assert served["trl"] == before["trl"]
    return ours, theirs


class Enabled(GRPOTrainer):
    """GRPOTrainer trained with the door open."""

    def train(self, *args: object, **kwargs: object):
        with door.use_fastgrpo():
            return super().train(*args, **kwargs)


# The trainer whose loss is one pass through the head; `delegates` names the options it leaves to TRL.
@pytest.mark.parametrize("name", CORE)
def test_fast_trainer_logs_what_trl_logs(name, models, tmp_path):
    ours, _ = compare(models, tmp_path, CORE[name], door.FastGRPOTrainer)
    reason = ours.delegates
    assert (reason is None) == ("top_entropy_quantile" not in CORE[name]), reason


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_fast_trainer_on_further_configurations(name, models, tmp_path):
    ours, _ = compare(models, tmp_path, MORE[name], door.FastGRPOTrainer)
    assert ours.delegates is None


# Every one of them runs in the slow suite; three here say that the symbol itself works.
@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("dapo", "gemma2-gspo", "lora")
        else pytest.param(name, marks=pytest.mark.slow)
        for name in CORE
    ],
)
def test_the_door_changes_nothing_but_the_kernel(name, models, tmp_path):
    compare(models, tmp_path, CORE[name], Enabled)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_the_door_on_further_configurations(name, models, tmp_path):
    compare(models, tmp_path, MORE[name], Enabled)


# What a laptop cannot produce by itself: a sampler's log-probs, tool results, rows compacted as on a GPU -------------


def scripted_rollout(prompts: list[str], trainer: GRPOTrainer) -> dict[str, list]:
    """Completions from the prompt alone, with log-probs of a sampler and tool results that are not trained on."""
    seen: dict[str, int] = {}
    found: dict[str, list] = {
        "prompt_ids": [],
        "completion_ids": [],
        "logprobs": [],
        "env_mask": [],
    }
    for prompt in prompts:
        turn = seen[prompt] = seen.get(prompt, -1) + 1
        ids = trainer.processing_class(prompt)["input_ids"]
        first = sum(ids) + 5 * turn
        completion = [3 + (first + 7 * k) % 33 for k in range(3 + first % 3)] + [1]
        found["prompt_ids"].append(ids)
        found["completion_ids"].append(completion)
        found["logprobs"].append([-2.0 - 0.3 * ((first + k) % 4) for k in range(len(completion))])
        found["env_mask"].append([int(k % 3 != 1) for k in range(len(completion))])
    return found


SLOW = pytest.mark.slow


@pytest.mark.parametrize("loss_type", ["dapo", pytest.param("grpo", marks=SLOW)])
def test_tool_results_and_a_samplers_log_probs(loss_type, models, tmp_path):
    """The tool mask leaves tokens out of the loss that are still scored; the off-policy mask asks the sampler."""
    options = {
        "loss_type": loss_type,
        "off_policy_mask_threshold": 0.3,
        "entropy_coef": 0.01,
        "beta": 0.05,
    }
    theirs = make_trainer(
        GRPOTrainer, models, tmp_path / "theirs", options, rollout_func=scripted_rollout
    )
    wanted = history(theirs)
    ours = make_trainer(
        door.FastGRPOTrainer, models, tmp_path / "ours", options, rollout_func=scripted_rollout
    )
    assert_same(history(ours), wanted)
    assert ours.delegates is None


def as_if_sampled_by_vllm(mode: str):
    """A mixin that adds to each micro-batch what TRL adds under vLLM; vLLM itself has no CPU wheel."""

    class Sampled:
        def _compute_loss(self, model, inputs):
            self.use_vllm = self.args.use_vllm = True
            self.args.vllm_importance_sampling_mode = mode
            self.args.vllm_importance_sampling_clip_max = 1.3
            mask = inputs["completion_mask"]
            with torch.no_grad():
                ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
                attention = torch.cat([inputs["prompt_mask"], mask], 1)
                old, _, _ = self._get_per_token_logps_and_entropies(
                    model, ids, attention, mask.shape[1]
                )
            g = torch.Generator().manual_seed(int(ids.sum()))
            diff = 0.2 * torch.randn(old.shape, generator=g) * mask
            weight = (diff.sum(-1, keepdim=True) if mode.startswith("sequence") else diff).exp()
            if mode.endswith("mask"):
                weight = weight.masked_fill(weight > 1.3, 0.0)
            sampled = {
                "old_per_token_logps": old,
                "sampling_per_token_logps": old - diff,
                "importance_sampling_ratio": weight.clamp(max=1.3),
            }
            try:
                return super()._compute_loss(model, {**inputs, **sampled})
            finally:
                self.use_vllm = False  # generation stays with transformers

    return Sampled


@pytest.mark.parametrize(
    ("loss_type", "mode"),
    [
        ("dapo", "sequence_mask"),
        ("vespo", "token_truncate"),
        pytest.param("grpo", "token_truncate", marks=SLOW),
        pytest.param("vespo", "token_mask", marks=SLOW),
    ],
)
def test_importance_weights_of_vllm(loss_type, mode, models, tmp_path):
    mixin, options = as_if_sampled_by_vllm(mode), {"loss_type": loss_type}
    runs = []
    for base in (GRPOTrainer, door.FastGRPOTrainer):
        trainer = make_trainer(
            type("Run", (mixin, base), {}), models, tmp_path / base.__name__, options
        )
        runs.append(history(trainer))
    assert trainer.delegates is None
    assert_same(runs[1], runs[0])


@pytest.mark.parametrize(
    "name", ["gemma2-gspo", pytest.param("dapo", marks=SLOW), pytest.param("lora", marks=SLOW)]
)
def test_rows_compacted_as_on_a_gpu(name, models, tmp_path, monkeypatch):
    """TRL sends only the scored rows to the head on CUDA: the packed form of the request."""
    wanted = history(make_trainer(GRPOTrainer, models, tmp_path / "theirs", CORE[name]))
    ours = make_trainer(door.FastGRPOTrainer, models, tmp_path / "ours", CORE[name])
    monkeypatch.setattr(utils, "_use_triton", lambda device: True)
    packed = []
    original = LossRequest._packed
    monkeypatch.setattr(
        LossRequest, "_packed", lambda self, x: packed.append(1) or original(self, x)
    )
    assert_same(history(ours), wanted)
    assert packed, "the request was not served in its packed form"
