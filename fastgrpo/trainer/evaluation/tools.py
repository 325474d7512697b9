"""Tool-integrated solutions: generation stops where a completion calls a tool, the result is appended, and it goes on.

A completion is cut at the end of the call, so what follows is drawn given the result, whatever the model would have
written itself. Tokens of a result are not the model's: their log-probability is NaN, the mark for tokens that nobody
sampled. A call that fails appends nothing, and the model has to go on by itself.

Source: GSM8K's calculator annotations (Cobbe et al. 2021, arXiv:2110.14168); DeepSeekMath section 2.2.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastgrpo.trainer.data.text import decode, encode_texts
from fastgrpo.trainer.rewards.child import load_function
from fastgrpo.trainer.sampling.rollout import Rollout, Sampler

MAX_CALLS = 32  # of a completion; more are not answered
RUNS_AT_ONCE = 16


class ToolError(ValueError):
    """What was asked for has no result."""


class CallFormat(NamedTuple):
    """How a completion calls a tool: `opening` code `closing`; appended is `before` result `after`."""

    opening: str
    closing: str
    before: str
    after: str


class ToolRunner(Protocol):
    """A tool. The built-in one is a calculator; code runs in a sandbox of yours, which has to bound its own time."""

    call: CallFormat

    def run(self, code: str) -> str:
        """The result of what a completion asked for; several threads may ask at once.

        Raises:
            ToolError: There is none (any other exception counts as the same failure).
        """


@dataclass(slots=True)
class _Row:
    """A completion in the making."""

    prompt: list[int]
    room: int  # tokens that it may still have
    ids: list[int] = field(default_factory=list)
    logprob: list[Tensor] = field(default_factory=list)
    scanned: int = 0  # characters in which no call closes that has not been answered
    calls: int = 0
    open: bool = True  # whether it goes on
    truncated: bool = False

    def extend(self, ids: list[int], logprob: Tensor | None) -> None:
        """Appends tokens as far as there is room; of those that were not sampled without log-probabilities."""
        taken = ids[: self.room]
        self.room -= len(taken)
        self.ids += taken
        missing = torch.full((len(taken),), torch.nan)
        self.logprob.append(missing if logprob is None else logprob[: len(taken)])

    def drop_last(self) -> None:
        """Takes the last token back."""
        self.ids.pop()
        self.logprob[-1] = self.logprob[-1][:-1]
        self.room += 1


class ToolSampler:
    """Any sampler, with a tool: the protocol of all samplers."""

    def __init__(
        self, sampler: Sampler, tokenizer: PreTrainedTokenizerBase, tool: ToolRunner
    ) -> None:
        self.sampler = sampler
        self.tokenizer = tokenizer
        self.tool = tool
        self.name = f"{sampler.name} with a tool"
        mark = tool.call.closing[-1]
        words = decode(tokenizer, [[i] for i in range(len(tokenizer))])
        self.pause_ids = [i for i, word in enumerate(words) if mark in word]
        if not self.pause_ids:
            raise ValueError(f"the tokenizer has no token with {mark!r}, by which calls end")
        self.calls = 0  # answered
        self.failures = 0
        self.first_failure = ""

    @property
    def rng_state(self) -> Tensor:
        """That of the sampler."""
        return self.sampler.rng_state

    @rng_state.setter
    def rng_state(self, state: Tensor) -> None:
        self.sampler.rng_state = state

    def refresh(self) -> None:
        """That of the sampler."""
        self.sampler.refresh()

    def summary(self) -> str:
        """What became of the calls so far, in a line."""
        text = f"{self.calls} calls answered, {self.failures} without a result"
        return f"{text} (the first: {self.first_failure})" if self.failures else text

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num_samples: int,
        max_new_tokens: int,
        temperature: float,
        pause_ids: Sequence[int] = (),
    ) -> Rollout:
        """See `Sampler.sample`; `max_new_tokens` counts the tokens of results too."""
        pauses = {*self.pause_ids} - {*pause_ids}
        rows = [_Row(list(p), max_new_tokens) for p in prompts for _ in range(num_samples)]
        stops = [*pauses, *pause_ids]
        part = self.sampler.sample(
            prompts,
            num_samples=num_samples,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            pause_ids=stops,
        )
        waiting = rows
        while waiting:
            for i, row in enumerate(waiting):
                ids = part.completion_ids[i]
                whole = len(ids) <= row.room
                row.extend(ids, None if part.logprob is None else part.logprob[i])
                row.truncated = part.truncated[i] or not whole
                row.open = not row.truncated and ids[-1] in pauses
            self._answer([row for row in waiting if row.open and row.calls < MAX_CALLS])
            for row in waiting:
                row.truncated |= row.open and row.room == 0
            waiting = [row for row in waiting if row.open and row.room]
            if waiting:
                part = self.sampler.sample(
                    [row.prompt + row.ids for row in waiting],
                    num_samples=1,
                    max_new_tokens=max(row.room for row in waiting),
                    temperature=temperature,
                    pause_ids=stops,
                )
        return Rollout(
            prompt_ids=[row.prompt for row in rows],
            completion_ids=[row.ids for row in rows],
            logprob=None if part.logprob is None else [torch.cat(row.logprob) for row in rows],
            truncated=[row.truncated for row in rows],
        )

    def _answer(self, rows: Sequence[_Row]) -> None:
        """Appends results to those rows that end in a call."""
        if not rows:
            return
        form = self.tool.call
        calls = []
        for row, text in zip(rows, decode(self.tokenizer, [row.ids for row in rows]), strict=True):
            found = next_call(text, row.scanned, form)
            row.scanned = max(0, len(text) - len(form.closing) + 1)
            if found is not None:
                calls.append((row, text, *found))
        if not calls:
            return
        with ThreadPoolExecutor(max_workers=min(RUNS_AT_ONCE, len(calls))) as pool:
            results = list(pool.map(self._run, [code for _, _, code, _ in calls]))
        for (row, text, code, end), result in zip(calls, results, strict=True):
            row.calls += 1
            if isinstance(result, Exception):
                self.failures += 1
                problem = f"{code!r}: {result or type(result).__name__}"
                self.first_failure = self.first_failure or problem
                continue
            self.calls += 1
            kept = ""
            if end < len(
                text
            ):  # the last token goes on beyond the call: only its part up to there stays
                (before,) = decode(self.tokenizer, [row.ids[:-1]])
                kept = text[len(before) : end]
                row.drop_last()
            written = f"{kept}{form.before}{result}{form.after}"
            row.extend(encode_texts(self.tokenizer, [written])[0], None)
            row.scanned = len(decode(self.tokenizer, [row.ids])[0])

    def _run(self, code: str) -> str | Exception:
        """The result, or why there is none: the tool may be the user's, and the evaluation goes on."""
        try:
            return str(self.tool.run(code))
        except Exception as error:
            return error


