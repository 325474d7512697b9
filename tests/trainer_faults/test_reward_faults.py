"""Reward functions that misbehave in every way we could think of: bounded, named, survived, without orphans.

A fault is a message and a killed process; what is merely odd (a bool, a tensor, much output) is taken as it is meant.
"""

import os
import re
import time
from pathlib import Path

import pytest

from fastgrpo.trainer.rewards.process import ProcessReward, RewardFault
from fastgrpo.trainer.rewards.scoring import Rewards
from fastgrpo.trainer.tasks.base import Problem

TIMEOUT_S = 1.5
GRACE_S = 5.0  # on a machine that does other things as well
FUNCTIONS = """
import asyncio, ctypes, os, resource, signal, subprocess, sys, threading, time

def count(completions):
    return len(completions)

def raises(completions, **_):
    raise LookupError("no such answer")

def leaves_by_exception(completions, **_):
    sys.exit("bye")

def interrupts_itself(completions, **_):
    raise KeyboardInterrupt

def hangs(completions, **_):
    time.sleep(1000)

def hangs_in_c(completions, **_):
    return [float(len(str(7 ** (10 ** 9))))]

def will_not_be_told(completions, **_):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while True:
        pass

def never_awakes(completions, **_):
    return asyncio.run(asyncio.Event().wait())

def exits(completions, **_):
    os._exit(7)

def crashes(completions, **_):
    ctypes.string_at(0)

def is_killed_for_its_memory(completions, **_):
    os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does it

def allocates(completions, **_):
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    return [float(len(bytearray(10 << 30)))]

def recurses(completions, **_):
    return recurses(completions)

def forks_and_hangs(completions, **_):
    for _ in range(5):
        if os.fork() == 0:
            time.sleep(1000)
    time.sleep(1000)

def fork_bomb(completions, **_):
    for _ in range(7):  # 128 processes
        os.fork()
    time.sleep(1000)

def leaves_a_daemon(completions, **_):
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)  # the grandchild is nobody's child now
    time.sleep(1000)

def returns_few(completions, **_):
    return [1.0]

def returns_many(completions, **_):
    return [1.0] * (count(completions) + 1)

def returns_nothing(completions, **_):
    pass

def returns_text(completions, **_):
    return "x" * count(completions)

def returns_dictionary(completions, **_):
    return {"a": 1.0, "b": "c"}

def returns_objects(completions, **_):
    return [object()] * count(completions)

def returns_nan(completions, **_):
    return [1.0, float("nan")]

def returns_infinity(completions, **_):
    return [float("-inf"), 1.0]

def returns_huge_integers(completions, **_):
    return [10 ** 400] * count(completions)

def returns_much(completions, **_):
    return iter(lambda: 1.0, 2.0)

def answers_for_us(completions, **_):
    for fd in range(3, 4096):
        try:
            os.write(fd, b"not json\\n")
        except OSError:
            pass
    return [1.0] * count(completions)

def answers_with_text(completions, **_):
    for fd in range(3, 4096):
        try:
            os.write(fd, b'{"rewards": ["a", "b"]}\\n')
        except OSError:
            pass
    return [1.0] * count(completions)

def closes_everything(completions, **_):
    os.closerange(0, 64)
    return [1.0] * count(completions)

def closes_stdout(completions, **_):
    sys.stdout.close()
    os.closerange(1, 2)
    return [1.0] * count(completions)

def prints_much(completions, **_):
    for _ in range(200):
        print("x" * 100_000)
    return [1.0] * count(completions)

def returns_bools(completions, **_):
    return [True, False]

def returns_tensor(completions, **_):
    import torch
    return torch.ones(count(completions))

def returns_generator(completions, **_):
    return (1.0 for _ in completions)

def does_not_apply(completions, **_):
    return [None, 1.0]

def starts_a_thread(completions, **_):
    threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
    return [1.0] * count(completions)

def moves(completions, **_):
    os.chdir("/")
    os.umask(0)
    os.environ.clear()
    return [1.0] * count(completions)
"""

