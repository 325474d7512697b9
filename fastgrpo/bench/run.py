"""Run the cases: make the problem, let the providers take turns, judge their answers, collect rows."""

import math
import os
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fastgrpo
from fastgrpo import backend_report
from fastgrpo.bench.judge import errors, is_wrong, required
from fastgrpo.bench.measure import Clock, Timing, interleave
from fastgrpo.bench.problems import Case, make_problem
from fastgrpo.bench.providers import PROVIDERS, Contestant, NotApplicable, Provider, Unavailable
from fastgrpo.bench.rows import Row, compare

# Calls per repetition of what takes microseconds.
CALLS = {"advantage": 50}


def environment(device: torch.device, seed: int) -> dict[str, Any]:
    """What a reader must know about the machine and the versions."""

    def package(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return ""

    cuda = device.type == "cuda"
    report = backend_report()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "cpu_isa": report.cpu_isa,
        "backend": report.backend,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "fastgrpo": fastgrpo.__version__,
        "versions": {n: package(n) for n in ("torch", "triton", "trl", "liger-kernel")},
        "git": _git_revision(),
        # Transparent huge pages for PyTorch's CPU allocator: read when torch loads, so a run has one setting.
        "thp": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
        "seed": seed,
    }


def _cpu_name() -> str:
    """Name with family and model: virtual machines shorten the name."""
    info = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    for line in info.read_text().splitlines() if info.exists() else ():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    numbers = (
        f" (family {fields['cpu family']}, model {fields['model']})"
        if "cpu family" in fields
        else ""
    )
    return fields["model name"] + numbers


def _git_revision() -> str:
    try:
        folder = Path(__file__).resolve().parent
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def run_case(
    case: Case,
    device: torch.device,
    *,
    rounds: int,
    budget_seconds: float,
    seed: int,
    say: Callable[[str], None],
    providers: list[Provider] | None = None,
) -> list[Row]:
    """Measure every provider of a case; one that cannot run or answers wrongly keeps a row that says so."""
    torch._dynamo.reset()  # else a compiled peer meets its recompilation limit, or gets dynamic shapes
    problem = make_problem(case, device, seed)
    rows: dict[str, Row] = {}
    contestants: dict[str, Contestant] = {}
    for entry in PROVIDERS[case.what] if providers is None else providers:
        row = rows[entry.name] = Row.of(case, entry)
        try:
            contestant = entry.make(problem)
            contestant.prepare()
            first = time.perf_counter()
            outputs = contestant.run()
            row.cold_ms = (time.perf_counter() - first) * 1e3  # compiles
        except NotApplicable:
            del rows[entry.name]
            continue
        except Unavailable as reason:
            row.unavailable = str(reason)
            say(f"  {entry.name}: not measured, {reason}")
            continue
        except (RuntimeError, ImportError, ValueError, TypeError) as error:
            row.unavailable = (
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
            say(f"  {entry.name}: failed, {row.unavailable}")
            continue
        if not entry.is_floor:
            row.errors = errors(outputs, problem.expected, problem.mask)
            row.errors |= dict.fromkeys(required(case) - set(outputs), math.nan)
        row.wrong = is_wrong(row.errors)
        contestants[entry.name] = contestant
        del outputs  # they are as large as the problem
    clock = Clock(device, calls=CALLS.get(case.what, 1))
    timings = interleave(contestants, clock, rounds, budget_seconds)
    for name, timing in timings.items():
        _fill(rows[name], timing)
    compare(rows.values())
    return list(rows.values())


def _fill(row: Row, timing: Timing) -> None:
    row.ms = timing.median * 1e3
    row.ms_low, row.ms_high = (q * 1e3 for q in timing.quartiles)
    row.repetitions_ms = [round(s * 1e3, 4) for s in timing.seconds]
    row.wall_ms = timing.least_wall * 1e3
    row.extra_mib = timing.extra_bytes / 2**20