def next_call(text: str, scanned: int, form: CallFormat) -> tuple[str, int] | None:
    """Code and end of the first call that closes after `scanned` characters."""
    close = text.find(form.closing, scanned)
    while close >= 0:
        start = text.rfind(form.opening, 0, close)
        if start >= 0 and form.closing not in text[start + len(form.opening) : close]:
            return text[start + len(form.opening) : close], close + len(form.closing)
        close = text.find(form.closing, close + len(form.closing))
    return None


def find_tool(spec: str) -> ToolRunner:
    """The tool "calculator", or what the factory that `file.py:factory` or `module:factory` names returns.

    Raises:
        ValueError: There is no such factory, or what it returns is no tool.
    """
    if spec == "calculator":
        from fastgrpo.trainer.evaluation.calculator import Calculator

        return Calculator()
    if ":" not in spec:
        raise ValueError(f"tools must be calculator or file.py:factory, got {spec!r}")
    try:
        tool = load_function(spec)()
    except Exception as error:
        raise ValueError(f"tools {spec}: {error or type(error).__name__}") from error
    form = getattr(tool, "call", None)
    if not callable(getattr(tool, "run", None)) or not isinstance(form, tuple) or len(form) != 4:
        raise ValueError(
            f"tools {spec} must return an object with run(code) and call=CallFormat(opening, closing, before, after), "
            f"got {type(tool).__name__}"
        )
    tool.call = CallFormat(*form)
    if not tool.call.opening or not tool.call.closing:
        raise ValueError(f"tools {spec}: call must have an opening and a closing, got {form!r}")
    return tool
