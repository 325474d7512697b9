"""A whole job: make or load the base, measure it, train it, measure again, and leave the files of the run."""

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

from fastgrpo.trainer import closing, report, rundir
from fastgrpo.trainer import sft as sft_module
from fastgrpo.trainer.basecache import cache_folder, cache_key, load_base, store_base
from fastgrpo.trainer.config import TrainConfig
from fastgrpo.trainer.diagnostics import Diagnostics
from fastgrpo.trainer.display import Display, make_display
from fastgrpo.trainer.evaluate import Evaluation, evaluate
from fastgrpo.trainer.interrupt import Interrupt, Interrupted
from fastgrpo.trainer.recorder import Recorder
from fastgrpo.trainer.result import Result
from fastgrpo.trainer.settings import fail
from fastgrpo.trainer.setup import Run, make_run
from fastgrpo.trainer.tasks.base import Problem
from fastgrpo.trainer.train import grpo

CURVE_QUESTIONS, CURVE_SAMPLES = 64, 4
"""Size of the small evaluations during training."""
SFT_LOGGING_STEPS = 10


def run_job(config: TrainConfig, out: Path, started: float) -> int:
    """Runs the job and writes its files into `out`; returns the exit code."""
    try:
        run = make_run(config)
    except ValueError as error:
        rundir.release(out)
        return fail(error)
    result = Result(asdict(config))
    result.seconds["load"] = time.time() - started
    display = make_display()
    code = 0
    with Recorder(out / rundir.METRICS) as recorder, Interrupt() as interrupt:
        job = Job(run, out, result, recorder, display, interrupt)
        try:
            job.make_base()
            result.base = job.measure("base")
            job.train()
            result.final = job.measure("final")
        except Interrupted:
            code = interrupt.exit_code
            result.stopped = (
                f"Stopped by the user in phase {job.phase!r}, after {job.steps_done} GRPO steps."
            )
        finally:
            display.close()
    save_model(run, out)
    result.records = recorder.records
    result.wall_s, result.cpu_s = time.time() - started, time.process_time()
    result.words = closing.words(run.task, result)
    if config.report:
        write_report(result, out)
    result.wall_s, result.cpu_s = time.time() - started, time.process_time()
    rundir.write_json(out / rundir.SUMMARY, result.summary())
    print(closing.text(result, out), flush=True)
    return code


class Job:
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
        self.steps_done = 0

    def begin(self, phase: str, total: int) -> None:
        """A phase of `total` steps."""
        self.phase = phase
        self.display.phase(phase, total)

    def spend(self, name: str, seconds: float) -> None:
        """Books time under a name of the report's table."""
        self.result.seconds[name] = self.result.seconds.get(name, 0.0) + seconds

    def make_base(self) -> None:
        """Fine-tunes the random weights on demonstrations, or loads what an earlier run has made of them."""
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
            sft_module.sft(run.policy.model, run.task, run.tokenizer, config), 1
        ):
            self.display.advance(step, f"loss {loss:.3f}")
            if step % SFT_LOGGING_STEPS == 0 or step == config.sft_steps:
                self.recorder.write("sft", step, {"loss": loss})
            self.interrupt.check()
        self.spend("make base (SFT)", time.perf_counter() - begun)
        if folder is not None:
            store_base(run.policy.model, folder, key)

    def measure(self, name: str) -> Evaluation | None:
        """The full evaluation on the test questions."""
        config = self.run.config
        if config.eval_questions == 0:
            return None
        problems = self.run.held_out("test", config.eval_questions)
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
        """GRPO, with a small evaluation now and then."""
        config, diagnostics = self.run.config, Diagnostics(self.run.config)
        self.curve_point(0)
        self.begin("grpo", config.max_steps)
        for done, step in enumerate(grpo(self.run), 1):
            self.steps_done = done
            for name in ("generate", "score", "reference", "train"):
                self.spend(name, step.numbers.get(f"time/{name}", 0.0))
            if done % config.logging_steps == 0 or done == config.max_steps:
                self.recorder.write("grpo", done, step.numbers)
            self.display.advance(done, numbers=step.numbers)
            for advice in diagnostics.advice(step.numbers):
                self.result.notes.append(f"Step {done}: {advice}")
                self.display.note(f"  note: {advice}")
            self.interrupt.check()
            if config.eval_steps and done % config.eval_steps == 0:
                self.curve_point(done)

    def curve_point(self, step: int) -> None:
        """A small evaluation on validation questions."""
        if self.run.config.eval_steps:
            problems = self.run.held_out("validation", CURVE_QUESTIONS)
            evaluation = self._evaluate(problems, CURVE_SAMPLES)
            self.recorder.write(
                "eval", step, evaluation.scores | {"mean_length": evaluation.mean_length}
            )


def sources(run: Run) -> list[ModuleType]:
    """The modules that decide what SFT makes."""
    import sys

    from fastgrpo.trainer import algorithm, batch, policy

    return [sys.modules[type(run.task).__module__], sft_module, algorithm, batch, policy]


def save_model(run: Run, out: Path) -> None:
    """Model and tokenizer as `from_pretrained` reads them, whole or not at all."""
    draft = out / f".{rundir.MODEL}"
    shutil.rmtree(draft, ignore_errors=True)
    run.policy.model.save_pretrained(draft)
    run.tokenizer.save_pretrained(draft)
    draft.rename(out / rundir.MODEL)


def write_report(result: Result, out: Path) -> None:
    """report.html; a missing matplotlib costs the report, not the run."""
    try:
        rundir.write_text(out / rundir.REPORT, report.render(result))
    except ImportError:
        result.notes.append(
            "No report: matplotlib is not installed (pip install 'fastgrpo[report]')."
        )
