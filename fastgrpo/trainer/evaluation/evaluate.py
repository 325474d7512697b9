"""Accuracy on held-out questions: greedy, pass@1, majority vote, unbiased pass@k, each with its standard error."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastgrpo.trainer.data.text import decode, prompt_ids
from fastgrpo.trainer.sampling.rollout import Sampler
from fastgrpo.trainer.tasks.base import Problem, Task

PROMPTS_AT_ONCE, ROWS_AT_ONCE = 64, 512


@dataclass(frozen=True, slots=True)
class Answered:
    """One question, with the completions that were drawn for it."""

    problem: Problem
    greedy: str
    greedy_answer: str | None
    samples: list[str]
    answers: list[str | None]
    mean_length: float

    @property
    def is_greedy_right(self) -> bool:
        """Whether the likeliest completion is right."""
        return self.greedy_answer == self.problem.answer

    @property
    def num_right(self) -> int:
        """How many samples are right."""
        return self.answers.count(self.problem.answer)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores by name ("greedy", "pass@1", "maj@8", "pass@8"), their standard errors, and what they came from."""

    scores: dict[str, float]
    stderr: dict[str, float]
    mean_length: float
    answered: list[Answered]

    @classmethod
    def of(cls, stored: dict[str, Any]) -> "Evaluation":
        """From the nested dictionaries that `dataclasses.asdict` makes of one."""
        answered = [
            Answered(**{**one, "problem": Problem(**one["problem"])}) for one in stored["answered"]
        ]
        return cls(**{**stored, "answered": answered})

    def part(self, name: str) -> "Evaluation":
        """The same for the questions of one slice."""
        return summarise([a for a in self.answered if a.problem.slice == name])

    @property
    def slices(self) -> list[str]:
        """Names of the slices that occur, in order."""
        names = (a.problem.slice for a in self.answered)
        return sorted({name for name in names if name is not None})


def pass_at_k(n: int, right: int, k: int) -> float:
    """Chance that at least one of k samples is right, from `right` of n: 1 - C(n - right, k) / C(n, k), unbiased.

    Source: Chen et al. 2021 (arXiv:2107.03374).
    """
    if not 0 <= right <= n or not 1 <= k <= n:
        raise ValueError(f"need 0 <= right <= n and 1 <= k <= n, got n={n}, right={right}, k={k}")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def majority(answers: Sequence[str | None]) -> str | None:
    """The most frequent answer, the earliest of equals; completions without an answer have no vote."""
    votes = Counter(answer for answer in answers if answer is not None)
    return votes.most_common(1)[0][0] if votes else None


def summarise(answered: list[Answered]) -> Evaluation:
    """Means and standard errors over questions: the samples of one question are not independent."""
    if not answered:
        return Evaluation({}, {}, math.nan, [])
    n = len(answered[0].answers)
    per_question = {"greedy": [float(a.is_greedy_right) for a in answered]}
    if n:
        per_question["pass@1"] = [a.num_right / n for a in answered]
    if n > 1:
        right_vote = [float(majority(a.answers) == a.problem.answer) for a in answered]
        per_question[f"maj@{n}"] = right_vote
        per_question[f"pass@{n}"] = [pass_at_k(n, a.num_right, n) for a in answered]
    return Evaluation(
        scores={name: statistics.fmean(rates) for name, rates in per_question.items()},
        stderr={name: standard_error(rates) for name, rates in per_question.items()},
        mean_length=statistics.fmean(a.mean_length for a in answered),
        answered=answered,
    )


def standard_error(rates: Sequence[float]) -> float:
    """Standard error of the mean."""
    return statistics.stdev(rates) / math.sqrt(len(rates)) if len(rates) > 1 else math.nan


def evaluate(
    sampler: Sampler,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    *,
    samples: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Answers every question once greedily and `samples` times at `temperature`."""

    def complete(
        batch: Sequence[Problem], count: int, heat: float
    ) -> tuple[list[str], list[str | None], list[int]]:
        prompts = prompt_ids(tokenizer, batch)
        rollout = sampler.sample(
            prompts, num_samples=count, max_new_tokens=max_new_tokens, temperature=heat
        )
        texts = decode(tokenizer, rollout.completion_ids)
        answers = [
            None if cut else task.parse_answer(text)
            for text, cut in zip(texts, rollout.truncated, strict=True)
        ]
        return texts, answers, rollout.lengths

    answered: list[Answered] = []
    at_once = max(1, min(PROMPTS_AT_ONCE, ROWS_AT_ONCE // max(1, samples)))
    for start in range(0, len(problems), at_once):
        batch = problems[start : start + at_once]
        greedy, greedy_answers, lengths = complete(batch, 1, 0.0)
        texts, answers = list[str](), list[str | None]()
        if samples:
            texts, answers, lengths = complete(batch, samples, temperature)
        share = samples or 1
        for i, problem in enumerate(batch):
            own = slice(i * samples, (i + 1) * samples)
            mean = statistics.fmean(lengths[i * share : (i + 1) * share])
            answered.append(
                Answered(problem, greedy[i], greedy_answers[i], texts[own], answers[own], mean)
            )
        on_progress(len(answered), len(problems))
    return summarise(answered)
