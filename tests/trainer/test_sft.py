"""SFT: packed examples are computed as if alone; the base of the default job; `fastgrpo sft` as a user starts it."""

import json
import random
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fastgrpo import cli
from fastgrpo.trainer.data.batch import make_batch
from fastgrpo.trainer.data.packing import concatenate, pack
from fastgrpo.trainer.options.jobs import default_config
from fastgrpo.trainer.policy import Policy
from fastgrpo.trainer.sft.demonstrations import demonstrations, make_optimizers, sft, text_length
from tests.trainer.conftest import tiny_llama

PROMPTS = [[5, 9, 3], [7], [4, 4, 8, 8], [6, 2]]
COMPLETIONS = [[8, 1], [9, 30, 1], [3, 1], [11, 12, 13, 1]]
SIZE = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.5,
}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "granite"])
def test_packed_examples_do_not_see_each_other(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZE)).eval()
    policy = Policy(model)
    rows = concatenate(
        [len(p) + len(c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)], max_length=10
    )
    assert rows == [[0, 1], [2], [3]]
    packed = pack(rows, PROMPTS, COMPLETIONS, pad_id=0)
    alone = [make_batch([p], [c], 0) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert packed.token_ids.tolist() == [t for c in COMPLETIONS for t in c]

    together = policy(packed)
    apart = torch.cat([policy(batch) for batch in alone])
    assert torch.allclose(together, apart, rtol=0, atol=1e-5)
    assert together.mean().item() == pytest.approx(apart.mean().item(), abs=1e-6)
    grads = []
    for logprob in (together, apart):
        model.zero_grad()
        logprob.mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.linalg.vector_norm(grads[0] - grads[1]) <= 1e-5 * torch.linalg.vector_norm(
        grads[1]
    )


def test_rows_are_filled_in_order_and_never_over():
    rng = random.Random(0)
    lengths = [rng.randint(1, 50) for _ in range(300)]
    rows = concatenate(lengths, 64)
    assert [i for row in rows for i in row] == list(range(300))
    sizes = [sum(lengths[i] for i in row) for row in rows]
    assert max(sizes) <= 64
    assert sum(sizes) / (64 * len(rows)) > 0.7
    with pytest.raises(ValueError, match=r"example 1 has 65 tokens, more than max_length \(64\)"):
        concatenate([1, 65], 64)


def test_the_base_keeps_bare_and_worked_answers_in_one_batch(story, tokenizer):
    """Sorted by what is shown, bare answers would fill batches of their own and outweigh the worked ones."""
    config = replace(default_config("story"), sft_steps=40)
    late = list(demonstrations(story, tokenizer, config))[32:]
    assert len(late) == 8
    for batch in late:
        lengths = batch.cu_seqlens.diff()
        assert (lengths <= 3).sum() >= 12
        assert (lengths >= 15).sum() >= 2
    problem = story.sample("train", random.Random(0), 1)[0]
    assert text_length(problem) == len(problem.prompt) + len(problem.solution)


def test_base_training_lowers_the_loss_and_repeats_to_the_bit(story, tokenizer):
    config = replace(default_config("story"), sft_steps=24, sft_batch_size=8)

    def run():
        model = tiny_llama(tokenizer, hidden_size=32, intermediate_size=48, initializer_range=0.05)
        return list(sft(model, story, tokenizer, config)), model

    (losses, model), (again, other) = run(), run()
    assert losses == again
    assert losses[-1] < losses[0] - 0.5
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


def test_every_weight_has_exactly_one_optimizer(tokenizer):
    for tied in (True, False):
        model = tiny_llama(
            tokenizer, hidden_size=32, intermediate_size=48, tie_word_embeddings=tied
        )
        muon, adamw = make_optimizers(model, 1e-3)
        held = [[id(p) for p in o.param_groups[0]["params"]] for o in (muon, adamw)]
        assert sorted(held[0] + held[1]) == sorted(id(p) for p in model.parameters())
        assert id(model.get_input_embeddings().weight) in held[1]
        assert id(model.get_output_embeddings().weight) in held[1]
        assert len(held[0]) == 7 * 2


@pytest.fixture
def base(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_llama(
        tokenizer, hidden_size=32, intermediate_size=48, initializer_range=0.05
    ).save_pretrained("base")
    tokenizer.save_pretrained("base")
    return tmp_path


def sft_command(*arguments):
    return cli.main(
        ["sft", "--model-name-or-path=base", "--data=d.jsonl", "--output-dir=o", *arguments]
    )


@pytest.mark.parametrize("packing", ["--packing", "--no-packing"])
def test_sft_command(base, story, packing, capsys):
    problems = story.sample("train", random.Random(1), 120)
    rows = [{"prompt": p.prompt, "completion": p.solution} for p in problems]
    rows.append({"prompt": "Q: Ada has 3 coins. " * 30, "completion": "#### 3"})  # too long
    (base / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code = sft_command(
        packing,
        "--learning-rate=1e-2",
        "--num-train-epochs=3",
        "--max-length=160",
        "--warmup-steps=2",
    )
    assert code == 0, capsys.readouterr()
    summary = json.loads((base / "o" / "summary.json").read_text())
    assert summary["test_loss"]["after"] < summary["test_loss"]["before"] - 0.5
    assert summary["left_out"] >= 1
    records = [json.loads(line) for line in (base / "o" / "metrics.jsonl").read_text().splitlines()]
    rows_per_epoch = 120 / 2.6 if packing == "--packing" else 115
    assert len(records) == pytest.approx(3 * rows_per_epoch / 8, rel=0.35)
    assert AutoTokenizer.from_pretrained(base / "o" / "model").eos_token == "<eos>"
    AutoModelForCausalLM.from_pretrained(base / "o" / "model")


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ([{"prompt": "Q:"}], [], "no column for the completion"),
        (
            [{"prompt": "Q:", "completion": "A"}],
            ["--max-length=1"],
            "--data must hold an example of at most --max-length tokens",
        ),
        (
            [{"prompt": "Q:", "completion": "A"}],
            ["--model-name-or-path=none"],
            "--model-name-or-path must be a run, or a folder",
        ),
        (
            [{"prompt": "Q:", "completion": ["A"]}],
            [],
            "record 1: expected text in 'completion', got list",
        ),
    ],
)
def test_sft_names_what_is_wrong_and_gives_the_folder_back(base, rows, arguments, message, capsys):
    (base / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert sft_command(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not (base / "o").exists()
