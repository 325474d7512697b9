"""A whole run: its parts, its folder, its phases, and the files that it leaves."""

import contextlib
import os
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from fastgrpo.trainer.checkpoint.weights import Unusable
from fastgrpo.trainer.options.config import TrainConfig
from fastgrpo.trainer.options.opening import Opened, open_run
from fastgrpo.trainer.options.settings import SettingsError, fail
from fastgrpo.trainer.output import closing, rundir
from fastgrpo.trainer.output import page as report
from fastgrpo.trainer.output.display import SilentDisplay, make_display
from fastgrpo.trainer.output.recorder import Recorder
from fastgrpo.trainer.output.result import Result
from fastgrpo.trainer.parallel import distributed
from fastgrpo.trainer.parallel.distributed import Ranks
from fastgrpo.trainer.parallel.interrupt import Interrupt
from fastgrpo.trainer.phases import Phases
from fastgrpo.trainer.setup import Run, make_run

Made = TypeVar("Made")


def run_job(config: TrainConfig, started: float) -> int:
    """Runs the job and writes its files into its folder; returns the exit code."""
    ranks = distributed.start(config.parallel, config.dead_rank_seconds)
    try:
        code = _prepare(config, ranks, started)
        ranks.stop()
    except BaseException as error:
        if ranks.heartbeat is not None:
            traceback.print_exc()
            ranks.heartbeat.failed(error)
        raise
    return code


def _prepare(config: TrainConfig, ranks: Ranks, started: float) -> int:
    """Claims the folder only when all that the options name has been found good: a slip leaves nothing behind."""
    run = _on_every_rank(ranks, lambda: make_run(config, ranks))
    opened = None if run is None else _on_every_rank(ranks, lambda: open_run(config))
    if run is None or opened is None:
        return 2
    with opened.lock or contextlib.nullcontext():
        return _run(run, opened, started)


def _on_every_rank(ranks: Ranks, make: Callable[[], Made]) -> Made | None:
    """What `make` makes; None if it failed on any rank, the first of which says why."""
    made, problem = None, None
    try:
        made = make()
    except ValueError as error:
        problem = error
    told = ranks.share({"failed": problem is not None})
    failed = [rank for rank, said in enumerate(told) if said["failed"]]
    if problem is not None and ranks.rank == failed[0]:
        fail(problem)
    return None if failed else made


def _run(run: Run, opened: Opened, started: float) -> int:
    out, ranks, config = opened.folder, run.ranks, run.config
    result = Result(asdict(config))
    result.seconds["load"] = time.time() - started
    display = make_display() if ranks.is_main else SilentDisplay()
    display.note(f"everything goes to {out}/")
    metrics = out / rundir.METRICS if ranks.is_main else Path(os.devnull)
    with (
        Recorder(metrics, resume=opened.resume and ranks.is_main) as recorder,
        Interrupt(ranks) as interrupt,
    ):
        try:
            code = Phases(run, out, result, recorder, display, interrupt).go(opened)
        except (Unusable, SettingsError) as error:
            return fail(error)
        finally:
            display.close()
    if ranks.is_main and not config.check_resume:
        save_model(run, out)
        result.records = recorder.records
        finish(run, out, result, started)
    ranks.wait()
    return code


def finish(run: Run, out: Path, result: Result, started: float) -> None:
    """Report, summary and closing words."""
    result.wall_s, result.cpu_s = time.time() - started, time.process_time()
    result.words = closing.words(run.task, result)
    if run.config.report:
        write_report(result, out)
    result.wall_s, result.cpu_s = time.time() - started, time.process_time()
    rundir.write_json(out / rundir.SUMMARY, result.summary())
    print(closing.text(result, out), flush=True)


def save_model(run: Run, out: Path) -> None:
    """Model and tokenizer as `from_pretrained` reads them, whole or not at all."""
    draft = out / f".{rundir.MODEL}"
    shutil.rmtree(draft, ignore_errors=True)
    model = run.policy.model if run.sampled is None else run.sampled
    model.save_pretrained(draft)
    run.tokenizer.save_pretrained(draft)
    shutil.rmtree(out / rundir.MODEL, ignore_errors=True)  # of an earlier end of the same run
    draft.rename(out / rundir.MODEL)


def write_report(result: Result, out: Path) -> None:
    """report.html; a missing matplotlib costs the report, not the run."""
    try:
        rundir.write_text(out / rundir.REPORT, report.render(result))
    except ImportError:
        result.notes.append(
            "No report: matplotlib is not installed (pip install 'fastgrpo[report]')."
        )
