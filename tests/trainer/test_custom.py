"""Files of users: formats, columns, conversations, faults; and a whole run on a user's data, reward and model."""

import json

import pytest

from fastgrpo import cli
from fastgrpo.trainer.data.jsonl import DataError
from fastgrpo.trainer.data.records import read_table
from fastgrpo.trainer.data.text import prompt_ids
from fastgrpo.trainer.options.jobs import default_config
from fastgrpo.trainer.rewards.scoring import Rewards
from fastgrpo.trainer.tasks.base import Problem
from fastgrpo.trainer.tasks.custom import canonical, load_custom, read_problems
from tests.trainer.conftest import tiny_llama

ROWS = [{"question": f"{i}+1?", "answer": str(i + 1), "level": i % 3} for i in range(40)]


def as_jsonl(path):
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")


def as_json(path):
    path.write_text(json.dumps(ROWS))


def as_csv(path):
    lines = [f'"{r["question"]}",{r["answer"]},{r["level"]}' for r in ROWS]
    path.write_text("\n".join(["question,answer,level", *lines]))


def as_parquet(path):
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(ROWS), path)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_formats_hold_the_same_problems(tmp_path, kind):
    path = tmp_path / f"d.{kind}"
    globals()[f"as_{kind}"](path)
    problems = read_problems(str(path))
    assert [(p.prompt, p.answer) for p in problems] == [(r["question"], r["answer"]) for r in ROWS]
    assert [int(p.columns["level"]) for p in problems] == [r["level"] for r in ROWS]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.txt", "x", r"d\.txt: expected .jsonl, .json, .csv or .parquet"),
        ("d.jsonl", '{"question": "a"}\n{"question"', r"d\.jsonl, line 2: not JSON"),
        ("d.json", '{"a": 1}', r"d\.json: expected a list of objects"),
        ("d.json", "[1", r"d\.json: "),
        ("d.csv", "question,answer\na,b\nc\n", r"d\.csv, line 3: expected 2 cells"),
        ("d.csv", 'question\n"a', r"d\.csv, line \d: unexpected end"),
        (
            "d.jsonl",
            '{"text": "a"}',
            r"no column for the prompt \(one of prompt, question.*\), got text",
        ),
        ("d.jsonl", "", r"no column for the prompt .*got no records"),
        ("d.jsonl", '{"prompt": {"a": 1}}', r"record 1: expected text in 'prompt', got dict"),
        ("d.jsonl", '{"prompt": []}', r"record 1: the prompt holds no messages"),
        (
            "d.jsonl",
            '{"prompt": [{"role": "user"}]}',
            r"record 1: expected messages with role and content",
        ),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_problems(str(path))


def test_a_missing_file_and_a_broken_parquet_are_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.csv: No such file"):
        read_table(str(tmp_path / "none.csv"))
    pytest.importorskip("pyarrow")
    (tmp_path / "d.parquet").write_bytes(b"PAR1 this is no parquet file")
    with pytest.raises(DataError, match=r"d\.parquet: "):
        read_table(str(tmp_path / "d.parquet"))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 2\n#### 1,200.", "1200"),
        (" Paris ", "Paris"),
        (r"\boxed{x+1}", "x+1"),
        ("5.0", "5"),
        ("", ""),
    ],
)
def test_answers_are_compared_in_one_form(text, answer):
    assert canonical(text) == answer


def test_splits_of_one_file_share_no_prompt(tmp_path):
    path = tmp_path / "d.jsonl"
    as_jsonl(path)
    splits = load_custom(str(path), None).splits
    keys = [{p.key for p in problems} for problems in splits.values()]
    assert all(keys)
    assert len(set.union(*keys)) == sum(map(len, keys)) == len(ROWS)


def test_other_columns_reach_the_rewards_under_their_names(tmp_path):
    path = tmp_path / "d.jsonl"
    as_jsonl(path)
    problems = read_problems(str(path))[:4]
    seen = {}

    def reward(**columns):
        seen.update(columns)
        return [0.0] * 4

    Rewards({"r": reward}).score(problems, ["x"] * 4, [[1]] * 4)
    assert seen["level"] == [0, 1, 2, 0]
    assert seen["prompts"] == [r["question"] for r in ROWS[:4]]
    assert seen["answer"] == ["1", "2", "3", "4"]


