"""The policy's log-probabilities and gradients are those of the model's own logits, whatever its head does to them."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fastgrpo.objective import Objective
from fastgrpo.trainer.data.batch import make_batch
from fastgrpo.trainer.policy import Policy

SIZE = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.5,
}
ARCHITECTURES = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},  # softcap
    "cohere": {"logit_scale": 0.3},  # scaled logits
    "granite": {"logits_scaling": 4.0},  # divided logits
    "phi": {},  # a head with a bias
}
PROMPTS, COMPLETIONS = [[5, 9, 3], [7]], [[8, 1], [9, 30, 1]]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_policy_is_the_models_own_logits(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **SIZE, **ARCHITECTURES[kind])
    ).eval()
    if kind == "phi":
        torch.nn.init.normal_(model.lm_head.bias)
    policy = Policy(model, temperature=0.8)
    batch = make_batch(PROMPTS, COMPLETIONS, pad_id=0)
    advantage = torch.tensor([1.0, -0.5])

    expected, loss = [], torch.zeros(())
    for prompt, completion, a in zip(PROMPTS, COMPLETIONS, advantage, strict=True):
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / 0.8
        logprob = torch.log_softmax(logits, -1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        expected.append(logprob.detach())
        loss = (
            loss - (logprob * a).mean() / 2
        )  # on-policy: ratio 1, so the gradient is that of A * logprob
    loss.backward()
    wanted = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()

    with torch.no_grad():
        assert torch.allclose(policy(batch), torch.cat(expected), rtol=0, atol=1e-5)
    policy(batch, advantage=advantage, objective=Objective.grpo()).loss.backward()
    got = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(got) == len(wanted)
    for mine, theirs in zip(got, wanted, strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-5 * max(1.0, float(theirs.abs().max())))
