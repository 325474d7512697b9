"""What a job has to provide: problems by split, a tokenizer, a small model, and rewards."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from transformers import LlamaConfig, PreTrainedTokenizerFast

Reward = Callable[..., Sequence[float | None]]
"""TRL's signature: `reward(prompts=, completions=, completion_ids=, **columns)` -> a float or None per completion."""

Message = dict[str, str]  # {"role": ..., "content": ...}
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Problem:
    """One question with a known answer."""

    prompt: str
    answer: str  # what an exact answer must equal
    solution: str  # a completion that is right, without the end token
    key: str  # what train and test are split by: two problems of one key never lie on both sides
    slice: str | None = None  # accuracy is also reported per slice, e.g. "seen" / "unseen"
    messages: tuple[
        Message, ...
    ] = ()  # the prompt as a conversation, for models with a chat template
    columns: dict[str, Any] = field(default_factory=dict)  # what else the rewards are given


class OutcomeOnly:
    """For jobs whose lines cannot be told right from wrong."""

    def line_rewards(self, problem: Problem, lines: Sequence[str]) -> list[float]:
        """Raises: there is no process to supervise."""
        raise ValueError("supervision must be outcome for this job: it cannot reward single lines")


@dataclass(frozen=True, slots=True)
class TinyModel:
    """Size of the Llama that a job makes when the user names no model."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    max_position_embeddings: int = 256
    initializer_range: float = 0.05
    rope_theta: float = (
        100.0  # sequences are short: with the usual 10,000 most of the rotations would hardly turn
    )

    def llama_config(self, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
        """The architecture, with the vocabulary and special tokens of the job's tokenizer."""
        return LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_attention_heads,
            max_position_embeddings=self.max_position_embeddings,
            initializer_range=self.initializer_range,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )


class Task(Protocol):
    """A job: everything that the trainer knows about the problems it trains on."""

    @property
    def model(self) -> TinyModel:
        """Size of the model that is made where the user names none."""

    @property
    def about_base(self) -> str:
        """How the base model came to be, for the closing words."""

    @property
    def about_result(self) -> str:
        """What a rise in accuracy means here, for the closing words."""

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The vocabulary of the job, built in code."""

    def sample(self, split: str, rng: random.Random, n: int) -> list[Problem]:
        """`n` problems of a split; problems of different splits never share a key."""

    def demonstration(self, problem: Problem, rng: random.Random, progress: float) -> str:
        """The completion that SFT shows when it has done a share `progress` of its steps."""

    def rewards(self, eos_id: int) -> dict[str, Reward]:
        """Reward functions by name; their sum is what GRPO maximises."""

    def line_rewards(self, problem: Problem, lines: Sequence[str]) -> list[float]:
        """Rewards of the lines of a completion, for process supervision."""

    def parse_answer(self, completion: str) -> str | None:
        """The final answer a completion gives, None if it gives none: what accuracy and majority votes compare."""
