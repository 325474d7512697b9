"""What a run says at its end: the table, what it does and does not show, and where everything is."""

from collections.abc import Mapping
from pathlib import Path

from fastgrpo.trainer.evaluation.evaluate import Evaluation
from fastgrpo.trainer.output import rundir
from fastgrpo.trainer.output.result import Result
from fastgrpo.trainer.tasks.base import Task


def words(task: Task, result: Result) -> list[str]:
    """Sentences on what the numbers mean, no more than they show."""
    if result.base is None or result.final is None:
        return []
    questions = len(result.final.answered)
    said = [
        f"{questions} held-out questions. Greedy takes the likeliest tokens; the rest come from "
        f"{samples_of(result.final)} samples per question at temperature {result.config['eval_temperature']}. "
        "± is one standard error.",
    ]
    if result.config["model_name_or_path"] is None:
        said.append(task.about_base)
    if result.final.scores.get("pass@1", 0.0) > result.base.scores.get("pass@1", 0.0):
        said.append(task.about_result)
    else:
        said.append("Training did not raise pass@1 here.")
    return said


def samples_of(evaluation: Evaluation) -> int:
    """Samples per question."""
    return len(evaluation.answered[0].answers)


def text(result: Result, out: Path) -> str:
    """The closing words for the terminal."""
    lines = [""]
    if result.stopped:
        lines.append(result.stopped)
    if result.evaluations:
        lines += [table(result.evaluations), "", *result.words]
    if lines[-1]:
        lines.append("")
    files = [name for name in rundir.OWN_FILES if (out / name).exists()]
    lines.append(
        f"wall {result.wall_s:.0f} s, CPU {result.cpu_s:.0f} s. In {out}/: {', '.join(files)}"
    )
    if rundir.REPORT in files:
        lines.append(f"Open {out / rundir.REPORT} for curves and completions.")
    return "\n".join(lines)


def table(evaluations: Mapping[str, Evaluation]) -> str:
    """Scores with standard errors, one row per evaluation, then the same per slice."""
    first = next(iter(evaluations.values()))
    lines = [" " * 16 + "".join(f"{name:>17}" for name in first.scores) + f"{'tokens':>9}"]
    for part in [None, *first.slices]:
        for name, evaluation in evaluations.items():
            view = evaluation if part is None else evaluation.part(part)
            label = name if part is None else f"{name}, {part}"
            cells = "".join(f"{v:>9.3f} ±{view.stderr[k]:6.3f}" for k, v in view.scores.items())
            lines.append(f"{label:<16}{cells}{view.mean_length:>9.1f}")
    return "\n".join(lines)