def test_conversations_go_through_the_chat_template(tmp_path, tokenizer):
    path = tmp_path / "d.jsonl"
    talk = [{"role": "system", "content": "Q: Ada"}, {"role": "user", "content": "has 3 coins."}]
    path.write_text(json.dumps({"prompt": talk, "answer": "3"}))
    (problem,) = read_problems(str(path))
    assert problem.prompt == "has 3 coins."
    plain = prompt_ids(tokenizer, [problem])
    assert plain == [tokenizer("has 3 coins.")["input_ids"]]
    try:
        parts = "{% for m in messages %}{{ m.content }}{% endfor %}"
        tokenizer.chat_template = parts + "{% if add_generation_prompt %}A:{% endif %}"
        assert prompt_ids(tokenizer, [problem]) == [tokenizer("Q: Adahas 3 coins.A:")["input_ids"]]
        text_only = Problem("Q:", "", "", "")
        assert prompt_ids(tokenizer, [text_only]) == [tokenizer("Q:")["input_ids"]]
    finally:
        tokenizer.chat_template = None


def test_a_run_on_a_users_data_reward_and_model(tmp_path, tokenizer, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = tiny_llama(tokenizer, hidden_size=32, intermediate_size=48)
    model.save_pretrained("base")
    tokenizer.save_pretrained("base")
    rows = [{"prompt": f"Q: Ada has {i} coins. How many?", "want": i} for i in range(1, 20)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mine.py").write_text(
        "def short(completions, want, **kwargs):\n    return [-len(c) + 0.0 * w for c, w in zip(completions, want)]\n"
    )
    code = cli.main(
        ["train", "custom", "--data=d.jsonl", "--model-name-or-path=base", "--reward=mine.py:short,soft_overlong",
         "--reward-weights=1,0.5", "--max-steps=2", "--prompts-per-step=2", "--num-generations=3",
         "--max-completion-length=6", "--eval-questions=0", "--eval-steps=0", "--output-dir=o", "--beta=0"]
    )  # fmt: skip
    assert code == 0, capsys.readouterr()
    records = [
        json.loads(line) for line in (tmp_path / "o" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [r["step"] for r in records] == [1, 2]
    r = records[0]
    assert r["reward"] == pytest.approx(
        r["rewards/short/mean"] + 0.5 * r["rewards/soft_overlong/mean"], rel=1e-5
    )
    assert r["rewards/short/mean"] < 0
    summary = json.loads((tmp_path / "o" / "summary.json").read_text())
    assert summary["base"] is None
    assert default_config("custom").sft_steps == 0


def test_a_reward_that_fails_stops_the_run_with_what_it_has(
    tmp_path, tokenizer, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "def broken(completions, **kwargs):\n    raise RuntimeError('no judge')\n"
    )
    small = [
        "--max-steps=2",
        "--prompts-per-step=2",
        "--num-generations=2",
        "--eval-questions=0",
        "--eval-steps=0",
    ]
    code = cli.main(["train", "copy", "--reward=mine.py:broken", "--output-dir=o", *small])
    assert code == 1
    assert "reward broken failed: RuntimeError: no judge (mine.py:2)" in capsys.readouterr().out
    assert (tmp_path / "o" / "model").is_dir()
    code = cli.main(
        [
            "train",
            "copy",
            "--reward=mine.py:broken,right_tokens",
            "--on-reward-fault=skip",
            "--output-dir=p",
            *small,
        ]
    )
    assert code == 0
    out = capsys.readouterr().out
    assert out.count("no judge") == 1  # said once, counted always
    records = [
        json.loads(line) for line in (tmp_path / "p" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [r["rewards/broken/faults"] for r in records] == [4, 4]


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("so 3 + 4 = 7\n#### 7.0", "7"),  # as stated, in one way of writing numbers
        (" Paris ", "Paris"),  # nothing else than an answer
        ("first this\nthen that", None),  # working that states nothing
        ("word " * 60, None),
        ("", None),
    ],
)
def test_a_short_completion_may_be_the_answer_itself(tmp_path, completion, answer):
    as_json(tmp_path / "d.json")
    assert load_custom(str(tmp_path / "d.json"), None).parse_answer(completion) == answer


def test_data_without_answers_trains_on_a_reward_and_measures_no_accuracy(
    tmp_path, monkeypatch, tokenizer, capsys
):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Q: Ada has {i} coins. How many?\nA:\n"} for i in range(30)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mine.py").write_text(
        "def short(completion_ids, **columns):\n    return [-float(len(i)) for i in completion_ids]\n"
    )
    tiny_llama(tokenizer, hidden_size=16, intermediate_size=24).save_pretrained("base")
    tokenizer.save_pretrained("base")
    small = ["--max-steps=2", "--prompts-per-step=2", "--num-generations=2", "--output-dir=o"]
    small += ["--max-completion-length=4", "--eval-steps=1", "--no-report"]
    command = ["train", "custom", "--data=d.jsonl", "--model-name-or-path=base", *small]
    assert cli.main([*command, "--reward=mine.py:short"]) == 0
    assert capsys.readouterr().out.count("no accuracy is measured") == 1
    summary = json.loads((tmp_path / "o" / "summary.json").read_text())
    assert summary["base"] is summary["final"] is None
