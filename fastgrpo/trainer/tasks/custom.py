"""A user's own data: prompts from a file, and whatever other columns it has for the user's rewards."""

import random
import zlib
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from fastgrpo.trainer.data.jsonl import DataError
from fastgrpo.trainer.data.records import (
    ANSWER,
    PROMPT,
    find_column,
    need_column,
    read_table,
    text_of,
)
from fastgrpo.trainer.rewards.answers import LONGEST, normal_number, stated_answer
from fastgrpo.trainer.rewards.scoring import ExactAnswer
from fastgrpo.trainer.tasks.base import Message, OutcomeOnly, Problem, Reward, TinyModel


def read_problems(path: str) -> list[Problem]:
    """One problem per record; every column goes on to the rewards."""
    records = read_table(path)
    prompt = need_column(path, records, PROMPT, "prompt")
    answer = find_column(records, ANSWER)
    problems = []
    for number, record in enumerate(records, start=1):
        messages = conversation(path, number, record[prompt])
        text = messages[-1]["content"] if messages else text_of(path, number, record, prompt)
        gold = "" if answer is None else canonical(text_of(path, number, record, answer))
        problems.append(Problem(text, gold, "", text, messages=messages, columns=dict(record)))
    return problems


def conversation(path: str, number: int, value: object) -> tuple[Message, ...]:
    """A prompt that is a list of messages; nothing for any other prompt."""
    if not isinstance(value, list):
        return ()
    for message in value:
        fine = isinstance(message, dict) and all(
            isinstance(message.get(k), str) for k in ("role", "content")
        )
        if not fine:
            raise DataError(
                f"{path}, record {number}: expected messages with role and content, got {message!r}"
            )
    if not value:
        raise DataError(f"{path}, record {number}: the prompt holds no messages")
    return tuple(value)


def canonical(answer: str) -> str:
    """An answer in the form in which it is compared: what a worked solution states, numbers in one way of writing."""
    stated = stated_answer(answer) or answer.strip()
    return normal_number(stated) or stated


def load_custom(data: str, test_data: str | None) -> "Custom":
    """The job on a training file and perhaps a test file; without one a tenth of the prompts is held out."""
    splits: dict[str, list[Problem]] = {"train": [], "validation": [], "test": []}
    for problem in read_problems(data):
        bucket = zlib.crc32(problem.key.encode()) % 20
        split = "validation" if bucket == 0 else "test" if bucket in (1, 2) else "train"
        splits["train" if split == "test" and test_data is not None else split].append(problem)
    if test_data is not None:
        splits["test"] = read_problems(test_data)
    return Custom(splits)


@dataclass(frozen=True)
class Custom(OutcomeOnly):
    """The job on the problems of each split."""

    splits: dict[str, list[Problem]]
    about_base: str = "The base is the model that was given."
    about_result: str = (
        "A rise shows that more was found of what the base can do: compare pass@k before and after."
    )

    @property
    def model(self) -> TinyModel:
        """There is none for text that is not known beforehand."""
        raise ValueError("model_name_or_path must name a model for the job custom")

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """See `model`."""
        raise ValueError("model_name_or_path must name a model for the job custom")

    def sample(self, split: str, rng: random.Random, n: int) -> list[Problem]:
        """Prompts of a split; for evaluation each at most once."""
        problems = self.splits[split]
        if split == "train":
            return rng.choices(problems, k=n)
        return rng.sample(problems, min(n, len(problems)))

    def demonstration(self, problem: Problem, rng: random.Random, progress: float) -> str:
        """None is known: `fastgrpo sft` is for data with completions."""
        raise ValueError(
            "sft_steps must be 0 for the job custom; use `fastgrpo sft` on prompts with completions"
        )

    def rewards(self, eos_id: int) -> dict[str, Reward]:
        """1 for the right answer, else 0; none if the data has no answers."""
        if not any(problem.answer for problem in self.splits["train"]):
            return {}
        return {"exact_answer": ExactAnswer(self.parse_answer, eos_id)}

    def parse_answer(self, completion: str) -> str | None:
        """The answer that a completion states; a short one that states none may be the answer itself."""
        whole = completion.strip()
        short = whole if whole and "\n" not in whole and len(whole) <= LONGEST else None
        stated = stated_answer(completion) or short
        return None if stated is None else canonical(stated)
