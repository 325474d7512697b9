"""Tool-integrated solutions: where generation stops, what is appended and masked, and that nothing else changes."""

import json
import re

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fastgrpo.trainer.data.text import encode_prompts, encode_texts
from fastgrpo.trainer.evaluation.calculator import Calculator
from fastgrpo.trainer.evaluation.evaluate import evaluate
from fastgrpo.trainer.evaluation.tools import (
    CallFormat,
    ToolError,
    ToolSampler,
    find_tool,
    next_call,
)
from fastgrpo.trainer.sampling.rollout import Rollout
from fastgrpo.trainer.sampling.sampler import KVSampler, TransformersSampler
from fastgrpo.trainer.tasks.base import Problem
from fastgrpo.trainer.tasks.tokenizer import word_tokenizer
from tests.trainer.test_cli import run_here

EOS, PAD = 1, 0
SOLUTIONS = {
    "clips": "In May she sold 48/2 = <<48/2=24>>24 clips.\nAltogether 48+24 = <<48+24=72>>72 clips.\n#### 72",
    "pay": "A minute is 12/60=$<<12/60=0.2>>0.2.\nFor 50 she earned 0.2 x 50=$<<0.2*50=10>>10.\n#### 10",
    "none": "There is nothing to compute: a = b.\n#### 5",
}
PROBLEMS = [Problem(name, text.rpartition(" ")[2], text, name) for name, text in SOLUTIONS.items()]
CHARACTERS = sorted(
    set("".join(SOLUTIONS.values()) + "0123456789`pythonutcde,-" + "".join(SOLUTIONS))
)


def by_characters() -> PreTrainedTokenizerFast:
    return word_tokenizer(CHARACTERS, r"[\s\S]")


