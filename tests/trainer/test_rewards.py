"""Reward functions of users: every way to misbehave is bounded in time, named, and survived if the option says so."""

import os
import time
from dataclasses import replace

import pytest
import torch

from fastgrpo.trainer.options.jobs import default_config
from fastgrpo.trainer.rewards.library import SoftOverlong, math_verify, think_format
from fastgrpo.trainer.rewards.process import ProcessReward, RewardFault
from fastgrpo.trainer.rewards.scoring import ExactAnswer, Rewards, make_rewards
from fastgrpo.trainer.tasks.base import Problem
from fastgrpo.trainer.tasks.story import parse_answer

PROBLEM = Problem("2+2", "4", "#### 4", "2+2")
FUNCTIONS = """
import asyncio, os, subprocess, sys, time

def lengths(completions, **kwargs):
    print("a reward may print")
    return [len(text) for text in completions]

def picky(completions, answer):
    return [float(text == gold) for text, gold in zip(completions, answer)]

async def slowly(completions, **kwargs):
    await asyncio.sleep(0.01)
    return [1.0 for _ in completions]

def sometimes(completions, **kwargs):
    return [None if text == "skip" else 1.0 for text in completions]

def hang(completions, **kwargs):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])  # a grandchild that hangs as well
    while True:
        time.sleep(1)

def leave(completions, **kwargs):
    os._exit(7)

def quit(completions, **kwargs):
    sys.exit("bye")

def die(completions, **kwargs):
    os.kill(os.getpid(), 11)

def fail(completions, **kwargs):
    raise KeyError("no such column")

def few(completions, **kwargs):
    return [1.0]

def words(completions, **kwargs):
    return ["good" for _ in completions]

def nothing(completions, **kwargs):
    return None

def nan(completions, **kwargs):
    return [float("nan")] + [1.0] * (len(completions) - 1)

not_a_function = 3
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "mine.py"
    path.write_text(FUNCTIONS)
    return str(path)


def call(reward, texts=("a", "bc")):
    return reward(
        completions=list(texts),
        completion_ids=[[1]] * len(texts),
        prompts=["?"] * len(texts),
        answer=["a"] * len(texts),
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [("lengths", [1.0, 2.0]), ("picky", [1.0, 0.0]), ("slowly", [1.0, 1.0])],
)
def test_functions_sync_and_async_with_and_without_kwargs(file, name, expected):
    reward = ProcessReward(f"{file}:{name}", 30.0)
    assert call(reward) == expected
    assert call(reward) == expected  # the same process again
    assert reward.name == name
    reward.stop()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hang", "reward hang took longer than 1 s"),
        ("leave", "reward leave exited with code 7"),
        ("quit", "reward quit exited with code 1"),
        ("die", "reward die was killed by signal 11"),
        ("fail", r"reward fail failed: KeyError: 'no such column' \(mine.py:\d+\)"),
        ("few", "reward few must return 2 values, got 1 values"),
        ("words", "reward words failed: ValueError: could not convert"),
        ("nothing", "reward nothing failed: TypeError"),
    ],
)
def test_what_goes_wrong_is_named_within_the_time_out_and_the_next_call_works(file, name, message):
    reward = ProcessReward(f"{file}:{name}", 1.0)
    reward.start()
    for _ in range(2):
        begun = time.monotonic()
        with pytest.raises(RewardFault, match=message):
            call(reward)
        assert time.monotonic() - begun < 1.0 + 2.0
        reward.start()
    reward.stop()


def alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_time_out_kills_what_the_function_has_started(file):
    reward = ProcessReward(f"{file}:hang", 1.0)
    reward.start()
    group = reward._child.pid
    with pytest.raises(RewardFault):
        call(reward)
    for _ in range(50):  # the kernel may take a moment to bury the grandchild
        if not alive(group):
            break
        time.sleep(0.05)
    assert not alive(group)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{file}:absent", "has no function 'absent'"),
        ("{file}:not_a_function", "has no function 'not_a_function'"),
        ("no/such.py:f", "no Python file 'no/such.py'"),
        ("no_such_module:f", "ModuleNotFoundError"),
        (
            "exact",
            "reward must be one of exact_answer, think_format, soft_overlong, math_verify, or file.py:function",
        ),
    ],
)
def test_a_reward_that_cannot_be_loaded_is_an_option_error(file, spec, message):
    config = replace(default_config("story"), reward=spec.format(file=file))
    with pytest.raises(ValueError, match=message):
        make_rewards(config, {"exact_answer": ExactAnswer(parse_answer, 1)})


def rewards_of(file, names, **changes):
    specs = ",".join(f"{file}:{name}" if name in FUNCTIONS else name for name in names)
    config = replace(default_config("story"), reward=specs, **changes)
    return make_rewards(config, {"exact_answer": ExactAnswer(parse_answer, 1)})


def test_several_rewards_are_weighted(file):
    rewards = rewards_of(file, ["lengths", "exact_answer", "sometimes"], reward_weights="0.5,2,1")
    reward = rewards.score([PROBLEM] * 2, ["#### 4", "skip"], [[5, 1], [5, 1]])
    assert reward[0].tolist() == [6.0, 1.0, 1.0]
    assert reward[1, :2].tolist() == [4.0, 0.0]
    assert reward[1, 2].isnan()  # not applicable: no fault
    assert rewards.total(reward).tolist() == [0.5 * 6 + 2 + 1, 0.5 * 4]
    assert rewards.messages == []


def test_a_fault_stops_or_is_skipped_and_counted(file):
    with pytest.raises(RewardFault, match=r"reward fail failed: KeyError.*--on-reward-fault skip"):
        rewards_of(file, ["lengths", "fail"]).score([PROBLEM] * 2, ["a", "b"], [[1], [1]])
    rewards = rewards_of(file, ["lengths", "fail", "nan"], on_reward_fault="skip")
    reward = rewards.score([PROBLEM] * 2, ["a", "b"], [[1], [1]])
    assert reward[:, 0].tolist() == [1.0, 1.0]
    assert reward[:, 1].isnan().all()
    assert reward[0, 2].isnan()
    assert reward[1, 2] == 1.0
    assert rewards.fault_numbers() == {
        "rewards/lengths/faults": 0,
        "rewards/fail/faults": 2,
        "rewards/nan/faults": 1,
    }
    assert len(rewards.messages) == 2


def test_rewards_run_at_the_same_time(file):
    rewards = rewards_of(file, ["lengths", "hang"], on_reward_fault="skip", reward_timeout=1.0)
    second = ProcessReward(f"{file}:hang", 1.0)
    second.start()
    both = Rewards({**rewards.functions, "again": second}, on_fault="skip")
    begun = time.monotonic()
    both.score([PROBLEM], ["a"], [[1]])
    assert time.monotonic() - begun < 1.9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"reward_weights": "1,2"},
            "--reward-weights must hold one number per reward \\(1\\), got 2",
        ),
        ({"reward_weights": "a"}, "--reward-weights must be numbers with commas between, got 'a'"),
        ({"reward": "exact_answer,exact_answer"}, "reward names 'exact_answer' twice"),
    ],
)
def test_wrong_reward_options(changes, message):
    config = replace(default_config("story"), **changes)
    with pytest.raises(ValueError, match=message):
        make_rewards(config, {"exact_answer": ExactAnswer(parse_answer, 1)})


def test_think_format():
    texts = [
        "<think>a</think>b",
        "<think>a</think>",
        "a<think>b</think>c",
        "<think>a<think></think>b",
        "b",
        "</think>a",
    ]
    assert think_format(completions=texts) == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_soft_overlong():
    penalty = SoftOverlong(max_length=10, margin=4)
    assert penalty(completion_ids=[[0] * n for n in (1, 6, 7, 10, 12)]) == [0, 0, -0.25, -1, -1]


def test_math_verify():
    pytest.importorskip("math_verify")
    texts = [r"so $\boxed{\frac{1}{2}}$", "the answer is $0.5$", "$2$"]
    assert math_verify(completions=texts, answer=["1/2"] * 3) == [1.0, 1.0, 0.0]


def test_skipped_faults_leave_no_gradient_from_that_reward(file):
    """A group without any score has no advantage."""
    from fastgrpo.trainer.algorithm import make_advantage

    config = replace(default_config("story"), num_generations=2)
    reward = torch.tensor([[float("nan")], [float("nan")], [0.0], [1.0]])
    advantage = make_advantage(reward, config).advantage
    assert advantage[:2].tolist() == [0.0, 0.0]
    assert advantage[3] > 0.5
