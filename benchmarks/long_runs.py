"""Tables of docs/long_runs.md from what `make faults`, `make soak` and benchmarks.checkpoint have left in results/."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
NOTHING = "*Not measured yet.*\n"


def _read(name: str) -> Any:
    """A result; None if it has not been measured."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def faults() -> str:
    """What was planted how often, and how many tests found a difference."""
    found = _read("faults")
    if found is None:
        return NOTHING
    lines = ["| what happens | trials |", "|---|---|"]
    lines += [f"| {kind} | {number:,} |" for kind, number in found["trials"].items()]
    failed = len(found["failed"])
    verdict = f"{found['passed']} tests passed, {failed} failed"
    if not failed:
        verdict += ': every trial ended as this page says, and where it says "the same bits", in the same bits'
    return "\n".join(lines) + f"\n\n`make faults`: {verdict}.\n"


def soak() -> str:
    """Memory, files and children of a long run."""
    row = _read("soak")
    if row is None:
        return NOTHING
    least, most = row["files"]
    children = ", ".join(map(str, row["children"]))
    return (
        f"`make soak`, {row['seconds'] / 60:.0f} minutes, {row['steps']:,} steps after a warm-up of "
        f"{row['warm_up_steps']:,} (in which the heap grew by {row['warm_up_growth']:.1%}, as larger batches came): "
        f"resident memory {row['rss_mb']:.0f} MB, growth {row['rss_growth']:.2%}; {least} open files, {most} while a "
        f"checkpoint is written; {children} children. Killed with -9, `metrics.jsonl` was "
        f"{'whole' if row['metrics_whole'] else 'NOT whole'} and the run was "
        f"{'' if row['resumed'] else 'NOT '}taken up again.\n"
    )


def saving() -> str:
    """What training waits for a save, by the size of the model."""
    found = _read("checkpoint")
    if found is None:
        return NOTHING
    lines = [
        "| parameters | a step, s | wait for a save, s | with `--async-save`, s | as a share of the step |",
        "|---|---|---|---|---|",
    ]
    for name, row in found["training"].items():
        cells = (row["step_s"], row["waiting_s"], row["copy_s"])
        numbers = " | ".join(f"{value:.3g}" for value in cells)
        lines.append(f"| {name} | {numbers} | {row['stall']:.1%} |")
    files = found["files"]
    return "\n".join(lines) + (
        f"\n\nWriting, syncing, hashing and reading back {files['megabytes']} MB takes "
        f"{files['best_over_best']:.2g} times as long as only writing and syncing them (best of each, "
        f"{found['cores']} cores; median of pairs {files['save_over_raw']:.2g}).\n"
    )


BLOCKS = {"faults": faults, "soak": soak, "saving": saving}
