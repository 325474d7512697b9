"""Small models and tasks that the trainer's tests share."""

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from fastgrpo.trainer.tasks.story import Story


@pytest.fixture(scope="session")
def story() -> Story:
    return Story()


@pytest.fixture(scope="session")
def tokenizer(story: Story) -> PreTrainedTokenizerFast:
    return story.tokenizer()


def tiny_llama(tokenizer: PreTrainedTokenizerFast, **changes: object) -> LlamaForCausalLM:
    """A random model, loud enough that its next-token distributions are far from uniform."""
    config = Story().model.llama_config(tokenizer)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config.update(
        {"initializer_range": 0.3, "num_hidden_layers": 2, "rope_parameters": rope, **changes}
    )
    torch.manual_seed(1)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return tiny_llama(tokenizer, hidden_size=32, intermediate_size=48)
