"""The built-in jobs: right answers, splits that share nothing, tokenizers that lose nothing."""

import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from fastgrpo.trainer.data.jsonl import DataError
from fastgrpo.trainer.options.inputs import check_inputs
from fastgrpo.trainer.options.jobs import FROM_FILES, JOBS, default_config, make_task
from fastgrpo.trainer.options.settings import SettingsError
from fastgrpo.trainer.rewards.scoring import ExactAnswer, Rewards
from fastgrpo.trainer.tasks import copy_digits, gsm8k_equations
from fastgrpo.trainer.tasks.story import LARGEST, Story, make_problem, parse_answer, split_of

GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k"
needs_gsm8k = pytest.mark.skipif(not GSM8K.is_dir(), reason="no GSM8K files beside the checkout")


def test_story_solutions_are_right_step_by_step():
    rng = random.Random(0)
    for _ in range(2000):
        problem = make_problem(rng)
        *steps, last = problem.solution.split("\n")
        value = int(re.match(r"\d+", problem.key)[0])
        for step in steps:
            left, operator, right, result = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+)", step).groups()
            assert int(left) == value
            exact = {"+": value + int(right), "-": value - int(right),
                     "*": value * int(right), "/": value / int(right)}[operator]  # fmt: skip
            value = int(result)
            assert value == exact
            assert 1 <= value <= LARGEST
        assert last == f"#### {value}"
        assert problem.answer == str(value)
        assert 3 <= len(steps) <= 5


def test_story_question_tells_the_numbers_of_its_chain_in_order():
    problem = make_problem(random.Random(3))
    told = re.findall(r"\d+", problem.prompt.replace("keeps 1 of ", "keeps "))
    assert told == re.findall(r"\d+", problem.key)


def test_story_splits_share_no_chain(story):
    chains = {
        split: {p.key for p in story.sample(split, random.Random(split), 3000)}
        for split in ("train", "validation", "test")
    }
    assert not chains["train"] & chains["test"]
    assert not chains["train"] & chains["validation"]
    assert not chains["validation"] & chains["test"]


def test_story_split_ignores_names_and_objects(story):
    problems = story.sample("test", random.Random(0), 200)
    renamed = [p.prompt.replace("Ada", "Ben").replace("coins", "toys") for p in problems]
    assert any(new != p.prompt for new, p in zip(renamed, problems, strict=True))
    assert all(
        split_of(p.key) == "test" for p in problems
    )  # decided by the chain, which has no words
    assert all(not re.search("[A-Za-z]", p.key) for p in problems)


def test_story_split_is_the_same_in_every_version():
    # Frozen: a change moves questions between train and test, and cached bases would have seen test questions.
    frozen = {
        "train": ("13+3-7-6+17", "4-3*2-1+11/2"),
        "validation": ("11+9-17+1/4*4", "16-4+4+1-13"),
        "test": ("10/2+1+12+1", "4-1+7-9"),
    }
    assert all(split_of(chain) == split for split, chains in frozen.items() for chain in chains)
    counts = Counter(split_of(make_problem(random.Random(i)).key) for i in range(3000))
    assert 0.75 < counts["train"] / 3000 < 0.85


def test_story_demonstrations_are_worked_first_and_mostly_bare_at_the_end(story):
    rng = random.Random(0)
    problems = story.sample("train", rng, 400)
    early = [story.demonstration(p, rng, 0.5) for p in problems]
    late = [story.demonstration(p, rng, 0.99) for p in problems]
    assert early == [p.solution for p in problems]
    bare = sum(text == f"#### {p.answer}" for text, p in zip(late, problems, strict=True))
    assert 0.65 < bare / 400 < 0.85


def test_tokenizers_keep_every_character_and_know_every_word(story):
    for task in (story, copy_digits.CopyDigits()):
        tokenizer = task.tokenizer()
        for problem in task.sample("train", random.Random(5), 300):
            for text in (problem.prompt, problem.solution):
                ids = tokenizer(text)["input_ids"]
                assert tokenizer.unk_token_id not in ids
                assert tokenizer.decode(ids) == text


def test_story_numbers_are_single_tokens(tokenizer):
    assert len(tokenizer("20")["input_ids"]) == 1
    assert len(tokenizer("13+7=20\n")["input_ids"]) == 6
    assert len(tokenizer("#### 20")["input_ids"]) == 2


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("7+2=9\n#### 9", "9"),
        ("#### 9", "9"),
        ("7+2=9\n9", None),  # a number without the mark is no answer
        ("", None),
        ("####  ", ""),
        ("#### 9\n#### 8", "9\n#### 8"),  # two answers are not the first one
    ],
)
def test_parse_answer(completion, answer):
    assert parse_answer(completion) == answer


def test_exact_answer_scores_only_what_ended_by_itself():
    reward = ExactAnswer(parse_answer, eos_id=1)
    problem = make_problem(random.Random(0))
    texts = [problem.solution, problem.solution, "#### x", ""]
    ids = [[5, 1], [5, 6], [5, 1], [1]]
    assert Rewards({"a": reward}).score([problem] * 4, texts, ids).tolist() == [
        [1.0],
        [0.0],
        [0.0],
        [0.0],
    ]


