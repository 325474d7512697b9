"""The phases of a run: make or load the base, measure it, train it, measure again."""

import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from fastgrpo.trainer import algorithm, policy
from fastgrpo.trainer.checkpoint.basecache import cache_folder, cache_key, load_base, store_base
from fastgrpo.trainer.checkpoint.check_resume import check_resume
from fastgrpo.trainer.checkpoint.checkpointer import Checkpointer
from fastgrpo.trainer.checkpoint.store import Store
from fastgrpo.trainer.data import batch
from fastgrpo.trainer.evaluation.evaluate import Evaluation, evaluate
from fastgrpo.trainer.memory import memory_of
from fastgrpo.trainer.options.opening import Opened
from fastgrpo.trainer.output import rundir
from fastgrpo.trainer.output.close_up import CloseUp, close_up
from fastgrpo.trainer.output.diagnostics import Diagnostics
from fastgrpo.trainer.output.display import Display
from fastgrpo.trainer.output.recorder import Recorder
from fastgrpo.trainer.output.result import Result
from fastgrpo.trainer.parallel.interrupt import Interrupt, Interrupted
from fastgrpo.trainer.passes import TrainingStopped
from fastgrpo.trainer.rewards.process import RewardFault
from fastgrpo.trainer.sampling.rollout import SamplerError
from fastgrpo.trainer.setup import Run
from fastgrpo.trainer.sft import demonstrations
from fastgrpo.trainer.state import State
from fastgrpo.trainer.tasks.base import Problem
from fastgrpo.trainer.train import grpo

CURVE_QUESTIONS, CURVE_SAMPLES = 64, 4
"""Size of the small evaluations during training."""
SFT_LOGGING_STEPS = 10


