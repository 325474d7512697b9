"""`fastgrpo bench --what step`: where the time of a training step goes, with our kernels and with the eager reference.

The bundled trainer times its own stages. It runs as a process of its own per backend, since the backend is chosen when
the package loads; the two take turns. The times are elapsed time: read them on a quiet machine.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

BACKENDS = {"fastgrpo": "auto", "eager reference": "reference"}
ROUNDS = 2
WARM_UP = 2  # steps left out: allocation, threads
Laps = dict[str, list[float]]


def train(job: str, backend: str, steps: int, folder: Path, options: tuple[str, ...]) -> Laps:
    """Seconds of every stage in every step after the first ones."""
    command = [sys.executable, "-m", "fastgrpo", "train", job, "--output-dir", str(folder)]
    command += ["--max-steps", str(steps + WARM_UP), "--sft-steps", "1", "--eval-steps", "0"]
    command += ["--eval-questions", "8", *options]
    environment = os.environ | {"FASTGRPO_BACKEND": backend}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"fastgrpo train {job} failed: {done.stderr[-500:]}")
    laps: Laps = defaultdict(list)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in [r for r in records if r["phase"] == "grpo"][WARM_UP:]:
        for name, value in record.items():
            if name.startswith("time/") or name == "step_time":
                laps[name.removeprefix("time/")].append(value)
    return laps


def breakdown(
    job: str,
    steps: int,
    say: Callable[[str], None],
    options: tuple[str, ...] = (),
    rounds: int = ROUNDS,
) -> list[dict[str, object]]:
    """One record per backend: median seconds of the stages and of the step, with every repetition."""
    laps: dict[str, Laps] = {name: defaultdict(list) for name in BACKENDS}
    for number in range(rounds):
        for name, backend in BACKENDS.items():
            with tempfile.TemporaryDirectory() as folder:
                for stage, values in train(
                    job, backend, steps, Path(folder) / str(number), options
                ).items():
                    laps[name][stage] += values
    records: list[dict[str, object]] = []
    for name, stages in laps.items():
        medians = {stage: statistics.median(values) for stage, values in stages.items()}
        records.append({"job": job, "provider": name, "seconds": medians, "repetitions": stages})
    names = [stage for stage in records[0]["repetitions"] if stage != "step_time"]  # type: ignore[attr-defined]
    say(f"\nstep of `fastgrpo train {job}`, median of {rounds * steps} steps, elapsed ms")
    say(f"  {'':18}" + "".join(f"{stage:>12}" for stage in [*names, "step"]))
    for record in records:
        seconds: dict[str, float] = record["seconds"]  # type: ignore[assignment]
        cells = [seconds.get(stage, 0.0) for stage in [*names, "step_time"]]
        say(f"  {record['provider']!s:18}" + "".join(f"{1e3 * cell:12.1f}" for cell in cells))
    return records
