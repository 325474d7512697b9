"""Samplers that return what cannot be trained on are named by completion; odd completions cost nothing but their step.

Servers that die, hang or lie are in tests/trainer/test_vllm.py.
"""

from dataclasses import replace

import pytest
import torch

from fastgrpo.trainer.data.text import decode
from fastgrpo.trainer.sampling import sampler
from fastgrpo.trainer.sampling.rollout import Rollout, SamplerError, check
from fastgrpo.trainer.state import State
from tests.trainer_faults.runs import SMALL, make_run, train

CONFIG = replace(SMALL, max_steps=2, num_iterations=1, steps_per_generation=1)
RUN = make_run(CONFIG)
EOS, PAD = RUN.tokenizer.eos_token_id, RUN.tokenizer.pad_token_id
NAN, INF = float("nan"), float("inf")


def plant(monkeypatch, ids_of, logprob_of=lambda ids: torch.full((len(ids),), -1.0)) -> None:
    """A sampler whose completion number i is `ids_of(i)`."""

    def sample(self, prompts, *, num_samples, max_new_tokens, temperature, pause_ids=()):
        ids = [ids_of(i) for i in range(len(prompts) * num_samples)]
        ids = [row for row in ids if row is not None]
        logprob = [logprob_of(row) for row in ids]
        prompt_ids = [list(p) for p in prompts for _ in range(num_samples)]
        cut = [EOS not in row for row in ids]
        return Rollout(prompt_ids[: len(ids)], ids, logprob, cut)

    monkeypatch.setattr(sampler.KVSampler, "sample", sample)


REFUSED = {
    "empty": (lambda i: [], "completion 0 without a token"),
    "one empty": (lambda i: [] if i == 5 else [3, EOS], "completion 5 without a token"),
    "too few": (lambda i: None if i == 2 else [3, EOS], "11 completions, 12 were asked for"),
    "outside": (lambda i: [10**6, EOS], "token 1000000, and the model has"),
    "just outside": (lambda i: [RUN.policy.model.config.vocab_size, EOS], "and the model has"),
    "negative": (lambda i: [3, -100, EOS], "token -100"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_completions_that_cannot_be_are_named(monkeypatch, name):
    ids_of, message = REFUSED[name]
    plant(monkeypatch, ids_of)
    with pytest.raises(SamplerError, match=message):
        train(State(make_run(CONFIG)))


@pytest.mark.parametrize(
    "logprob",
    [[NAN, NAN], [-INF, -1.0], [INF, -1.0], [0.5, -1.0], [-1.0], [-1.0, -1.0, -1.0], []],
    ids=str,
)
def test_log_probabilities_that_cannot_be_are_named(monkeypatch, logprob):
    plant(monkeypatch, lambda i: [3, EOS], lambda ids: torch.tensor(logprob))
    with pytest.raises(SamplerError, match="completion 0 of 2 tokens with log-probabilities"):
        train(State(make_run(CONFIG)))


def test_tokens_of_a_tool_have_none(monkeypatch):
    rollout = Rollout([[1]], [[3, 4, EOS]], [torch.tensor([-1.0, NAN, -0.5])], [False])
    assert check(rollout, 1, 14) is rollout
    assert check(replace(rollout, logprob=None), 1, 14).logprob is None
    assert check(replace(rollout, logprob=[torch.tensor([1e-6, NAN, 0.0])]), 1, 14)


# Without spread in any group nothing is learned, and nothing breaks.
ODD = {
    "only the end": lambda i: [EOS],
    "only padding": lambda i: [PAD] * 3,
    "all cut": lambda i: [3] * SMALL.max_completion_length,
    "all alike": lambda i: [3, EOS],
    "end in the middle": lambda i: [EOS, 3, EOS],
}


@pytest.mark.parametrize("name", ODD)
def test_odd_completions_teach_nothing_and_break_nothing(monkeypatch, name):
    plant(monkeypatch, ODD[name])
    state = State(make_run(replace(CONFIG, beta=0.0)))
    before = [p.detach().clone() for p in state.run.policy.parameters()]
    for numbers in train(state):
        assert numbers["loss"] == numbers["grad_norm"] == 0.0
        assert numbers["skipped_updates"] == 0
        assert numbers["frac_reward_zero_std"] == 1.0
        assert numbers["completions/clipped_ratio"] == float(EOS not in ODD[name](0))
    after = state.run.policy.parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_invalid_bytes_become_replacement_characters():
    """Byte-level tokenizers can be asked to decode half a character; rewards get text all the same."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    half = alphabet.index("ð")  # the first byte of an emoji
    (text,) = decode(tokenizer, [[half, half]])
    assert set(text) == {"\ufffd"}
    text.encode()