class Phases:
    """The phases of a run, with what they report to."""

    def __init__(
        self,
        run: Run,
        out: Path,
        result: Result,
        recorder: Recorder,
        display: Display,
        interrupt: Interrupt,
    ) -> None:
        self.run = run
        self.out = out
        self.result = result
        self.recorder = recorder
        self.display = display
        self.interrupt = interrupt
        self.phase = "start"
        self.keeper: Checkpointer | None = None
        self.complained: set[str] = set()  # what has been said about rewards

    @property
    def steps_done(self) -> int:
        """GRPO steps, those before an interruption included."""
        return 0 if self.keeper is None else self.keeper.state.step

    def go(self, opened: Opened) -> int:
        """All phases, from the beginning or from a checkpoint; returns the exit code."""
        try:
            if not (opened.resume and has_checkpoints(opened)):
                self.make_base()
            if self.run.config.check_resume:
                return check_resume(self.run, self.display.note)
            sync = self.recorder.sync if self.run.ranks.is_main else lambda: None
            self.keeper = Checkpointer(State(self.run), opened, self.display.note, sync)
            self.take_up(self.keeper.resume())
            if self.result.base is None:
                self.result.base = self.measure("base")
            self.safe_point()
            self.train()
            self.result.final = self.measure("final")
            self.safe_point()
            self.keeper.finish()
        except Interrupted:
            self.save()
            self.result.stopped = (
                f"Stopped by the user in phase {self.phase!r}, after {self.steps_done} GRPO steps. "
                + (f"To go on: fastgrpo train --resume {self.out}" if self.saved() else "")
            )
            return self.interrupt.exit_code
        except (TrainingStopped, RewardFault, SamplerError) as error:
            self.result.stopped = str(error)
            self.saved()
            return 1
        return 0

    def take_up(self, progress: dict[str, Any] | None) -> None:
        """What a checkpoint knew of the run beyond its state; None: the run begins."""
        if self.run.config.resume != "never" and self.run.ranks.is_main:
            self.recorder.rewind(0 if progress is None else progress["metrics_bytes"])
        if progress is None:
            return
        self.result.seconds |= progress["seconds"]
        self.result.notes = progress["notes"]
        if progress["base"] is not None:
            self.result.base = Evaluation.of(progress["base"])
        if progress.get("close_up") is not None:
            self.result.close_up = CloseUp.of(progress["close_up"])

    def save(self, announce: bool = False) -> None:
        """A checkpoint of the present state, if there is one yet."""
        if self.keeper is None:
            return
        base, near = self.result.base, self.result.close_up
        self.keeper.save(
            {
                "metrics_bytes": self.recorder.size if self.run.ranks.is_main else 0,
                "seconds": dict(self.result.seconds),
                "notes": list(self.result.notes),
                "base": None if base is None else asdict(base),
                "close_up": None if near is None else asdict(near),
            },
            announce,
        )

    def saved(self) -> Path | None:
        """What the last save left, once it has ended."""
        if self.keeper is None:
            return None
        self.keeper.finish()
        return self.keeper.last

    def safe_point(self) -> None:
        """Obeys signals: the state can be saved here."""
        if self.keeper is not None:
            self.keeper.poll()
        if self.interrupt.agree():
            self.save(announce=True)
        self.interrupt.check()

    def begin(self, phase: str, total: int) -> None:
        """A phase of `total` steps."""
        self.phase = phase
        self.display.phase(phase, total)

    def spend(self, name: str, seconds: float) -> None:
        """Books time under a name of the report's table."""
        self.result.seconds[name] = self.result.seconds.get(name, 0.0) + seconds

    def make_base(self) -> None:
        """Fine-tunes the random weights on demonstrations, or loads what an earlier run has made of them."""
        if self.run.ranks.is_main:
            self._make_base()
        self.run.ranks.broadcast(self.run.policy.model)

    def _make_base(self) -> None:
        run, config = self.run, self.run.config
        if config.model_name_or_path is not None or config.sft_steps == 0:
            return
        folder = cache_folder(self.out) if config.cache_base else None
        key = cache_key(config, sources(run))
        if folder is not None and load_base(run.policy.model, folder, key):
            self.display.note(
                f"base model: reused from {folder / key} (--no-cache-base makes it anew)"
            )
            return
        begun = time.perf_counter()
        self.begin("make base", config.sft_steps)
        for step, loss in enumerate(
            demonstrations.sft(run.policy.model, run.task, run.tokenizer, config), 1
        ):
            self.display.advance(step, f"loss {loss:.3f}")
            if step % SFT_LOGGING_STEPS == 0 or step == config.sft_steps:
                self.recorder.write("sft", step, {"loss": loss})
            if run.ranks.world_size == 1:
                self.interrupt.check()
        self.spend("make base (SFT)", time.perf_counter() - begun)
        if folder is not None:
            store_base(run.policy.model, folder, key)

    def measure(self, name: str) -> Evaluation | None:
        """The full evaluation on the test questions, by the first process."""
        config = self.run.config
        if config.eval_questions == 0 or not self.run.ranks.is_main:
            return None
        problems = self.run.held_out("test", config.eval_questions)
        if name == "base" and len(problems) < config.eval_questions:
            asked = f"fewer than --eval-questions {config.eval_questions}"
            none = "no question with an answer is held out: no accuracy is measured"
            some = f"{len(problems)} questions are held out, {asked}: all are asked"
            self.display.note(some if problems else none)
        if not problems:
            return None
        self.begin(f"test {name}", len(problems))
        evaluation = self._evaluate(problems, config.eval_samples, self.display.advance)
        scores = "  ".join(f"{k} {v:.3f}" for k, v in evaluation.scores.items())
        self.display.note(f"{name} model on {len(evaluation.answered)} test questions: {scores}")
        return evaluation

    def _evaluate(
        self, problems: list[Problem], samples: int, show: Callable[[int], None] = lambda done: None
    ) -> Evaluation:
        def on_progress(done: int, _: int) -> None:
            show(done)
            if self.run.ranks.world_size == 1:
                self.interrupt.check()

        begun = time.perf_counter()
        run, config = self.run, self.run.config
        evaluation = evaluate(
            run.sampler(config.seed + 1),
            run.task,
            run.tokenizer,
            problems,
            samples=samples,
            max_new_tokens=config.max_completion_length,
            temperature=config.eval_temperature,
            on_progress=on_progress,
        )
        self.spend("evaluate", time.perf_counter() - begun)
        return evaluation

    def train(self) -> None:
        """GRPO, with a small evaluation and a checkpoint now and then."""
        config, diagnostics = self.run.config, Diagnostics(self.run.config)
        assert self.keeper is not None
        state = self.keeper.state
        self.curve_point(state.step)
        self.begin("grpo", config.max_steps)
        for step in grpo(self.run, state, self.safe_point):
            done = state.step
            if done == (config.max_steps + 1) // 2 and self.run.ranks.kind != "fsdp2":
                self.result.close_up = close_up(self.run, done, step.portions)
            for name in ("generate", "score", "reference", "train"):
                self.spend(name, step.numbers.get(f"time/{name}", 0.0))
            if done % config.logging_steps == 0 or done == config.max_steps:
                self.recorder.write("grpo", done, step.numbers)
            self.display.advance(done, numbers=step.numbers)
            complaints = [m for m in self.run.rewards.messages if m not in self.complained]
            self.complained.update(complaints)
            for advice in [*diagnostics.advice(step.numbers), *complaints]:
                self.result.notes.append(f"Step {done}: {advice}")
                self.display.note(f"  note: {advice}")
            self.safe_point()
            self.curve_point(done)
            if config.save_steps and (done % config.save_steps == 0 or done == config.max_steps):
                self.save()
        self.spend("checkpoints", self.keeper.seconds)
        self.result.memory = memory_of(state)

    def curve_point(self, step: int) -> None:
        """A small evaluation on validation questions, unless it is not due or was made before an interruption."""
        every = self.run.config.eval_steps
        made = self.recorder.is_evaluated(step)
        if every and step % every == 0 and not made and self.run.ranks.is_main:
            problems = self.run.held_out("validation", CURVE_QUESTIONS)
            if not problems:
                return
            evaluation = self._evaluate(problems, CURVE_SAMPLES)
            self.recorder.write(
                "eval", step, evaluation.scores | {"mean_length": evaluation.mean_length}
            )


def has_checkpoints(opened: Opened) -> bool:
    """Whether the run can go on from something, so that no base has to be made."""
    return opened.source is not None or bool(Store(opened.folder / rundir.CHECKPOINTS, 0).names())


def sources(run: Run) -> list[ModuleType]:
    """The modules that decide what SFT makes."""
    return [sys.modules[type(run.task).__module__], demonstrations, algorithm, batch, policy]
