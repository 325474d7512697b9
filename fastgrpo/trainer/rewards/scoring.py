"""Scoring completions: reward functions with TRL's signature, where they run, and what happens when one fails."""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from fastgrpo.trainer.algorithm import reward_weights
from fastgrpo.trainer.options.config import TrainConfig
from fastgrpo.trainer.rewards.library import SoftOverlong, think_format
from fastgrpo.trainer.rewards.process import Grader, ProcessReward, RewardFault
from fastgrpo.trainer.rewards.replay import Record
from fastgrpo.trainer.tasks.base import Problem, Reward

NOT_SCORED = float("nan")
LIBRARY = "fastgrpo.trainer.rewards.library"


@dataclass(frozen=True, slots=True)
class ExactAnswer:
    """1 where the completion ended by itself and its final answer is the right one, else 0."""

    parse: Callable[[str], str | None]
    eos_id: int

    def __call__(
        self,
        *,
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        answer: Sequence[str],
        **_: object,
    ) -> list[float]:
        """Scores completions against the `answer` column."""
        return [
            float(bool(ids) and ids[-1] == self.eos_id and self.parse(text) == gold)
            for text, ids, gold in zip(completions, completion_ids, answer, strict=True)
        ]


@dataclass(slots=True)
class Rewards:
    """The reward functions of a run by name; those of the user run in processes of their own, at the same time.

    `faults` and `messages` are those of the last batch.
    """

    functions: Mapping[str, Reward]
    on_fault: Literal["skip", "stop"] = "stop"
    weights: Sequence[float] | None = None  # None: 1 each
    faults: dict[str, int] = field(default_factory=dict)  # completions that a fault left unscored
    messages: list[str] = field(default_factory=list)  # what went wrong

    def __post_init__(self) -> None:
        """Check that there is a weight for each."""
        if self.weights is not None and len(self.weights) != len(self.functions):
            raise ValueError(
                f"--reward-weights must hold one number per reward ({len(self.functions)}), got {len(self.weights)}"
            )

    def score(
        self,
        problems: Sequence[Problem],  # one per completion
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
    ) -> Tensor:  # [B, K] float32
        """One column per function. NaN: not applicable (it returned None), or a fault that is skipped.

        Raises:
            RewardFault: a function failed or returned NaN, and `on_fault` is "stop".
        """
        columns = columns_of(problems, completions, completion_ids)
        self.faults, self.messages = {}, []
        with ThreadPoolExecutor(max_workers=max(1, len(self.functions))) as pool:
            pending = [pool.submit(self._one, name, columns) for name in self.functions]
            table = [future.result() for future in pending]
        if self.messages and self.on_fault == "stop":
            raise RewardFault(
                f"{self.messages[0]} (--on-reward-fault skip goes on without its scores)"
            )
        return torch.tensor(table).T.contiguous()

    def _one(self, name: str, columns: dict[str, list[Any]]) -> list[float]:
        count = len(columns["completions"])
        try:
            values = self.functions[name](**columns)
        except RewardFault as error:
            self._blame(name, count, str(error))
            return [NOT_SCORED] * count
        if len(values) != count:
            raise ValueError(f"reward {name} must return {count} values, got {len(values)}")
        rewards = [NOT_SCORED if v is None else float(v) for v in values]
        bad = [i for i, v in enumerate(values) if v is not None and not math.isfinite(v)]
        if bad:
            first = f"{values[bad[0]]} for completion {bad[0]}"
            what = f"reward {name} gave {len(bad)} values that are not finite: {first}"
            self._blame(name, len(bad), what + (" and others" if len(bad) > 1 else ""))
            rewards = [v if math.isfinite(v) else NOT_SCORED for v in rewards]
        return rewards

    def _blame(self, name: str, count: int, message: str) -> None:
        self.faults[name] = count
        self.messages.append(message)

    def total(self, reward: Tensor) -> Tensor:  # [B, K] -> [B]
        """The weighted sum that advantages are made of; what was not scored counts 0, NaN if nothing was."""
        weights = reward.new_tensor(self.weights or [1.0] * len(self.functions))
        return (reward * weights).nansum(1).masked_fill(reward.isnan().all(1), torch.nan)

    @property
    def learning(self) -> dict[str, ProcessReward]:
        """Those that are trained in iterative GRPO: objects of the user with `refit`."""
        return {
            name: reward
            for name, reward in self.functions.items()
            if isinstance(reward, ProcessReward) and reward.learns
        }

    def refit(self, fresh: list[Record], replay: list[Record]) -> None:
        """Trains them on the completions of an outer iteration and some of earlier ones.

        Raises:
            RewardFault: one failed, and `on_fault` is "stop".
        """
        columns = sorted({column for record in [*fresh, *replay] for column in record})
        for name, reward in self.learning.items():
            new, old = (lists(records, columns, name) for records in (fresh, replay))
            try:
                reward.refit(**new, replay=old)
            except RewardFault as error:
                self._blame(name, 0, str(error))
                if self.on_fault == "stop":
                    raise

    def fault_numbers(self) -> dict[str, float]:
        """Faults of the last batch as metrics."""
        return {
            f"rewards/{name}/faults": float(self.faults.get(name, 0)) for name in self.functions
        }


