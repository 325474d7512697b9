r"""Story problems with worked solutions in the style of GSM8K, made in code without end.

    Q: Ada has 7 coins, finds 2, loses 3, grows 2 times. How many?
    A:
    7+2=9
    9-3=6
    6*2=12
    #### 12

SFT shows worked solutions first and then, near its end, mostly bare answers. The base model can therefore work a
problem out, but usually does not. GRPO, rewarded for the final number only, finds that showing the work pays.
Train, validation and test are split by *chain* (`7+2-3*2`: the numbers and operations with names and objects left
out), so no test question has been seen under another name.
"""

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from fastgrpo.trainer.rewards.scoring import ExactAnswer
from fastgrpo.trainer.tasks.base import SPLITS, Problem, Reward, TinyModel
from fastgrpo.trainer.tasks.tokenizer import word_tokenizer

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana", "Ivo", "June")
OBJECTS = ("apples", "books", "coins", "pens", "shells", "stamps", "stones", "toys")
GAIN = ("buys", "finds", "gets")
LOSE = ("sells", "loses", "eats")
LARGEST = 20  # every quantity on the way is a whole number in 1..LARGEST, and each is one token
FACTORS = (2, 3, 4)
STEPS = (3, 5)
ANSWER_MARK = "#### "
PATTERN = r" ?[A-Za-z]+| ?[0-9]+|#### |\n|[^A-Za-z0-9]"


def split_of(chain: str) -> str:
    """The split a chain belongs to: a fixed hash, so it is the same in every run, process and version of Python."""
    bucket = zlib.crc32(chain.encode()) % 10
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def parse_answer(completion: str) -> str | None:
    """The number after the first `#### `, None if there is none."""
    _, mark, rest = completion.partition(ANSWER_MARK)
    return rest.strip() if mark else None


def next_step(value: int, rng: random.Random) -> tuple[str, int, int]:
    """A legal operation on `value`: (operator, operand, result). Sums and differences are twice as likely."""
    factors = [m for m in FACTORS if value * m <= LARGEST]
    divisors = [d for d in FACTORS if value % d == 0]
    legal = "+" * (2 * (value < LARGEST)) + "-" * (2 * (value > 1))
    operator = rng.choice(legal + "*" * bool(factors) + "/" * bool(divisors))
    if operator == "+":
        b = rng.randint(1, LARGEST - value)
        return operator, b, value + b
    if operator == "-":
        b = rng.randint(1, value - 1)
        return operator, b, value - b
    if operator == "*":
        b = rng.choice(factors)
        return operator, b, value * b
    b = rng.choice(divisors)
    return operator, b, value // b


def clause(operator: str, b: int, rng: random.Random) -> str:
    """The words that tell one operation."""
    if operator == "+":
        return f", {rng.choice(GAIN)} {b}"
    if operator == "-":
        return f", {rng.choice(LOSE)} {b}"
    return f", grows {b} times" if operator == "*" else f", keeps 1 of {b} parts"


def make_problem(rng: random.Random) -> Problem:
    """A problem of 3 to 5 steps, of whatever split its chain falls into."""
    first = value = rng.randint(1, LARGEST)
    chain, told, worked = str(first), "", ""
    for _ in range(rng.randint(*STEPS)):
        operator, b, result = next_step(value, rng)
        chain += f"{operator}{b}"
        told += clause(operator, b, rng)
        worked += f"{value}{operator}{b}={result}\n"
        value = result
    question = f"Q: {rng.choice(NAMES)} has {first} {rng.choice(OBJECTS)}{told}. How many?\nA:\n"
    return Problem(question, str(value), f"{worked}{ANSWER_MARK}{value}", chain)


@dataclass(frozen=True)
class Story:
    """The default job."""

    answer_only: float = 0.75
    """Share of bare answers in the last part of SFT. At .75 a group of 8 holds a worked solution 9 times in 10."""
    answer_only_from: float = 0.8
    """Where in SFT (as a share of its steps) bare answers begin: early enough for the working to recover from it."""
    model: TinyModel = TinyModel(hidden_size=64, intermediate_size=256, num_hidden_layers=3)
    about_base: str = (
        "The base model was made on purpose to answer without working: SFT taught it worked solutions, "
        "then mostly bare answers."
    )
    about_result: str = (
        "Rewards alone brought the working back and sharpened it a little. That elicits a skill that SFT had taught "
        "(see the base's pass@8); it does not teach one from scratch."
    )

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Whole words and whole numbers are single tokens; one told in the question includes the space before it."""
        words = [f" {w}" for w in (*NAMES, *OBJECTS, *GAIN, *LOSE)]
        words += [" has", " grows", " times", " keeps", " of", " parts", " How", " many", "Q", "A"]
        words += [*":,.?\n+-*/=", ANSWER_MARK]
        words += [f"{space}{i}" for i in range(1, LARGEST + 1) for space in ("", " ")]
        return word_tokenizer(words, PATTERN)

    def sample(self, split: str, rng: random.Random, n: int) -> list[Problem]:
        """Fresh problems whose chains belong to `split`."""
        if split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
        found: list[Problem] = []
        while len(found) < n:
            problem = make_problem(rng)
            if split_of(problem.key) == split:
                found.append(problem)
        return found

    def demonstration(self, problem: Problem, rng: random.Random, progress: float) -> str:
        """A worked solution; late in SFT mostly the bare answer."""
        if progress >= self.answer_only_from and rng.random() < self.answer_only:
            return ANSWER_MARK + problem.answer
        return problem.solution

    def rewards(self, eos_id: int) -> dict[str, Reward]:
        """1 for the right final number, else 0."""
        return {"exact_answer": ExactAnswer(parse_answer, eos_id)}

    def line_rewards(self, problem: Problem, lines: Sequence[str]) -> list[float]:
        """1 for a line of the reference solution in its place, and for the right answer wherever it is given first.

        Any other line earns 0. If all true lines earned something, true lines that lead nowhere would pay.
        """
        *steps, answer = problem.solution.split("\n")
        rewards = []
        for i, line in enumerate(lines):
            if line.startswith(ANSWER_MARK):
                rewards.append(float(line == answer))
                break
            rewards.append(float(i < len(steps) and line == steps[i]))
        return rewards + [0.0] * (len(lines) - len(rewards))

    def parse_answer(self, completion: str) -> str | None:
        """See the module's `parse_answer`."""
        return parse_answer(completion)
