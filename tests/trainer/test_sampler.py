"""Samplers: what they report is what the training forward computes, and compaction changes nothing."""

import itertools

import pytest
import torch
from transformers import LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

from fastgrpo.trainer.data.batch import make_batch
from fastgrpo.trainer.policy import Policy
from fastgrpo.trainer.sampling import sampler as sampler_module
from fastgrpo.trainer.sampling.decoder import Decoder, can_decode
from fastgrpo.trainer.sampling.draw import choose, draw_noise_
from fastgrpo.trainer.sampling.sampler import KVSampler, TransformersSampler, make_sampler, pad_left
from fastgrpo.trainer.sampling.static_step import StaticStep
from tests.trainer.conftest import tiny_llama

EOS, PAD = 1, 0
PROMPTS = [
    [5, 9, 3],
    [7, 7, 8, 20, 31, 4, 6],
    [12],
    [5, 9, 3, 3, 3],
]  # lengths differ: left padding is exercised


ROPE = {
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 10000.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64
    },
}  # fmt: skip


def tiny(tokenizer, family=LlamaForCausalLM, **changes):
    """A small random model; of the Qwens with biases and norms that are not neutral."""
    llama = tiny_llama(tokenizer, hidden_size=32, intermediate_size=48, **changes)
    if family is LlamaForCausalLM:
        return llama
    options = llama.config.to_dict()
    for name in ("model_type", "architectures", "attention_bias", "mlp_bias", "pretraining_tp"):
        options.pop(name, None)
    torch.manual_seed(1)
    model = family(family.config_class(**options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def sample(
    model, *, compact=True, static=None, seed=0, temperature=1.0, num_samples=6, max_new_tokens=12
):
    sampler = KVSampler(model, eos_id=EOS, pad_id=PAD, seed=seed, compact=compact, static=static)
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
        {"rope_parameters": ROPE["linear"]},
        {"rope_parameters": ROPE["llama3"]},
        {"rope_parameters": ROPE["yarn"]},
        {"attention_bias": False, "family": Qwen2ForCausalLM},
        {"num_key_value_heads": 2, "head_dim": 16, "family": Qwen3ForCausalLM},
    ],
    ids=["plain", "gqa", "head_dim", "untied", "rope_theta", *ROPE, "qwen2", "qwen3"],
)
def test_sampled_logprobs_are_those_of_the_training_forward(tokenizer, changes, temperature):
    model = tiny(tokenizer, **changes)
    rollout = sample(model, temperature=temperature)
    batch = make_batch(rollout.prompt_ids, rollout.completion_ids, PAD)
    with torch.no_grad():
        trained = Policy(model, temperature)(batch)
    assert torch.allclose(trained, torch.cat(rollout.logprob), rtol=0, atol=1e-5)


def test_decoder_equals_the_hugging_face_forward_on_padded_prompts(model):
    ids, padding = pad_left(PROMPTS, PAD)
    decoder = Decoder(model)
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


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("family", [LlamaForCausalLM, Qwen3ForCausalLM])
def test_steps_of_fixed_shape_are_the_same_steps(tokenizer, family, compact):
    """The code that a GPU records as a graph, run without the recording."""
    model = tiny(tokenizer, family=family)
    size = {"num_samples": 24, "max_new_tokens": 30}
    plain, fixed = sample(model, **size), sample(model, static=True, compact=compact, **size)
    assert fixed.completion_ids == plain.completion_ids
    assert fixed.truncated == plain.truncated
    assert torch.allclose(torch.cat(fixed.logprob), torch.cat(plain.logprob), atol=1e-5)


def test_fixed_shapes_change_by_halves(model, monkeypatch):
    """Few shapes, since each is a graph; and never fewer rows than go on."""
    shapes = []
    monkeypatch.setattr(
        sampler_module,
        "StaticStep",
        lambda decoder, cache: shapes.append(len(cache.position)) or StaticStep(decoder, cache),
    )
    rollout = sample(model, static=True, num_samples=25, max_new_tokens=150)
    assert shapes[0] == 100
    assert all(n & (n - 1) == 0 and n < before for before, n in itertools.pairwise(shapes))
    assert 2 <= len(shapes) <= 8
    assert (
        rollout.completion_ids == sample(model, num_samples=25, max_new_tokens=150).completion_ids
    )


def test_recording_a_step_leaves_no_trace(model):
    """What `StaticStep` does before it records a graph, without the graph: runs, then puts the counters back."""
    ids, padding = pad_left(PROMPTS, PAD)
    decoder, token_ids = Decoder(model), torch.full((len(PROMPTS),), 4)
    results = []
    for runs in (0, 3):
        _, cache = decoder.prefill(ids, padding, room=4, repeats=1)
        step = StaticStep(decoder, cache)
        with step.put_back():
            for _ in range(runs):
                step.run()
        results.append(torch.stack([step(token_ids).clone() for _ in range(4)]))
    assert torch.equal(*results)


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
    growing = tiny(
        tokenizer, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    )
    windowed = tiny(tokenizer, family=Qwen2ForCausalLM)
    windowed.config.layer_types = ["full_attention", "sliding_attention"]
    kinds = {
        m: make_sampler(m, kind="auto", eos_id=EOS, pad_id=PAD, seed=0).name
        for m in (plain, biased, growing, windowed)
    }
    assert list(kinds.values()) == ["kv", "transformers", "transformers", "transformers"]
    assert not can_decode(biased)
    with pytest.raises(
        ValueError, match="model must be a LlamaForCausalLM, Qwen2ForCausalLM, Qwen3"
    ):
        make_sampler(biased, kind="kv", eos_id=EOS, pad_id=PAD, seed=0)