def columns_of(
    problems: Sequence[Problem], completions: Sequence[str], completion_ids: Sequence[Sequence[int]]
) -> dict[str, list[Any]]:
    """What rewards are given, each a list with one entry per completion."""
    more = {name for p in problems for name in p.columns}
    columns: dict[str, list[Any]] = {name: [p.columns.get(name) for p in problems] for name in more}
    return columns | {
        "prompts": [p.prompt for p in problems],
        "completions": list(completions),
        "completion_ids": [list(ids) for ids in completion_ids],
        "answer": [p.answer for p in problems],
        "solution": [p.solution for p in problems],
    }


def records_of(columns: dict[str, list[Any]], rewards: dict[str, list[float]]) -> list[Record]:
    """The completions one by one; a reward that was not given is None."""
    count = len(columns["completions"])
    given = {n: [None if math.isnan(v) else v for v in values] for n, values in rewards.items()}
    return [
        {name: values[i] for name, values in columns.items()}
        | {"rewards": {name: values[i] for name, values in given.items()}}
        for i in range(count)
    ]


def lists(records: list[Record], columns: Sequence[str], reward: str) -> dict[str, list[Any]]:
    """The completions column by column, `rewards` being those of one function."""
    by_column = {name: [record.get(name) for record in records] for name in columns}
    return by_column | {"rewards": [record["rewards"][reward] for record in records]}


def make_rewards(config: TrainConfig, own: Mapping[str, Reward]) -> Rewards:
    """The functions that the options name, or the job's own ones."""
    if config.reward is None:
        if not own:
            raise ValueError(
                f"--reward must name a function: {config.data} has no column of answers"
            )
        return Rewards(own, config.on_reward_fault, reward_weights(config))
    functions: dict[str, Reward] = {}
    for spec in config.reward.split(","):
        name, function = find_reward(spec.strip(), config, own)
        if name in functions:
            raise ValueError(f"--reward names {name!r} twice")
        functions[name] = function
    rewards = Rewards(functions, config.on_reward_fault, reward_weights(config))
    if rewards.learning and not config.ref_sync_steps:
        name = next(iter(rewards.learning))
        raise ValueError(
            f"--ref-sync-steps must be above 0: reward {name} has refit, which ends every outer iteration"
        )
    return rewards


def find_reward(spec: str, config: TrainConfig, own: Mapping[str, Reward]) -> tuple[str, Reward]:
    """A reward of the job, of the library, or the user's `file.py:name` or `module:name`."""
    if spec in own:
        return spec, own[spec]
    if spec == "think_format":
        return spec, think_format
    if spec == "soft_overlong":
        length = config.max_completion_length
        return spec, SoftOverlong(length, max(1, length // 5))
    if spec == "math_verify":
        if find_spec("math_verify") is None:
            raise ValueError("--reward math_verify needs math-verify: pip install 'fastgrpo[math]'")
        return spec, Grader(f"{LIBRARY}:math_verify", config.reward_timeout)
    if ":" not in spec and not spec.endswith(".py"):
        known = ", ".join([*own, "think_format", "soft_overlong", "math_verify"])
        raise ValueError(f"--reward must be one of {known}, or file.py:function, got {spec!r}")
    reward = ProcessReward(spec, config.reward_timeout)
    try:
        reward.start()
    except RewardFault as error:
        raise ValueError(f"--reward: {error}") from None
    return reward.name, reward
