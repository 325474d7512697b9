"""The parts of a run, put together from its options."""

import ctypes
import platform
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from fastgrpo.functional.devices import pick_device
from fastgrpo.trainer.adapter import add_adapter, base_of, identity, merge_adapter
from fastgrpo.trainer.algorithm import make_objective
from fastgrpo.trainer.data.text import prompt_ids
from fastgrpo.trainer.options.config import TrainConfig
from fastgrpo.trainer.options.inputs import check_inputs, model_folder
from fastgrpo.trainer.options.jobs import make_task
from fastgrpo.trainer.parallel.distributed import Ranks
from fastgrpo.trainer.policy import Policy, recompute_blocks
from fastgrpo.trainer.rewards.scoring import Rewards, make_rewards
from fastgrpo.trainer.sampling.rollout import Sampler, SamplerError
from fastgrpo.trainer.sampling.sampler import make_sampler
from fastgrpo.trainer.sampling.vllm_sampler import VLLMSampler, connect
from fastgrpo.trainer.sampling.vllm_server import VLLMServer
from fastgrpo.trainer.tasks.base import Problem, Task

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
PROBES = 4  # prompts that vLLM servers are checked with
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""How folders are read: a folder can neither bring code of its own nor send us to a hub."""


@dataclass(slots=True)
class Run:
    """A policy and what it is trained on."""

    config: TrainConfig
    task: Task
    tokenizer: PreTrainedTokenizerBase
    policy: Policy
    device: torch.device
    ranks: Ranks = field(default_factory=Ranks)
    sampled: Any = None  # the model that samplers read, where it is not the policy's own (FSDP2)
    base_sha256: str | None = None  # of the model that an adapter changes
    servers: Sequence[VLLMServer] = ()
    rewards: Rewards = field(init=False)

    def __post_init__(self) -> None:
        """Find the rewards that the options name."""
        self.rewards = make_rewards(self.config, self.task.rewards(self.tokenizer.eos_token_id))

    def sampler(self, seed: int, ranks: Ranks | None = None) -> Sampler:
        """A sampler of the present policy with random numbers of its own, refreshed by `ranks` together (None: by this
        process alone).
        """
        model = self.policy.model if self.sampled is None else self.sampled
        if self.servers:
            return VLLMSampler(
                model,
                self.servers,
                eos_id=self.tokenizer.eos_token_id,
                seed=seed,
                temperature=self.config.temperature,
                probes=prompt_ids(
                    self.tokenizer, self.task.sample("train", random.Random(0), PROBES)
                ),
                folder=self.config.output_dir,
                ranks=ranks,
            )
        return make_sampler(
            model,
            kind=self.config.sampler,
            eos_id=self.tokenizer.eos_token_id,
            pad_id=self.tokenizer.pad_token_id,
            seed=seed,
        )

    def held_out(self, split: str, n: int) -> list[Problem]:
        """Questions of a split, by the seed alone; fewer if there are not as many, none if none has an answer."""
        found = self.task.sample(split, random.Random(f"{split} {self.config.seed}"), n)
        return [problem for problem in found if problem.answer]


def make_run(config: TrainConfig, ranks: Ranks | None = None) -> Run:
    """Task, tokenizer, model and sampler; the model has random weights unless the options name one.

    Raises:
        ValueError: Something that the options name is not there or cannot be used.
    """
    check_inputs(config)
    make_objective(config)
    disable_progress_bar()  # the run has its own
    torch.set_num_threads(config.threads)
    keep_freed_memory()
    for seed in (torch.manual_seed, random.seed, np.random.seed):  # rewards may draw from any
        seed(config.seed)
    device = pick_device(config.device)
    task = make_task(config)
    if config.model_name_or_path is None:
        tokenizer: PreTrainedTokenizerBase = task.tokenizer()
        model: Any = LlamaForCausalLM(task.model.llama_config(task.tokenizer()))
    else:
        half = config.bf16 and config.use_peft  # trained weights are float32, these will not be
        tokenizer, model = load_pretrained(
            config.model_name_or_path, torch.bfloat16 if half else torch.float32
        )
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
    if config.use_peft:
        add_adapter(model, config)
    if config.gradient_checkpointing:
        recompute_blocks(model)
    policy = Policy(model.to(device), config.temperature, config.bf16)
    policy.eval()  # no dropout: the sampler has none
    run = Run(config, task, tokenizer, policy, device, ranks or Ranks())
    if config.use_peft:
        run.base_sha256 = identity(Path(model.name_or_path))
    if config.vllm_server_base_url is not None:
        try:
            run.servers = connect(
                config.vllm_server_base_url, config.vllm_server_timeout, model.config.vocab_size
            )
        except SamplerError as error:
            raise ValueError(str(error)) from None
    return run


def load_pretrained(
    path: str, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedTokenizerBase, Any]:
    """Tokenizer and model of a folder or of the run that it lies in; an adapter is merged. Nothing is unpickled.

    Raises:
        ValueError: The folder has no such thing, or what it has cannot be read.
    """
    folder = model_folder("--model-name-or-path", path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **LOCAL)
        base = base_of(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder if base is None else model_folder(f"the base model of {folder}", base),
            dtype=dtype,
            use_safetensors=True,
            **LOCAL,
        )
        if base is not None:
            model = merge_adapter(model, folder)
    except Exception as error:  # whatever its files lead transformers to
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the model in {folder} cannot be read: {why}") from None
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in {folder} must have an end token (eos_token)")
    return tokenizer, model


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory: by default each large activation is mapped and cleared afresh (7 % of a step)."""
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the largest that glibc takes
    libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
    libc.mallopt(M_TOP_PAD, 64 << 20)
