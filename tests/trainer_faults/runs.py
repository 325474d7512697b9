"""Tiny runs for fault tests, in this process or in a child forked from it (which has torch loaded already)."""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from fastgrpo.trainer.adapter import add_adapter
from fastgrpo.trainer.checkpoint.contents import contents
from fastgrpo.trainer.checkpoint.store import Checkpoint
from fastgrpo.trainer.options.config import TrainConfig
from fastgrpo.trainer.options.jobs import default_config, make_task
from fastgrpo.trainer.policy import Policy, recompute_blocks
from fastgrpo.trainer.run import run_job
from fastgrpo.trainer.setup import Run
from fastgrpo.trainer.state import State
from fastgrpo.trainer.train import grpo
from tests.trainer.conftest import tiny_llama

SMALL = replace(
    default_config("copy"),
    seed=15,  # one with which every step has a gradient: a test on weights that never move shows nothing
    prompts_per_step=3,  # an odd number: mini-batches and ranks get unequal shares
    num_generations=4,
    max_steps=4,
    num_iterations=2,
    steps_per_generation=2,
    beta=0.1,
    per_device_train_batch_size=3,
    warmup_steps=0,
    max_completion_length=4,
    learning_rate=1e-2,
    lr_scheduler_type="constant",
    eval_questions=0,
    eval_steps=0,
    save_steps=1,
    report=False,
)


def make_run(config: TrainConfig) -> Run:
    """A copy job on a loud random model, so that groups have spread from the first step on."""
    task = make_task(config)
    tokenizer = task.tokenizer()
    model = tiny_llama(tokenizer, hidden_size=16, intermediate_size=24, max_position_embeddings=32)
    if config.use_peft:
        model.to(torch.bfloat16 if config.bf16 else torch.float32)
        torch.manual_seed(config.seed)
        add_adapter(model, config)
    if config.gradient_checkpointing:
        recompute_blocks(model)
    policy = Policy(model, config.temperature, config.bf16).eval()
    return Run(config, task, tokenizer, policy, torch.device("cpu"))


def train(state: State, safe_point: Callable[[], None] = lambda: None) -> list[dict[str, float]]:
    """To the end; the metrics of every step but those that are times."""
    return [timeless(step.numbers) for step in grpo(state.run, state, safe_point)]


def timeless(record: dict) -> dict:
    return {k: v for k, v in record.items() if not k.startswith("time/") and k != "step_time"}


def everything(state: State) -> dict[str, bytes]:
    return {name: b"".join(content) for name, content in contents(state, {}, [])}


def fork(action: Callable[[], int], log: Path | None = None) -> int:
    """Runs `action` in a child that inherits all that is loaded; returns its pid."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        signal.alarm(120)  # never outlives the test
        out = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        code = action()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    """The exit code; negative: the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def fork_job(config: TrainConfig, log: Path | None = None) -> int:
    """`fastgrpo train` with these options in a forked child."""
    return fork(lambda: run_job(config, time.time()), log)


def end_of(out: Path, steps: int) -> dict[str, str]:
    """SHA-256 of all state files after the last step (not of `trainer`, which has paths and seconds in it)."""
    files = Checkpoint(out / "checkpoints" / f"step-{steps}").manifest["files"]
    return {name: f["sha256"] for name, f in files.items() if not name.startswith("trainer")}


def records(out: Path) -> list[dict]:
    """metrics.jsonl without times; every line must be whole."""
    return [timeless(json.loads(line)) for line in (out / "metrics.jsonl").read_text().splitlines()]
