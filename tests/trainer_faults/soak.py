"""A long run under observation: memory, open files and children must not grow, and its metrics survive a kill -9.

    python -m tests.trainer_faults.soak [--seconds 3600] [--out FILE.json]

Observation begins after a warm-up of 2,000 steps: until then the allocator still meets batches that are larger than
any before, and its heap grows by about 10 %. Then resident memory is compared between the first and the last quarter
of what was observed. The run saves in the background, evaluates now and then, is killed and taken up again.

Exits with 1 if memory has grown by 1 % or more, if the number of open files (but those of a checkpoint that is being
written) or of children changes, if a line of metrics.jsonl is not whole, or if the run cannot be taken up again.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LIMIT = 0.01
WARM_UP_STEPS = 2000
FILES_OF_A_SAVE = 8  # written, or read back, by each of the four writers
JOB = ["copy", "--max-steps=100000000", "--save-steps=50", "--eval-steps=500", "--eval-questions=8", "--no-report",
       "--lr-scheduler-type=constant", "--learning-rate=1e-4", "--async-save"]  # fmt: skip


def start(out: Path, *options: str) -> subprocess.Popen[bytes]:
    """`fastgrpo train` in a process of its own."""
    command = [sys.executable, "-m", "fastgrpo", "train", *JOB, f"--output-dir={out}", *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def look(pid: int) -> dict[str, int]:
    """Resident bytes, open files, threads and children of a process."""
    process = Path(f"/proc/{pid}")
    tasks = list((process / "task").iterdir())
    children = [(task / "children").read_text().split() for task in tasks]
    return {
        "rss": int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        "files": len(list((process / "fd").iterdir())),
        "children": sum(map(len, children)),
    }


def steps(out: Path) -> list[int]:
    """GRPO steps of the whole lines of metrics.jsonl; at most the last line may be torn."""
    lines = (out / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    records = [json.loads(line) for line in lines]
    return [record["step"] for record in records if record["phase"] == "grpo"]


def wait_for(process: subprocess.Popen[bytes], out: Path, step: int) -> None:
    """Until the checkpoint of a step, or a later one, is there."""
    while not any(int(p.name[5:]) >= step for p in (out / "checkpoints").glob("step-*")):
        assert process.poll() is None, "the run ended by itself"
        time.sleep(0.5)


def observe(process: subprocess.Popen[bytes], seconds: float) -> list[dict[str, int]]:
    """What the process has, over a time."""
    seen, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, "the run ended by itself"
        seen.append(look(process.pid))
        time.sleep(min(5.0, seconds / 100))
    return seen


def soak(seconds: float, out: Path) -> dict[str, Any]:
    """What came of it."""
    process = start(out)
    try:
        wait_for(process, out, 50)
        first = look(process.pid)
        wait_for(process, out, WARM_UP_STEPS)
        seen = observe(process, seconds)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = steps(out)
    again = start(out, "--resume=auto", f"--max-steps={done[-1] + 5}")
    code = again.wait(timeout=600)
    after = steps(out)
    quarter = len(seen) // 4
    early, late = (
        statistics.median(s["rss"] for s in p) for p in (seen[:quarter], seen[-quarter:])
    )
    return {
        "seconds": seconds,
        "steps": done[-1] - WARM_UP_STEPS,
        "warm_up_steps": WARM_UP_STEPS,
        "warm_up_growth": round(early / first["rss"] - 1, 5),
        "rss_mb": round(late / 1e6, 1),
        "rss_growth": round(late / early - 1, 5),
        "files": [min(s["files"] for s in seen), max(s["files"] for s in seen)],
        "children": sorted({s["children"] for s in seen}),
        "metrics_whole": done == list(range(1, done[-1] + 1))
        and after == list(range(1, done[-1] + 6)),
        "resumed": code == 0,
    }


def is_steady(row: dict[str, Any]) -> bool:
    """Whether nothing grew and nothing was lost."""
    least, most = row["files"]
    steady = row["rss_growth"] < LIMIT and most - least <= FILES_OF_A_SAVE
    return steady and len(row["children"]) == 1 and row["metrics_whole"] and row["resumed"]


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--out", default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        row = soak(options.seconds, Path(name) / "run")
    print(json.dumps(row))
    if options.out is not None:
        Path(options.out).write_text(json.dumps(row, indent=1) + "\n")
    return 0 if is_steady(row) else 1


if __name__ == "__main__":
    sys.exit(main())
