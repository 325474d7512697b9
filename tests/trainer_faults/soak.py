"""A long run under observation: memory, open files and children must not grow, and its metrics survive a kill -9.

    python -m tests.trainer_faults.soak [--seconds 3600] [--option ...]

Exits with 1 if the resident memory of the last quarter is more than 1 % above that of the second, if the number of
open files or children changes, if a line of metrics.jsonl is not whole, or if the run cannot be taken up again.
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

LIMIT = 0.01
JOB = ["copy", "--max-steps=100000000", "--save-steps=50", "--eval-steps=500", "--eval-questions=8", "--no-report",
       "--lr-scheduler-type=constant", "--learning-rate=1e-4"]  # fmt: skip


def start(out: Path, *options: str) -> subprocess.Popen[bytes]:
    """`fastgrpo train` in a process of its own."""
    command = [sys.executable, "-m", "fastgrpo", "train", *JOB, f"--output-dir={out}", *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def look(pid: int) -> dict[str, int]:
    """Resident pages, open files and children of a process."""
    process = Path(f"/proc/{pid}")
    children = [(task / "children").read_text().split() for task in (process / "task").iterdir()]
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


def observe(process: subprocess.Popen[bytes], out: Path, seconds: float) -> list[dict[str, int]]:
    """What the process has open, from its first checkpoint on."""
    while not list((out / "checkpoints").glob("step-*")):
        assert process.poll() is None, "the run ended before its first checkpoint"
        time.sleep(0.2)
    seen, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, "the run ended by itself"
        seen.append(look(process.pid))
        time.sleep(min(5.0, seconds / 100))
    return seen


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600.0)
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "run"
        process = start(out)
        try:
            seen = observe(process, out, seconds)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        done = steps(out)
        again = start(out, "--resume=auto", f"--max-steps={done[-1] + 5}")
        code = again.wait(timeout=600)
        after = steps(out)
    quarter = len(seen) // 4
    early, late = (
        statistics.median(s["rss"] for s in part)
        for part in (seen[quarter : 2 * quarter], seen[-quarter:])
    )
    row = {
        "seconds": seconds,
        "steps": done[-1],
        "rss_mb": round(late / 1e6, 1),
        "rss_growth": round(late / early - 1, 5),
        "files": sorted({s["files"] for s in seen[quarter:]}),
        "children": sorted({s["children"] for s in seen}),
        "metrics_whole": done == list(range(1, done[-1] + 1))
        and after == list(range(1, done[-1] + 6)),
        "resumed": code == 0,
    }
    print(json.dumps(row))
    # a checkpoint that is being written is one more open file
    steady = row["rss_growth"] < LIMIT and max(row["files"]) - min(row["files"]) <= 1
    return 0 if steady and len(row["children"]) == 1 and row["metrics_whole"] and code == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
