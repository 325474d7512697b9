"""The grader on GSM8K's own solutions and on altered ones, and the job that reads its files."""

import json
import random
import re
from pathlib import Path

import pytest

from fastgrpo.trainer.data.jsonl import DataError
from fastgrpo.trainer.options.jobs import default_config, make_task
from fastgrpo.trainer.rewards.answers import normal_number, stated_answer
from fastgrpo.trainer.tasks.gsm8k import load_gsm8k, read_problems

GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k"
needs_gsm8k = pytest.mark.skipif(not GSM8K.is_dir(), reason="no GSM8K files beside the checkout")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("18", "18"),
        ("1,200.0", "1200"),
        ("-3", "-3"),
        ("+7", "7"),
        ("$5.", "5"),
        ("5%", "5"),
        ("18 apples", "18"),
        ("**42**", "42"),
        ("0.50", "0.5"),
        ("-0.0", "0"),
        (".5", "0.5"),
        ("007", "7"),
        ("1,23", None),  # a comma that groups nothing
        ("1/2", None),
        ("4.2.1", None),
        ("1e5", None),
        ("five", None),
        ("", None),
        ("$", None),
    ],
)
def test_normal_number(text, number):
    assert normal_number(text) == number


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 3+4=7\n#### 7", "7"),
        ("#### 7\n#### 8", "8"),  # the last statement counts
        (r"\boxed{12} and the answer is 5", "12"),  # the most explicit kind counts
        ("The answer is: 5 apples.", "5 apples."),
        ("####", None),
        ("3+4=7", None),  # a number on the way is no answer
    ],
)
def test_stated_answer(text, answer):
    assert stated_answer(text) == answer


def altered(solution: str, rng: random.Random) -> str:
    """The solution with another answer stated, one digit changed, removed or added."""
    body, _, answer = solution.rpartition("#### ")
    digits = [i for i, c in enumerate(answer) if c.isdigit()]
    i = rng.choice(digits)
    kind = rng.randrange(3)
    if kind == 0:
        other = str((int(answer[i]) + rng.randint(1, 9)) % 10)
        return f"{body}#### {answer[:i]}{other}{answer[i + 1 :]}"
    if kind == 1:
        return f"{body}#### {answer}{rng.randint(1, 9)}"
    return (
        f"{body}#### -{answer}"
        if set(answer) - set("0.,-") and "-" not in answer
        else f"{body}#### 9{answer}"
    )


@needs_gsm8k
def test_every_gold_solution_is_right_and_every_altered_one_wrong():
    rng = random.Random(0)
    problems = read_problems(str(GSM8K / "test.jsonl"))
    assert len(problems) == 1319
    reward = load_gsm8k(str(GSM8K / "test.jsonl"), None).rewards(eos_id=1)["exact_answer"]
    gold = [p.answer for p in problems]
    ids = [[5, 1]] * len(problems)
    lines = (GSM8K / "test.jsonl").read_text().splitlines()
    full = [json.loads(line)["answer"] for line in lines]
    assert sum(reward(completions=full, completion_ids=ids, answer=gold)) == 1319
    assert (
        sum(reward(completions=[p.solution for p in problems], completion_ids=ids, answer=gold))
        == 1319
    )
    wrong = [altered(text, rng) for text in full]
    assert sum(reward(completions=wrong, completion_ids=ids, answer=gold)) == 0
    stripped = [re.sub(r"\n#### .*", "", text) for text in full]  # no statement, no reward
    assert sum(reward(completions=stripped, completion_ids=ids, answer=gold)) == 0


@needs_gsm8k
def test_no_training_record_is_lost():
    task = load_gsm8k(str(GSM8K / "train.jsonl"), str(GSM8K / "test.jsonl"))
    assert len(task.splits["train"]) + len(task.splits["validation"]) == 7473
    assert len(task.splits["test"]) == 1319
    assert not any("<<" in p.solution for p in task.splits["train"])
    assert not {p.key for p in task.splits["train"]} & {p.key for p in task.splits["validation"]}


def test_a_record_without_an_answer_is_named(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"question": "q", "answer": "#### 1"}\n{"question": "q", "answer": "no"}\n')
    with pytest.raises(DataError, match=r"d\.jsonl, record 2: the answer does not end"):
        read_problems(str(path))


def test_the_job_needs_a_model(tmp_path):
    from dataclasses import replace

    from fastgrpo.trainer.setup import make_run

    path = tmp_path / "d.jsonl"
    path.write_text('{"question": "q", "answer": "#### 1"}\n')
    config = replace(default_config("gsm8k"), data=str(path))
    assert make_task(config).splits
    with pytest.raises(ValueError, match="the job gsm8k needs --model-name-or-path"):
        make_run(config)
