"""Samplers: what they report is what the training forward computes, and compaction changes nothing."""

import pytest
import torch

from fastgrpo.trainer.batch import make_batch
from fastgrpo.trainer.llama import LlamaDecoder, is_plain_llama
from fastgrpo.trainer.policy import Policy
from fastgrpo.trainer.sampler import (
    KVSampler,
    TransformersSampler,
    choose,
    draw_noise_,
    make_sampler,
    pad_left,
)
from tests.trainer.conftest import tiny_llama

EOS, PAD = 1, 0
PROMPTS = [
    [5, 9, 3],
    [7, 7, 8, 20, 31, 4, 6],
    [12],
    [5, 9, 3, 3, 3],
]  # lengths differ: left padding is exercised


def sample(model, *, compact=True, seed=0, temperature=1.0, num_samples=6, max_new_tokens=12):
    sampler = KVSampler(model, eos_id=EOS, pad_id=PAD, seed=seed, compact=compact)
    return sampler.sample(
        PROMPTS, num_samples=num_samples, max_new_tokens=max_new_tokens, temperature=temperature
    )


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7], ids=lambda t: f"T={t}")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_attention_heads": 4, "num_key_value_heads": 2},  # grouped keys and values
        {"head_dim": 16},  # heads wider than hidden / heads
        {"tie_word_embeddings": False, "rms_norm_eps": 1e-3},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    ],
    ids=["plain", "gqa", "head_dim", "untied", "rope_theta"],
)
def test_sampled_logprobs_are_those_of_the_training_forward(tokenizer, changes, temperature):
    model = tiny_llama(tokenizer, hidden_size=32, intermediate_size=48, **changes)
    rollout = sample(model, temperature=temperature)
    batch = make_batch(rollout.prompt_ids, rollout.completion_ids, PAD)
    with torch.no_grad():
        trained = Policy(model, temperature)(batch)
    assert torch.allclose(trained, torch.cat(rollout.logprob), rtol=0, atol=1e-5)


def test_decoder_equals_the_hugging_face_forward_on_padded_prompts(model):
    ids, padding = pad_left(PROMPTS, PAD)
    decoder = LlamaDecoder(model)
    logits, cache = decoder.prefill(ids, padding, room=2, repeats=2)
    step = decoder.step(torch.full((2 * len(PROMPTS),), 4), cache)
    for row, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            alone = model(torch.tensor([[*prompt, 4]])).logits[0, -2:]
        for copy in (2 * row, 2 * row + 1):
            assert torch.allclose(logits[copy], alone[0], atol=1e-5)
            assert torch.allclose(step[copy], alone[1], atol=1e-5)


def test_compaction_changes_no_token_and_no_logprob(model):
    size = {"num_samples": 24, "max_new_tokens": 30}
    with_, without = sample(model, **size), sample(model, compact=False, **size)
    assert len({len(c) for c in with_.completion_ids}) > 3, (
        "rows must end at different times for this test to bite"
    )
    assert with_.completion_ids == without.completion_ids
    assert torch.allclose(torch.cat(with_.logprob), torch.cat(without.logprob), atol=1e-6)


def test_completions_end_at_the_first_end_token_or_at_the_maximum(model):
    rollout = sample(model)
    assert any(rollout.truncated)
    assert not all(rollout.truncated)
    for ids, logprob, cut in zip(
        rollout.completion_ids, rollout.logprob, rollout.truncated, strict=True
    ):
        assert len(ids) == len(logprob) <= 12
        assert EOS not in ids[:-1]
        assert cut == (ids[-1] != EOS)
        assert not cut or len(ids) == 12


def test_samples_of_one_prompt_are_neighbours(model):
    rollout = sample(model, num_samples=3)
    assert rollout.prompt_ids == [p for p in PROMPTS for _ in range(3)]


def test_temperature_zero_takes_the_likeliest_token(model):
    rollout = sample(model, temperature=0.0, num_samples=1)
    for prompt, ids in zip(PROMPTS, rollout.completion_ids, strict=True):
        for t, token in enumerate(ids):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + ids[:t]])).logits[0, -1]
            assert token == int(logits.argmax())


