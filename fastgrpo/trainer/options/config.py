"""Every option of a run, as one frozen record. Where TRL has an option of the same meaning, it has the same name here.

The string under a field is its help text on the command line. Nothing here imports torch.
"""

from dataclasses import dataclass, fields
from typing import Annotated, Literal

import tyro

ObjectiveName = Literal[
    "grpo", "dr_grpo", "dapo", "bnpo", "gspo", "gspo_token", "luspo", "gmpo", "cispo", "sapo", "vespo",
    "rloo", "reinforce", "gpg", "topr", "dppo_tv", "dppo_kl", "ppo",
]  # fmt: skip
WITH_EPSILON = (
    "grpo", "dr_grpo", "dapo", "bnpo", "gspo", "gspo_token", "luspo", "gmpo", "rloo", "ppo",
)  # fmt: skip
FOR_PPO = ("gamma", "lam", "vf_coef", "cliprange_value")


def option(name: str) -> str:
    """How a field is written on the command line."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Options of `fastgrpo train`."""

    job: Annotated[str, tyro.conf.Suppress] = "story"
    """What to train on."""
    # Where and how it runs
    output_dir: str | None = None
    """Folder for everything the run leaves. Default: runs/<job>, or the next free runs/<job>-2, -3, ..."""
    overwrite: bool = False
    """Replace the run that `output_dir` holds; without it such a folder is refused."""
    seed: int = 0
    """Seeds data, initial weights and sampling. The same seed gives the same run on the same machine."""
    threads: int = 1
    """CPU threads. One is right for the small jobs: more is slower whenever the machine does anything else."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""
    cache_base: bool = True
    """Reuse the base model that an earlier run with the same options has made."""

    # Data and model
    data: str | None = None
    """File of the job's data, for gsm8k-equations and gsm8k (.jsonl) and custom (.jsonl, .json, .csv, .parquet)."""
    test_data: str | None = None
    """File to test on, of the same kind; without it a part of `data` is held out."""
    model_name_or_path: str | None = None
    """Folder of a model that `save_pretrained` wrote, to start from instead of making a base."""

    use_peft: bool = False
    """Train a LoRA adapter instead of all weights (needs --model-name-or-path; docs/long_runs.md)."""
    lora_r: int = 16
    """Rank of the adapter's matrices."""
    lora_alpha: int = 32
    """The adapter's update is scaled by lora_alpha / lora_r."""
    lora_target_modules: str | None = None
    """Linear layers that get an adapter, with commas between, or all-linear. Default: peft's for the architecture."""
    bf16: bool = False
    """Compute in bfloat16. Weights that are trained and their moments stay float32; those of an adapter's model and of
    the sampler's copy are kept in bfloat16."""
    gradient_checkpointing: bool = False
    """Keep no activations inside a block: backward computes them again. Less memory, about a third more time."""

    # Rewards (docs/trainer.md)
    reward: str | None = None
    """What completions are rewarded for, several with commas between: a reward of the job (exact_answer), think_format,
    soft_overlong, math_verify, or your own as file.py:function or module:function with TRL's signature. Default: the
    job's own."""
    reward_weights: str | None = None
    """Weights of the rewards, with commas between. Default: 1 each."""
    reward_timeout: float = 60.0
    """Seconds that your reward function may take for a batch (or for `refit`) before its process is killed."""
    on_reward_fault: Literal["stop", "skip"] = "stop"
    """When a reward function fails: stop, or skip its scores and say so."""

    # Making the base model: supervised fine-tuning on worked examples
    sft_steps: int = 1200
    """Steps of supervised fine-tuning; 0 starts from random weights."""
    sft_batch_size: int = 32
    """Examples per SFT step."""
    sft_learning_rate: float = 4e-3
    """Peak learning rate of SFT (AdamW's; Muon's is 2.5 times it); warms up over 50 steps, then falls to 2 %."""

    # GRPO: sampling
    max_steps: int = 50
    """GRPO steps: each samples fresh completions once."""
    prompts_per_step: int = 16
    """Questions per step; the batch is prompts_per_step x num_generations completions."""
    num_generations: int = 8
    """Completions per question (the group size G)."""
    max_completion_length: int = 40
    """Longest completion in tokens; a longer one is cut and earns nothing from the built-in rewards."""
    temperature: float = 1.0
    """Temperature of sampling. Training uses log-probabilities at the same temperature."""
    sampler: Literal["auto", "kv", "transformers", "vllm"] = "auto"
    """kv: our own with a KV cache (Llama, Qwen2, Qwen3); transformers: `generate`; auto: kv wherever it can serve;
    vllm: servers that are running already (docs/trainer.md says how to start them)."""
    vllm_server_base_url: str | None = None
    """Servers of --sampler vllm: http://HOST:PORT, several with commas between."""
    vllm_server_timeout: float = 240.0
    """Seconds without an answer after which a vLLM server counts as dead: when the run starts, and for the samples of
    any one prompt."""
    vllm_importance_sampling_correction: bool = False
    """Weigh every token by the policy's probability over that of the sampler (any sampler, not only vLLM), bounded as
    the next two options say. Costs one more forward pass; worth it where the two compute differently, as vLLM does."""
    vllm_importance_sampling_mode: Literal[
        "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ] = "token_truncate"
    """The weight of a token, or of its whole completion; above the bound it is cut (truncate) or set to 0 (mask)."""
    vllm_importance_sampling_clip_max: float = 3.0
    """The bound."""

    # GRPO: objective
    objective: ObjectiveName = "grpo"
    """The loss; each has its paper's clip bounds, reduction and advantage."""
    beta: float = 0.04
    """Weight of the KL term towards the reference model; 0 needs no reference and runs none."""
    epsilon: float | None = None
    """Clip range below 1 (and above, unless epsilon_high is given). Default: the objective's own."""
    epsilon_high: float | None = None
    """Clip range above 1."""
    num_iterations: int = 1
    """Updates per sampled batch (mu of Algorithm 1)."""
    supervision: Literal["outcome", "process"] = "outcome"
    """process: reward every line of the working (jobs that can: story), not only the final answer."""
    scale_rewards: Literal["group", "batch", "none"] | None = None
    """What advantages are divided by: the standard deviation in the group, in the batch, or nothing. Default: the
    objective's own (group for GRPO; batch for PPO, whose advantages are then shifted to mean 0 as well)."""
    drop_zero_advantage: bool = False
    """Leave completions of zero advantage out of training. Faster late in a run, but while beta > 0 their KL term goes
    too, so the update is not the paper's. With beta = 0 they are always left out: the update is the same."""
    steps_per_generation: int = 1
    """Mini-batches (updates) that a sampled batch is divided into, whole groups at a time; each is seen num_iterations
    times."""
    ref_sync_steps: int = 0
    """Iterative GRPO: every so many steps the policy becomes the reference, and rewards that have `refit` are trained
    further. 0 keeps the first reference."""

    # PPO (--objective ppo): a value model instead of groups; beta is the weight of the KL in the reward
    gamma: float = 1.0
    """Discount of later rewards."""
    lam: float = 0.95
    """Weight of longer returns in generalised advantage estimation: 0 trusts the value model, 1 the rewards alone."""
    vf_coef: float = 0.1
    """Weight of the value loss beside the policy's. One max_grad_norm holds for both together."""
    cliprange_value: float | None = 0.2
    """How far a value may move from what it was when the batch was sampled; none: any way."""

    # GRPO: optimiser
    learning_rate: float = 1e-4
    """Peak learning rate of GRPO. 1e-3 damages small models within 60 steps."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up."""
    warmup_steps: int = 5
    """Steps over which the learning rate rises from 0."""
    adam_beta1: float = 0.9
    """AdamW's first decay rate."""
    adam_beta2: float = 0.99
    """AdamW's second decay rate."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; keeps a single KL spike from doing harm."""
    per_device_train_batch_size: int = 64
    """Completions per forward and backward pass. It changes speed and memory, not the result."""

    # Evaluation and output
    eval_questions: int = 512
    """Held-out questions of the evaluations of the base and of the final model, all if there are fewer; 0: none."""
    eval_samples: int = 8
    """Samples per question behind pass@1, maj@k and pass@k (k = this number)."""
    eval_temperature: float = 1.0
    """Temperature of those samples."""
    eval_steps: int = 10
    """A small evaluation on other held-out questions every so many steps, for the curve; 0: none."""
    # Long runs (docs/long_runs.md)
    save_steps: int = 10
    """Checkpoint every so many GRPO steps, and after the last; 0: only when a signal asks for one."""
    save_total_limit: int = 2
    """Checkpoints to keep; 0 keeps all."""
    async_save: bool = False
    """Write checkpoints in the background: training waits only while the state is copied, which takes as much memory
    again."""
    resume: str = "never"
    """auto: go on from the newest whole checkpoint in output_dir, or begin if there is none; never: refuse a folder
    that holds a run; or the path of a run or of one of its checkpoints."""
    check_resume: bool = False
    """Instead of training: run 4 steps, go back to the checkpoint after 2, and compare all bits of both ends."""
    max_bad_steps: int = 3
    """Updates in a row whose loss or gradient is not finite (they are skipped) before the run stops."""
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    """Under torchrun: ddp gives every process the whole model, fsdp2 a share of it."""
    sampling_streams: int = 0
    """Independent streams of random numbers that a step's questions are divided among. Default: one per process. Any
    number of processes up to it samples the same completions."""
    dead_rank_seconds: float = 30.0
    """Without a sign of life for so long, a process counts as dead and the others end."""

    logging_steps: int = 1
    """Steps between lines of metrics.jsonl."""
    report: bool = True
    """Write report.html at the end."""
    completions_to_show: int = 3
    """Questions whose completions the report shows, before and after."""

    def __post_init__(self) -> None:
        """Reject what cannot be meant, naming the option."""
        at_least_1 = (
            "threads sft_batch_size prompts_per_step max_completion_length num_iterations eval_samples "
            "per_device_train_batch_size logging_steps steps_per_generation max_bad_steps lora_r lora_alpha"
        )
        at_least_0 = (
            "sft_steps max_steps ref_sync_steps warmup_steps eval_questions eval_steps completions_to_show "
            "save_steps save_total_limit sampling_streams beta weight_decay"
        )
        above_0 = (
            "temperature eval_temperature learning_rate sft_learning_rate max_grad_norm dead_rank_seconds "
            "reward_timeout vllm_server_timeout vllm_importance_sampling_clip_max"
        )
        for name in at_least_1.split():
            self._require(name, getattr(self, name) >= 1, "must be at least 1")
        for name in at_least_0.split():
            self._require(name, getattr(self, name) >= 0, "must be at least 0")
        for name in above_0.split():
            self._require(name, getattr(self, name) > 0, "must be above 0")
        rule = "must be 0 with --use-peft: the reference is the model without its adapter"
        self._require("ref_sync_steps", not (self.use_peft and self.ref_sync_steps), rule)
        rule = "must name servers under --sampler vllm, and nothing otherwise"
        named = self.vllm_server_base_url is not None
        self._require("vllm_server_base_url", named == (self.sampler == "vllm"), rule)
        for name in ("steps_per_generation", "sampling_streams"):
            fits = getattr(self, name) <= self.prompts_per_step
            self._require(
                name, fits, f"must be at most {self.prompts_per_step} (--prompts-per-step)"
            )
        if self.objective == "ppo":
            self._check_ppo()
        else:
            rule = "must be at least 2: a completion is compared with others of its group"
            self._require("num_generations", self.num_generations >= 2, rule)
            for field in fields(self):
                own = field.name not in FOR_PPO or getattr(self, field.name) == field.default
                self._require(field.name, own, "belongs to --objective ppo")
        for name in ("epsilon", "epsilon_high"):
            value = getattr(self, name)
            if value is not None:
                rule = f"does not belong to --objective {self.objective}"
                self._require(name, self.objective in WITH_EPSILON, rule)
                self._require(name, value >= 0, "must be at least 0")
        # Below a ratio of 0 there is nothing to clip; gmpo clips the ratio's logarithm instead.
        below_1 = self.epsilon is None or self.epsilon < 1 or self.objective == "gmpo"
        self._require("epsilon", below_1, "must be below 1")

    def _check_ppo(self) -> None:
        self._require("num_generations", self.num_generations >= 1, "must be at least 1")
        for name in ("gamma", "lam"):
            self._require(name, 0 <= getattr(self, name) <= 1, "must be in [0, 1]")
        self._require("vf_coef", self.vf_coef >= 0, "must be at least 0")
        bounded = self.cliprange_value is None or self.cliprange_value > 0
        self._require("cliprange_value", bounded, "must be above 0")
        rule = "belongs to objectives that compare the completions of a group"
        self._require("scale_rewards", self.scale_rewards != "group", rule)
        rule = "must be off under --objective ppo: the value model learns from every completion"
        self._require("drop_zero_advantage", not self.drop_zero_advantage, rule)
        rule = "does not belong to --objective ppo, which clips by epsilon on both sides"
        self._require("epsilon_high", self.epsilon_high is None, rule)

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"{option(name)} {rule}, got {getattr(self, name)!r}")
