"""Tiny random language models, a tokenizer and data made in code: TRL's trainers run on them in a second, offline."""

from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3MoeConfig,
)

WORDS = [f"w{k}" for k in range(33)]
SPECIAL = ["<pad>", "<eos>", "<unk>"]
VOCABULARY = len(WORDS) + len(SPECIAL)
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 1,
}
CONFIGS: dict[str, Callable] = {
    "qwen2": lambda **more: Qwen2Config(**SIZES | more, tie_word_embeddings=True),
    "llama": lambda **more: LlamaConfig(**SIZES | more, tie_word_embeddings=False),
    # Softcap of the final logits, tied weights.
    "gemma2": lambda **more: Gemma2Config(
        **SIZES | more, head_dim=8, final_logit_softcapping=4.0, attn_implementation="eager"
    ),
    "qwen3_moe": lambda **more: Qwen3MoeConfig(
        **SIZES | more, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2, head_dim=8
    ),
}


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: k for k, word in enumerate(SPECIAL + WORDS)}
    plain = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )


def save_model(kind: str, folder: Path, **more: int) -> str:
    """Write a random model, so that trainers which want a second copy (a reference) can load it again."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](**more), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(
                    8.0
                )  # far from uniform: clips, entropies and rewards differ between tokens
    path = folder / kind
    model.save_pretrained(path)
    return str(path)


def prompts(count: int = 64) -> Dataset:
    g = torch.Generator().manual_seed(0)
    picks = torch.randint(0, len(WORDS), (count, 3), generator=g).tolist()
    return Dataset.from_list([{"prompt": " ".join(WORDS[k] for k in row)} for row in picks])


def reward(completions: list[str], **_: object) -> list[float]:
    """Reward even words, a little for length: groups differ, some are tied."""
    rewards = []
    for completion in completions:
        numbers = [int(word[1:]) for word in completion.split() if word.startswith("w")]
        even = sum(number % 2 == 0 for number in numbers)
        rewards.append(even / max(len(numbers), 1) + 0.01 * (len(numbers) > 4))
    return rewards