@pytest.mark.parametrize("kind", ["one number per token", "one number per row"])
def test_draws_follow_the_distribution(kind):
    # 40,000 draws from 4 tokens: each share has a standard error below .0025; .012 is about 5 of them.
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).expand(40_000, 4)
    per_token = kind == "one number per token"
    noise = torch.empty(40_000, 4) if per_token else torch.empty(40_000, dtype=torch.float64)
    draw_noise_(noise, torch.Generator().manual_seed(0))
    ids, logprob = choose(logits, 0.8, noise)
    expected = torch.softmax(logits[0] / 0.8, -1)
    assert torch.allclose(torch.bincount(ids, minlength=4) / 40_000, expected, atol=0.012)
    assert torch.allclose(logprob, expected.log()[ids], atol=1e-6)


@pytest.mark.parametrize("vocabulary", [1, 255, 256, 257, 5000, 32_000])
def test_one_number_per_row_inverts_the_distribution_function(vocabulary):
    """The number that lies in the middle of a token's interval draws that token, in every block and at every edge."""
    g = torch.Generator().manual_seed(vocabulary)
    logits = 2 * torch.randn(vocabulary, generator=g)
    p = torch.softmax(logits.double(), -1)
    middle = p.cumsum(-1) - p / 2
    wide = (p > 1e-6).nonzero()[:, 0][
        :4000
    ]  # narrower ones are within rounding of their neighbours
    ids, logprob = choose(logits.expand(len(wide), -1), 1.0, middle[wide])
    assert torch.equal(ids, wide)
    assert torch.allclose(logprob.double(), p[wide].log(), atol=1e-5)


def test_one_number_per_row_never_draws_what_has_no_probability():
    logits = torch.full((3, 5000), -torch.inf)
    logits[:, 700], logits[:, 701] = 0.0, 1.0
    ends = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    ids, logprob = choose(logits, 1.0, ends)
    assert ids.tolist() == [700, 701, 701]
    assert torch.isfinite(logprob).all()


def test_a_seed_gives_the_same_samples_and_another_seed_others(model):
    assert sample(model, seed=3).completion_ids == sample(model, seed=3).completion_ids
    assert sample(model, seed=3).completion_ids != sample(model, seed=4).completion_ids


def test_refresh_takes_over_new_weights(model):
    sampler = KVSampler(model, eos_id=EOS, pad_id=PAD, seed=0)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    stale = sampler.decoder.head.clone()
    sampler.refresh()
    assert torch.equal(sampler.decoder.head, -stale)


def test_transformers_sampler_keeps_the_same_contract(model):
    torch.manual_seed(0)
    sampler = TransformersSampler(model, eos_id=EOS, pad_id=PAD)
    rollout = sampler.sample(PROMPTS, num_samples=4, max_new_tokens=8, temperature=0.7)
    batch = make_batch(rollout.prompt_ids, rollout.completion_ids, PAD)
    with torch.no_grad():
        trained = Policy(model, 0.7)(batch)
    assert torch.allclose(trained, torch.cat(rollout.logprob), rtol=0, atol=1e-5)
    assert all(
        cut == (ids[-1] != EOS)
        for ids, cut in zip(rollout.completion_ids, rollout.truncated, strict=True)
    )
    greedy = sampler.sample(PROMPTS, num_samples=1, max_new_tokens=8, temperature=0.0)
    assert (
        greedy.completion_ids
        == sample(model, temperature=0.0, num_samples=1, max_new_tokens=8).completion_ids
    )


def test_auto_uses_the_cache_sampler_only_where_it_computes_the_model(tokenizer):
    plain = tiny_llama(tokenizer, hidden_size=32, intermediate_size=48)
    biased = tiny_llama(tokenizer, hidden_size=32, intermediate_size=48, mlp_bias=True)
    scaled = tiny_llama(
        tokenizer,
        hidden_size=32,
        intermediate_size=48,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    )
    kinds = {
        m: make_sampler(m, kind="auto", eos_id=EOS, pad_id=PAD, seed=0).name
        for m in (plain, biased, scaled)
    }
    assert list(kinds.values()) == ["kv", "transformers", "transformers"]
    assert not is_plain_llama(biased)
    with pytest.raises(ValueError, match="model must be a plain LlamaForCausalLM"):
        make_sampler(biased, kind="kv", eos_id=EOS, pad_id=PAD, seed=0)
