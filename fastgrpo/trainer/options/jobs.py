"""The built-in jobs: what each is, and where its defaults differ from `TrainConfig`'s. Nothing here imports torch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastgrpo.trainer.options.config import TrainConfig

if TYPE_CHECKING:
    from fastgrpo.trainer.tasks.base import Task


@dataclass(frozen=True, slots=True)
class Job:
    """A job's line of help and its own defaults."""

    about: str
    defaults: dict[str, Any] = field(default_factory=dict)


JOBS = {
    "story": Job(
        "story problems with worked solutions: make a base model, then GRPO (the default)",
        {"eval_steps": 5},
    ),
    "copy": Job(
        "copy three digits: from random weights, by reinforcement alone, in about 15 CPU-seconds",
        {
            "sft_steps": 0,
            "max_steps": 200,
            "prompts_per_step": 32,
            "num_generations": 16,
            "max_completion_length": 4,
            "learning_rate": 2e-3,
            "lr_scheduler_type": "linear",
            "beta": 0.0,
            "per_device_train_batch_size": 512,
            "eval_steps": 25,
            "eval_questions": 89,  # all that are held out
        },
    ),
    "gsm8k-equations": Job(
        "the two-operand equations in GSM8K's solutions (needs --data FILE.jsonl)",
        {
            "sft_steps": 400,
            "sft_batch_size": 64,
            "max_steps": 200,
            "prompts_per_step": 64,
            "max_completion_length": 8,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "linear",
            "per_device_train_batch_size": 512,
            "eval_steps": 30,
            "eval_questions": 2429,
        },
    ),
    "gsm8k": Job(
        "GSM8K's questions with a model of yours (needs --data FILE.jsonl and --model-name-or-path DIR)",
        {
            "sft_steps": 0,
            "max_steps": 500,
            "max_completion_length": 320,
            "learning_rate": 1e-6,
            "per_device_train_batch_size": 8,
            "eval_questions": 1319,
            "eval_steps": 50,
        },
    ),
    "custom": Job(
        "your own prompts, rewards and model (needs --data FILE, --reward FILE.py:FUNCTION, --model-name-or-path DIR)",
        {
            "sft_steps": 0,
            "max_steps": 500,
            "max_completion_length": 320,
            "learning_rate": 1e-6,
            "per_device_train_batch_size": 8,
            "eval_steps": 50,
        },
    ),
}
FROM_FILES = ("gsm8k-equations", "gsm8k", "custom")
NEED_MODEL = ("gsm8k", "custom")


def default_config(job: str) -> TrainConfig:
    """The options of a job where the user says nothing."""
    return TrainConfig(job=job, **JOBS[job].defaults)


def make_task(config: TrainConfig) -> "Task":
    """The job's problems; reads the user's files if it has any."""
    from fastgrpo.trainer.tasks.base import OutcomeOnly

    task = _make_task(config)
    if config.supervision == "process" and isinstance(task, OutcomeOnly):
        raise ValueError(f"--supervision must be outcome: the job {config.job} cannot reward lines")
    return task


def _make_task(config: TrainConfig) -> "Task":
    from fastgrpo.trainer.tasks.copy_digits import CopyDigits
    from fastgrpo.trainer.tasks.custom import Custom, load_custom
    from fastgrpo.trainer.tasks.gsm8k import Gsm8k, load_gsm8k
    from fastgrpo.trainer.tasks.gsm8k_equations import Gsm8kEquations, load_equations
    from fastgrpo.trainer.tasks.story import Story

    loaders: dict[str, Callable[[str, str | None], Custom | Gsm8k | Gsm8kEquations]] = {
        "custom": load_custom,
        "gsm8k": load_gsm8k,
        "gsm8k-equations": load_equations,
    }
    if config.job not in FROM_FILES:
        return CopyDigits() if config.job == "copy" else Story()
    assert config.data is not None  # `check_inputs` has looked
    task = loaders[config.job](config.data, config.test_data)
    if not task.splits["train"]:
        held = sum(map(len, task.splits.values()))
        raise ValueError(
            f"--data must leave something to train on: all {held} records of {config.data} are held out"
        )
    return task