def test_score_turns_none_into_nan_and_names_a_reward_of_the_wrong_length():
    problem = make_problem(random.Random(0))
    table = Rewards({"a": lambda **_: [1.0, None]}).score([problem] * 2, ["", ""], [[1], [1]])
    assert table[0, 0] == 1.0
    assert table[1, 0].isnan()
    with pytest.raises(ValueError, match="reward short must return 2 values, got 1"):
        Rewards({"short": lambda **_: [1.0]}).score([problem] * 2, ["", ""], [[1], [1]])


def test_copy_reward_counts_places_and_the_end():
    reward = copy_digits.RightTokens(eos_id=1)
    texts = ["371", "37", "371", "3711", "173", ""]
    ids = [[5, 9, 3, 1], [5, 9, 1], [5, 9, 3, 4], [5, 9, 3, 3], [3, 9, 5, 1], [1]]
    got = reward(completions=texts, completion_ids=ids, answer=["371"] * 6)
    assert got == [1.0, 0.5, 0.75, 0.75, 0.5, 0.0]


def test_copy_splits_share_nothing_and_cover_all_numbers():
    task = copy_digits.CopyDigits()
    tests = task.sample("test", random.Random(0), 10**6)
    validation = task.sample("validation", random.Random(0), 10**6)
    train = {p.key for p in task.sample("train", random.Random(0), 20_000)}
    keys = [p.key for p in tests + validation]
    assert len(set(keys)) == len(keys)
    assert not train & set(keys)
    assert len(train) + len(keys) == 1000


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_equations_keep_two_numbers_with_a_whole_result():
    text = "<<48/2=24>>24 <<1+2+3=6>> <<7/2=3.5>> <<100-1=99>> <<5*3=15>> <<.5*4=2>> <<6-8=-2>> << 9 - 4 = 5>>"
    assert gsm8k_equations.equations(text) == [("48/2", "24"), ("5*3", "15"), ("9-4", "5")]


def test_equations_of_a_test_file_are_told_apart_by_whether_they_were_trained_on(tmp_path):
    known = [f"{a}+{b}" for a in range(1, 30) for b in range(1, 5)]
    train = write(tmp_path / "a.jsonl", *(f'{{"answer": "<<{e}={eval(e)}>>"}}' for e in known))
    test = write(tmp_path / "b.jsonl", '{"answer": "<<1+1=2>> <<90+9=99>>"}')
    task = gsm8k_equations.load_equations(train, test)
    trained = {p.key for p in task.splits["train"]}
    slices = {p.key: p.slice for p in task.splits["test"]}
    assert slices["90+9"] == "unseen"
    assert slices["1+1"] == ("seen" if "1+1" in trained else "unseen")
    assert not trained & {p.key for p in task.splits["validation"]}


def test_without_a_test_file_the_expressions_of_the_training_file_are_divided(tmp_path):
    known = [f"{a}+{b}" for a in range(1, 50) for b in range(1, 9)]
    path = write(tmp_path / "a.jsonl", *(f'{{"answer": "<<{e}={eval(e)}>>"}}' for e in known))
    splits = gsm8k_equations.load_equations(path, None).splits
    keys = {name: {p.key for p in problems} for name, problems in splits.items()}
    assert all(keys.values())
    assert len(set.union(*keys.values())) == sum(map(len, keys.values())) == len(known)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"answer": "<<1+1=2', r"line 2: not JSON \(Unterminated string"),
        ('["a"]', "line 2: expected an object, got list"),
        ('{"question": "?"}', "line 2: expected text in field 'answer'"),
        ('{"answer": 3}', "line 2: expected text in field 'answer'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = write(tmp_path / "bad.jsonl", '{"answer": "<<1+1=2>>"}', line, '{"answer": ""}')
    with pytest.raises(DataError, match=r"bad\.jsonl, " + message):
        gsm8k_equations.load_equations(path, None)


def test_a_file_that_is_missing_or_has_no_equation_is_named(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        gsm8k_equations.load_equations(str(tmp_path / "none.jsonl"), None)
    with pytest.raises(DataError, match="no equation"):
        gsm8k_equations.load_equations(write(tmp_path / "a.jsonl", '{"answer": "no"}'), None)


@needs_gsm8k
def test_equations_of_the_real_files_are_true_and_tokenised():
    task = gsm8k_equations.load_equations(str(GSM8K / "train.jsonl"), str(GSM8K / "test.jsonl"))
    tokenizer = task.tokenizer()
    assert len(task.splits["test"]) == 2429
    assert {p.slice for p in task.splits["test"]} == {"seen", "unseen"}
    for problem in task.splits["train"][::10] + task.splits["test"][::10]:
        a, operator, b = re.fullmatch(r"(\d+)([-+*/])(\d+)", problem.key).groups()
        truth = {
            "+": int(a) + int(b),
            "-": int(a) - int(b),
            "*": int(a) * int(b),
            "/": int(a) / int(b),
        }[operator]
        assert truth == int(problem.answer)
        for text in (problem.prompt, problem.solution):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text


def test_every_job_has_defaults_and_says_what_it_needs():
    for job in JOBS:
        config = default_config(job)
        if job in FROM_FILES:
            with pytest.raises(SettingsError, match=f"the job {job} needs --data FILE"):
                check_inputs(config)
        else:
            check_inputs(config)
            assert make_task(config).sample("test", random.Random(0), 1)
    with pytest.raises(SettingsError, match="--data does not belong to the job story"):
        check_inputs(replace(default_config("story"), data="x"))
    assert isinstance(make_task(default_config("story")), Story)
