"""The parts of a run, put together from its options."""

import ctypes
import platform
import random
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

from fastgrpo.trainer.config import TrainConfig
from fastgrpo.trainer.distributed import Ranks
from fastgrpo.trainer.jobs import make_task
from fastgrpo.trainer.policy import Policy
from fastgrpo.trainer.rewards import Rewards, make_rewards
from fastgrpo.trainer.rollout import Sampler
from fastgrpo.trainer.sampler import make_sampler
from fastgrpo.trainer.tasks.base import Problem, Task

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


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
    rewards: Rewards = field(init=False)

    def __post_init__(self) -> None:
        """Find the rewards that the options name."""
        self.rewards = make_rewards(self.config, self.task.rewards(self.tokenizer.eos_token_id))

    def sampler(self, seed: int) -> Sampler:
        """A sampler of the present policy with random numbers of its own."""
        return make_sampler(
            self.policy.model if self.sampled is None else self.sampled,
            kind=self.config.sampler,
            eos_id=self.tokenizer.eos_token_id,
            pad_id=self.tokenizer.pad_token_id,
            seed=seed,
        )

    def held_out(self, split: str, n: int) -> list[Problem]:
        """Questions of a split that depend on the seed alone."""
        return self.task.sample(split, random.Random(f"{split} {self.config.seed}"), n)


def make_run(config: TrainConfig, ranks: Ranks | None = None) -> Run:
    """Task, tokenizer, model and sampler; the model has random weights unless the options name one."""
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
        folder = existing_folder(config.model_name_or_path)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
    policy = Policy(model.to(device), config.temperature).eval()  # no dropout: the sampler has none
    return Run(config, task, tokenizer, policy, device, ranks or Ranks())


def existing_folder(name: str) -> str:
    """A local folder; nothing is ever fetched from a hub."""
    if not (Path(name) / "config.json").is_file():
        raise ValueError(f"model_name_or_path must be a folder with a config.json, got {name!r}")
    return name


def pick_device(name: str) -> torch.device:
    """`auto` is a GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from None


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory: by default each large activation is mapped and cleared afresh (7 % of a step)."""
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the largest that glibc takes
    libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
    libc.mallopt(M_TOP_PAD, 64 << 20)
