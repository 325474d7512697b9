"""Equations that people wrote: those GSM8K's worked solutions mark as `<<48/2=24>>`.

    Q: 48/2
    A: #### 24

Kept are those of two numbers of one or two digits with a whole result. The test set is the test file as it comes:
most of its equations also occur in the training file, so accuracy is reported apart for those seen and not seen.
"""

import random
import re
import zlib
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from fastgrpo.trainer.data.jsonl import DataError, parse_lines
from fastgrpo.trainer.rewards.scoring import ExactAnswer
from fastgrpo.trainer.tasks.base import SPLITS, OutcomeOnly, Problem, Reward, TinyModel
from fastgrpo.trainer.tasks.story import parse_answer
from fastgrpo.trainer.tasks.tokenizer import word_tokenizer

ANNOTATION = re.compile(r"<<([^<>=]*)=([^<>=]*)>>")
TWO_NUMBERS = re.compile(r"(\d{1,2})([-+*/])(\d{1,2})")
WHOLE = re.compile(r"\d+")


def equations(solution: str) -> list[tuple[str, str]]:
    """(expression, result) of the annotations of a solution that are kept."""
    kept = []
    for expression, result in ANNOTATION.findall(solution):
        expression, result = expression.replace(" ", ""), result.strip()
        if TWO_NUMBERS.fullmatch(expression) and WHOLE.fullmatch(result):
            kept.append((expression, result))
    return kept


def read_equations(path: str) -> list[tuple[str, str]]:
    """All kept equations of a GSM8K file, repeats included, in order."""
    found = [
        pair for record in parse_lines(path, ["answer"]) for pair in equations(record["answer"])
    ]
    if not found:
        raise DataError(f"{path}: no equation like <<48/2=24>> in any record's answer")
    return found


def held_out(expression: str) -> str:
    """The split of an expression of the training file if that file has to serve for all three."""
    bucket = zlib.crc32(expression.encode()) % 20
    return "validation" if bucket == 0 else "test" if bucket <= 2 else "train"


def to_problem(expression: str, result: str, part: str | None) -> Problem:
    """The question and its answer."""
    return Problem(f"Q: {expression}\nA: ", result, f"#### {result}", expression, part)


def load_equations(data: str, test_data: str | None) -> "Gsm8kEquations":
    """The job on a training file and perhaps a test file."""
    splits: dict[str, list[Problem]] = {split: [] for split in SPLITS}
    known = read_equations(data)
    for expression, result in known:
        split = held_out(expression)
        if split == "test" and test_data is not None:
            split = "train"
        part = None if split == "train" else "unseen"
        splits[split].append(to_problem(expression, result, part))
    if test_data is not None:
        trained = {problem.key for problem in splits["train"]}
        splits["test"] = [
            to_problem(expression, result, "seen" if expression in trained else "unseen")
            for expression, result in read_equations(test_data)
        ]
    return Gsm8kEquations(splits)


@dataclass(frozen=True)
class Gsm8kEquations(OutcomeOnly):
    """The job on the problems of each split."""

    splits: dict[str, list[Problem]]
    model: TinyModel = TinyModel(hidden_size=64, intermediate_size=256)
    about_base: str = "The base model was fine-tuned on the same equations, for a short time."
    about_result: str = (
        "Much of this is recall: compare the expressions seen in training with those that were not."
    )

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Operands are whole numbers of up to two digits; results are read off digit by digit."""
        words = [*"0123456789", *(f"{i}" for i in range(10, 100)), *"+-*/:\n ", "####", "Q", "A"]
        return word_tokenizer(words, r"####|\d{1,2}(?=[-+*/\n])|\d|[^0-9]")

    def sample(self, split: str, rng: random.Random, n: int) -> list[Problem]:
        """Equations as often as people wrote them; for evaluation each occurrence at most once."""
        problems = self.splits[split]
        if split == "train":
            return rng.choices(problems, k=n)
        return rng.sample(problems, min(n, len(problems)))

    def demonstration(self, problem: Problem, rng: random.Random, progress: float) -> str:
        """The result."""
        return problem.solution

    def rewards(self, eos_id: int) -> dict[str, Reward]:
        """1 for the right result, else 0."""
        return {"exact_answer": ExactAnswer(parse_answer, eos_id)}

    def parse_answer(self, completion: str) -> str | None:
        """The number after `#### `."""
        return parse_answer(completion)