def by_pairs() -> PreTrainedTokenizerFast:
    """A byte-level BPE in which `=24>>` and the like are single tokens: a call may end in the middle of one."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"=\d*>*|[^=]+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    words = [f"={i}>>" for i in range(100)] * 3 + list(SOLUTIONS.values()) + CHARACTERS
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet
    )
    core.train_from_iterator(words, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


class Author:
    """A language model that writes a known solution, but computes every result as 7, and ends with its last result."""

    name = "author"
    rng_state = torch.zeros(1)

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.calls = []

    def refresh(self):
        pass

    def next_text(self, name, done):
        """What it writes after `done`: its own results are 7, and of a result it repeats what it reads."""
        parts = re.split(
            r"(<<[^<>]*=)[^<>]*>>\d+(?:\.\d+)?", SOLUTIONS[name]
        )  # text, call, text, ..., text
        closed = done.count(">>")
        before, _, since = done.rpartition(">>")
        last = before.rpartition("=")[2]
        text = last if closed else ""
        for i in range(2 * closed, len(parts)):
            text += parts[i] if i % 2 == 0 else f"{parts[i]}7>>7"
        if parts[1:] and closed == len(parts) // 2:
            text = re.sub(r"#### .*", f"#### {last}", text)
        elif parts[1:]:
            text = re.sub(r"#### .*", "#### 7", text)
        assert text.startswith(since), (text, since)
        return text[len(since) :]

    def sample(self, prompts, *, num_samples, max_new_tokens, temperature, pause_ids=()):
        self.calls.append(len(prompts) * num_samples)
        rows, cut = [], []
        for prompt in prompts:
            text = self.tokenizer.decode(prompt)
            name = next(n for n in SOLUTIONS if text.startswith(n))
            ids = encode_texts(self.tokenizer, [self.next_text(name, text[len(name) :])])[0]
            ids = [*ids, EOS]
            stop = next((i for i, t in enumerate(ids) if t in pause_ids), len(ids))
            ids = ids[: stop + 1]
            cut += [len(ids) > max_new_tokens] * num_samples
            rows += [ids[:max_new_tokens]] * num_samples
        logprob = [torch.full((len(row),), -0.5) for row in rows]
        return Rollout([list(p) for p in prompts for _ in range(num_samples)], rows, logprob, cut)


class Answers:
    def parse_answer(self, completion):
        return completion.rpartition("#### ")[2] or None


@pytest.mark.parametrize("make", [by_characters, by_pairs])
def test_results_are_the_calculators_and_the_rest_is_the_models(make):
    tokenizer = make()
    sampler = ToolSampler(Author(tokenizer), tokenizer, Calculator())
    prompts = encode_prompts(tokenizer, list(SOLUTIONS))
    rollout = sampler.sample(prompts, num_samples=2, max_new_tokens=400, temperature=1.0)
    texts = tokenizer.batch_decode(rollout.completion_ids, skip_special_tokens=True)
    assert texts == [text for text in SOLUTIONS.values() for _ in range(2)]
    assert not any(rollout.truncated)
    assert (sampler.calls, sampler.failures) == (8, 0)
    for ids, logprob, text in zip(rollout.completion_ids, rollout.logprob, texts, strict=True):
        assert len(ids) == len(logprob)
        inserted = [i for i, x in zip(ids, logprob, strict=True) if x.isnan()]
        results = "".join(re.findall(r"<<[^=]*=([^<>]*>>)", text))
        shown = tokenizer.decode(inserted)
        assert shown.replace("=", "") == results  # `=` where it was part of a token that was cut
        assert all(x == -0.5 for x in logprob[~logprob.isnan()])


def test_accuracy_with_and_without_the_tool_up_to_a_vote_of_32():
    tokenizer = by_pairs()
    options = {"samples": 32, "max_new_tokens": 400, "temperature": 0.7}
    alone = evaluate(Author(tokenizer), Answers(), tokenizer, PROBLEMS, **options)
    tool = ToolSampler(Author(tokenizer), tokenizer, Calculator())
    helped = evaluate(tool, Answers(), tokenizer, PROBLEMS, **options)
    assert alone.scores == pytest.approx(
        dict.fromkeys(("greedy", "pass@1", "maj@32", "pass@32"), 1 / 3)
    )
    assert helped.scores == dict.fromkeys(("greedy", "pass@1", "maj@32", "pass@32"), 1.0)


class Refuses:
    call = Calculator.call

    def run(self, code):
        raise ToolError("no")


@pytest.mark.parametrize("kind", [KVSampler, TransformersSampler])
def test_stopping_and_going_on_changes_nothing(model, tokenizer, kind):
    """Greedy completions are the same with pauses at every `=`: a tool that never answers leaves the model alone."""
    options = {"seed": 0} if kind is KVSampler else {}
    sampler = kind(model, eos_id=EOS, pad_id=PAD, **options)
    prompts = [[5, 9, 3], [7, 7, 8, 20, 31, 4, 6], [12], [40, 41]]
    ask = {"num_samples": 1, "max_new_tokens": 24, "temperature": 0.0}
    plain = sampler.sample(prompts, **ask)
    written = {t for row in plain.completion_ids for t in row[:-1]}
    tool = ToolSampler(sampler, tokenizer, Refuses())
    tool.pause_ids = sorted(written)[::2]
    paused = tool.sample(prompts, **ask)
    assert paused.completion_ids == plain.completion_ids
    assert paused.truncated == plain.truncated
    assert torch.allclose(torch.cat(paused.logprob), torch.cat(plain.logprob), atol=1e-5)


def test_a_call_without_a_result_is_left_to_the_model():
    tokenizer = by_characters()
    sampler = ToolSampler(Author(tokenizer), tokenizer, Refuses())
    prompts = encode_prompts(tokenizer, ["clips"])
    rollout = sampler.sample(prompts, num_samples=1, max_new_tokens=400, temperature=1.0)
    assert "<<48/2=7>>7" in tokenizer.decode(rollout.completion_ids[0])
    assert (sampler.calls, sampler.failures) == (0, 2)
    assert sampler.first_failure == "'48/2': no"


@pytest.mark.parametrize("room", range(1, 60))
def test_results_count_towards_the_length(room):
    tokenizer = by_characters()
    sampler = ToolSampler(Author(tokenizer), tokenizer, Calculator())
    prompts = encode_prompts(tokenizer, ["clips", "none"])
    rollout = sampler.sample(prompts, num_samples=1, max_new_tokens=room, temperature=1.0)
    for ids, cut, name in zip(
        rollout.completion_ids, rollout.truncated, ["clips", "none"], strict=True
    ):
        whole = [*encode_texts(tokenizer, [SOLUTIONS[name]])[0], EOS]
        assert ids == whole[:room]
        assert cut == (len(whole) > room)


CODE = CallFormat("```python\n", "```", "\n```output\n", "\n```\n")


@pytest.mark.parametrize(
    ("text", "scanned", "found"),
    [
        ("a = <<1+1=", 0, ("1+1", 10)),
        ("a = <<1+1=2>> b =", 10, None),
        ("<<1+1=2>> <<3*3=", 7, ("3*3", 16)),
        ("a = b", 0, None),
        ("<<1 << 2=", 0, (" 2", 9)),
    ],
)
def test_calls_are_found(text, scanned, found):
    assert next_call(text, scanned, Calculator.call) == found


def test_calls_between_marks_of_several_characters_are_found():
    block = "so:\n```python\nprint(1)\n```"
    assert next_call(block, 0, CODE) == ("print(1)\n", len(block))
    assert next_call(block[:-1], 0, CODE) is None
    answered = block + "\n```output\n1\n```\n"
    assert next_call(answered + "```", len(answered), CODE) is None
    again = answered + "```python\nx\n```"
    assert next_call(again, len(answered), CODE) == ("x\n", len(again))


SANDBOX = """
class Sandbox:
    call = ("```python\\n", "```", "\\n```output\\n", "\\n```\\n")
    def run(self, code):
        return str(len(code))

