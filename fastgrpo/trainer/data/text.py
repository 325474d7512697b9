"""Text to token ids and back, in batches."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastgrpo.trainer.tasks.base import Problem


def prompt_ids(tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem]) -> list[list[int]]:
    """Ids of problems' prompts: a conversation through the chat template where there are both, else the plain text."""
    if getattr(tokenizer, "chat_template", None) and all(p.messages for p in problems):
        render: Any = tokenizer.apply_chat_template
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
        return [list(render(list(p.messages), **options)) for p in problems]
    return encode_prompts(tokenizer, [p.prompt for p in problems])


def encode_prompts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of prompts, with whatever special tokens the tokenizer puts in front."""
    return _encode(tokenizer, texts, special=True)


def encode_completions(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of completions, each closed by the end token."""
    eos_id: Any = tokenizer.eos_token_id
    return [[*ids, eos_id] for ids in encode_texts(tokenizer, texts)]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts as they stand in the middle of a completion."""
    return _encode(tokenizer, texts, special=False)


def _encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special: bool
) -> list[list[int]]:
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is not None:  # four times faster than through the wrapper; SFT encodes all it sees
        return [e.ids for e in fast.encode_batch(list(texts), add_special_tokens=special)]
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=special)["input_ids"]
    return ids


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[Sequence[int]]) -> list[str]:
    """Texts of completions, without special tokens."""
    texts: list[str] = tokenizer.batch_decode([list(row) for row in ids], skip_special_tokens=True)
    return texts
