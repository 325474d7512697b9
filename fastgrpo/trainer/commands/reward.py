"""`fastgrpo reward test`: tries a reward function on sample data, and on completions that should not pay."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from fastgrpo.trainer.data.foreign_text import presentable
from fastgrpo.trainer.data.jsonl import DataError
from fastgrpo.trainer.data.records import (
    ANSWER,
    COMPLETION,
    PROMPT,
    find_column,
    need_column,
    read_table,
    text_of,
)
from fastgrpo.trainer.options.inputs import need_file, need_reward_file
from fastgrpo.trainer.options.settings import SettingsError, fail, parse_options
from fastgrpo.trainer.rewards.process import ProcessReward, RewardFault

USAGE = "usage: fastgrpo reward test --reward FILE.py:FUNCTION --data FILE [--timeout SECONDS]"
SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class RewardTestOptions:
    """Options of `fastgrpo reward test`."""

    reward: str
    """Your function, as file.py:function or module:function."""
    data: str
    """Sample prompts with completions: .jsonl, .json, .csv or .parquet; every column is passed to the function."""
    timeout: float = 60.0
    """Seconds that it may take for the sample."""

    def __post_init__(self) -> None:
        """Reject what cannot be meant, naming the option."""
        if not self.timeout > 0:
            raise ValueError(f"--timeout must be above 0, got {self.timeout!r}")


@dataclass(frozen=True, slots=True)
class Sample:
    """What the function is called with."""

    prompts: list[str]
    completions: list[str]
    columns: dict[str, list[Any]]

    def call(self, reward: ProcessReward, completions: Sequence[str]) -> list[float | None]:
        """The rewards of other completions to the same prompts."""
        arguments = {
            **self.columns,
            "prompts": self.prompts,
            "completion_ids": [[0]] * len(self.prompts),
        }
        return reward(completions=completions, **arguments)


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code: 0 if the function kept the contract, 1 if not, 2 for options that cannot be meant."""
    rest = list(arguments)
    if not rest or rest[0] != "test":
        asked = bool(rest) and rest[0] in ("-h", "--help")
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    try:
        options = parse_options(RewardTestOptions, rest[1:], "fastgrpo reward test", __doc__ or "")
        need_file("--data", options.data)
        need_reward_file(options.reward)
        sample = read_sample(options.data)
    except (SettingsError, DataError) as error:
        return fail(error)
    reward = ProcessReward(options.reward, options.timeout)
    try:
        begun = time.perf_counter()
        reward.start()
        print(f"loaded {reward.name} in {time.perf_counter() - begun:.2f} s")
    except RewardFault as fault:
        return fail(ValueError(f"--reward: {fault}"))
    try:
        return examine(reward, sample)
    except RewardFault as fault:
        print(f"FAULT  {presentable(str(fault))}")
        return 1
    finally:
        reward.stop()


def read_sample(path: str) -> Sample:
    """Prompts, completions and all columns of a file."""
    records = read_table(path)
    prompt = need_column(path, records, PROMPT, "prompt")
    completion = need_column(path, records, COMPLETION, "completion")
    numbered = list(enumerate(records, start=1))
    columns = {name: [record.get(name) for record in records] for name in records[0]}
    answer = find_column(records, ANSWER)
    if answer is not None:
        columns["answer"] = [text_of(path, n, record, answer) for n, record in numbered]
    return Sample(
        [str(record[prompt]) for record in records],
        [text_of(path, n, record, completion) for n, record in numbered],
        columns,
    )


def examine(reward: ProcessReward, sample: Sample) -> int:
    """Calls the function and says what is noteworthy."""
    begun = time.perf_counter()
    values = sample.call(reward, sample.completions)
    seconds = time.perf_counter() - begun
    scored = [v for v in values if v is not None]
    print(
        f"{len(values)} samples in {seconds:.3f} s; {len(values) - len(scored)} not applicable (None)"
    )
    for text, value in list(zip(sample.completions, values, strict=True))[:SHOWN]:
        print(f"  {'None' if value is None else format(value, '8.3f')}  {shorten(text)}")
    problems = []
    if any(v != v for v in scored):
        problems.append(
            "some values are NaN: return None for completions that it does not apply to"
        )
    if not scored:
        problems.append("nothing was scored")
    elif min(scored) == max(scored):
        problems.append(f"all values are {scored[0]:g}: equal rewards teach nothing")
    if sample.call(reward, sample.completions) != values and not problems:
        problems.append("the same completions got other values the second time")
    if scored:
        print(f"min {min(scored):.3f}  mean {fmean(scored):.3f}  max {max(scored):.3f}")
        problems += probe(reward, sample, fmean(scored))
    for problem in problems:
        print(f"NOTE  {problem}")
    return 1 if problems else 0


def probe(reward: ProcessReward, sample: Sample, mean: float) -> list[str]:
    """Completions that a policy finds early if they pay."""
    probes = {
        "an empty completion": [""] * len(sample.prompts),
        "the prompt repeated": sample.prompts,
        "one word repeated": ["the " * 50] * len(sample.prompts),
        "its first words": [" ".join(text.split()[:3]) for text in sample.completions],
    }
    found = []
    for name, completions in probes.items():
        scored = [v for v in sample.call(reward, completions) if v is not None]
        if scored:
            print(f"  probe: {name:<22} mean {fmean(scored):.3f}")
            if fmean(scored) > mean:
                found.append(
                    f"{name} earns more than your samples ({fmean(scored):.3f} > {mean:.3f})"
                )
    return found


def shorten(text: str, width: int = 80) -> str:
    """One line of a text."""
    line = presentable(" ".join(text.split()))
    return line if len(line) <= width else line[: width - 3] + "..."