def make():
    return Sandbox()

def number():
    return 3

def broken():
    raise RuntimeError("no sandbox here")
"""


def test_a_sandbox_of_the_users(tmp_path):
    (tmp_path / "box.py").write_text(SANDBOX)
    tool = find_tool(f"{tmp_path}/box.py:make")
    assert tool.call == CODE
    assert tool.run("abc") == "3"
    for name, says in [
        ("number", r"must return an object with run\(code\) and call=.*got int"),
        ("broken", "no sandbox here"),
        ("nothing", "has no function 'nothing'"),
    ]:
        with pytest.raises(ValueError, match=says):
            find_tool(f"{tmp_path}/box.py:{name}")
    with pytest.raises(
        ValueError, match=r"tools must be calculator or file\.py:factory, got 'python'"
    ):
        find_tool("python")
    assert isinstance(find_tool("calculator"), Calculator)


def test_a_tokenizer_that_cannot_end_a_call():
    with pytest.raises(ValueError, match="the tokenizer has no token with '='"):
        ToolSampler(Author(None), word_tokenizer(["a"], r"."), Calculator())


def test_the_command_line(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "box.py").write_text(SANDBOX)
    arguments = ["eval", "--model=model", "--job=story", "--questions=4", "--samples=2"]
    out, _ = run_here([*arguments, "--tools=calculator", "--json"], tmp_path)
    told = json.loads(out)
    assert set(told["tool_calls"]) == {"answered", "failed"}
    assert set(told["scores"]) == {"greedy", "pass@1", "maj@2", "pass@2"}
    out, _ = run_here([*arguments, "--tools=calculator"], tmp_path)
    assert "calls answered, " in out
    _, err = run_here([*arguments, "--tools=box.py:broken"], tmp_path, code=2)
    assert err.endswith("error: tools box.py:broken: no sandbox here\n")
