"""GSM8K itself, or any file of `question` and worked `answer` ending in `#### number`: for a model of the user's."""

import random
import re
import zlib
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from fastgrpo.trainer.data.jsonl import DataError, parse_lines
from fastgrpo.trainer.rewards.answers import final_number
from fastgrpo.trainer.rewards.scoring import ExactAnswer
from fastgrpo.trainer.tasks.base import OutcomeOnly, Problem, Reward, TinyModel

INSTRUCTION = "Reason step by step, and give the final number on a last line after ####."
ANNOTATION = re.compile(r"<<[^<>]*>>")


def read_problems(path: str) -> list[Problem]:
    """The problems of a file, in order; the calculator's annotations are taken out of the solutions."""
    problems = []
    for number, record in enumerate(parse_lines(path, ["question", "answer"]), start=1):
        answer = final_number(record["answer"])
        if answer is None:
            raise DataError(f"{path}, record {number}: the answer does not end in `#### number`")
        question = record["question"].strip()
        solution = ANNOTATION.sub("", record["answer"]).strip()
        prompt = f"{question}\n{INSTRUCTION}"
        asked = ({"role": "user", "content": prompt},)
        problems.append(Problem(f"{prompt}\n", answer, solution, question, messages=asked))
    if not problems:
        raise DataError(f"{path}: no records")
    return problems


def load_gsm8k(data: str, test_data: str | None) -> "Gsm8k":
    """The job on a training file and perhaps a test file; a twentieth of the questions is for validation."""
    splits: dict[str, list[Problem]] = {"train": [], "validation": [], "test": []}
    for problem in read_problems(data):
        bucket = zlib.crc32(problem.key.encode()) % 20
        is_test = test_data is None and bucket in (1, 2)
        splits["validation" if bucket == 0 else "test" if is_test else "train"].append(problem)
    if test_data is not None:
        splits["test"] = read_problems(test_data)
    return Gsm8k(splits)


@dataclass(frozen=True)
class Gsm8k(OutcomeOnly):
    """The job on the problems of each split."""

    splits: dict[str, list[Problem]]
    about_base: str = "The base is the model that was given."
    about_result: str = (
        "A rise shows that more was found of what the base can do: compare pass@k before and after."
    )

    @property
    def model(self) -> TinyModel:
        """There is none: nothing small can read these questions."""
        raise ValueError("model_name_or_path must name a model for the job gsm8k")

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """See `model`."""
        raise ValueError("model_name_or_path must name a model for the job gsm8k")

    def sample(self, split: str, rng: random.Random, n: int) -> list[Problem]:
        """Questions of a split; for evaluation each at most once."""
        problems = self.splits[split]
        if split == "train":
            return rng.choices(problems, k=n)
        return rng.sample(problems, min(n, len(problems)))

    def demonstration(self, problem: Problem, rng: random.Random, progress: float) -> str:
        """The solution that came with the question."""
        return problem.solution

    def rewards(self, eos_id: int) -> dict[str, Reward]:
        """1 for the right number, else 0."""
        return {"exact_answer": ExactAnswer(final_number, eos_id)}

    def parse_answer(self, completion: str) -> str | None:
        """The number a completion states as its answer."""
        return final_number(completion)