LATE, ENDED = f"took longer than {TIMEOUT_S:g} s", "was killed by signal"
FAULTS = {
    "raises": r"LookupError: no such answer \(mine.py:\d+\)",
    "leaves_by_exception": "exited with code 1",
    "interrupts_itself": r"exited with code 1|was killed by signal 2",
    "hangs": LATE,
    "hangs_in_c": LATE,
    "will_not_be_told": LATE,
    "never_awakes": LATE,
    "exits": "exited with code 7",
    "crashes": ENDED + " 11",
    "is_killed_for_its_memory": ENDED + " 9",
    "allocates": "MemoryError",
    "recurses": "RecursionError",
    "forks_and_hangs": LATE,
    "fork_bomb": LATE,
    "leaves_a_daemon": LATE,
    "returns_few": "must return 2 values, got 1",
    "returns_many": "must return 2 values, got 3",
    "returns_nothing": "TypeError",
    "returns_text": "ValueError: could not convert",
    "returns_dictionary": "ValueError: could not convert",
    "returns_objects": "TypeError",
    "returns_huge_integers": "OverflowError",
    "returns_much": LATE + r"|MemoryError|was killed",
    "answers_for_us": "wrote to the connection",
    "answers_with_text": "wrote to the connection",
    "closes_everything": r"exited with code|closed its connection|was killed|took longer",
}
VALUES = {
    "closes_stdout": [1.0, 1.0],
    "prints_much": [1.0, 1.0],
    "returns_bools": [1.0, 0.0],
    "returns_tensor": [1.0, 1.0],
    "returns_generator": [1.0, 1.0],
    "does_not_apply": [None, 1.0],
    "starts_a_thread": [1.0, 1.0],
    "moves": [1.0, 1.0],
}
PROBLEM = Problem("2+2", "4", "#### 4", "2+2")


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("rewards") / "mine.py"
    path.write_text(FUNCTIONS)
    return str(path)


def marked(word: str) -> list[int]:
    """Processes of this machine whose command line or memory of a parent's names the test's folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if word.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def gone(word: str) -> bool:
    """Whether no process is left that inherited the mark; the kernel may take a moment to bury them."""
    end = time.monotonic() + 10
    while marked(word):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def call(reward: ProcessReward) -> list[float | None]:
    return reward(
        completions=["a", "bc"], completion_ids=[[1], [2]], prompts=["?"] * 2, answer=["a"] * 2
    )


def trial(file: str, name: str, monkeypatch, calls: int) -> None:
    """Several calls of one function: each ends as it must, in time, and nothing of it is left afterwards."""
    mark = f"fastgrpo-orphan-{os.getpid()}-{name}"
    monkeypatch.setenv("FASTGRPO_TEST_MARK", mark)
    reward = ProcessReward(f"{file}:{name}", 20.0 if name == "returns_tensor" else TIMEOUT_S)
    for _ in range(calls):
        reward.start()
        begun = time.monotonic()
        if name in FAULTS:
            with pytest.raises(RewardFault, match=f"reward {name} ") as caught:
                call(reward)
            assert re.search(FAULTS[name], str(caught.value)), str(caught.value)
            assert time.monotonic() - begun < TIMEOUT_S + GRACE_S
        else:
            assert call(reward) == VALUES[name]
    reward.stop()
    assert gone(mark), f"left behind: {marked(mark)}"


@pytest.mark.parametrize("name", [*FAULTS, *VALUES])
def test_each_kind(file, name, monkeypatch):
    trial(file, name, monkeypatch, calls=1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", [*FAULTS, *VALUES])
def test_each_kind_five_times(file, name, monkeypatch):
    trial(file, name, monkeypatch, calls=5)


@pytest.mark.parametrize("name", ["returns_nan", "returns_infinity"])
def test_numbers_that_are_none_are_named_by_function_and_completion(file, name):
    reward = ProcessReward(f"{file}:{name}", TIMEOUT_S)
    rewards = Rewards({name: reward}, on_fault="skip")
    scores = rewards.score([PROBLEM] * 2, ["a", "b"], [[1], [1]])
    reward.stop()
    bad = 1 if name == "returns_nan" else 0
    assert scores.isnan()[:, 0].tolist() == [bad == 0, bad == 1]
    assert re.search(rf"reward {name} .* for completion {bad}", rewards.messages[0])
    assert rewards.faults == {name: 1}


def test_what_is_not_scored_is_no_fault(file):
    reward = ProcessReward(f"{file}:does_not_apply", TIMEOUT_S)
    rewards = Rewards({"r": reward})
    assert rewards.score([PROBLEM] * 2, ["a", "b"], [[1], [1]])[0].isnan()
    reward.stop()
    assert rewards.messages == []


def test_memory_that_runs_out_takes_the_reward_and_not_the_trainer(file):
    reward = ProcessReward(f"{file}:returns_bools", TIMEOUT_S)
    reward.start()
    assert reward._child is not None
    child = int(Path(f"/proc/{reward._child.pid}/oom_score_adj").read_text())
    reward.stop()
    assert child == 1000 > int(Path("/proc/self/oom_score_adj").read_text())
