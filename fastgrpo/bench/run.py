"""Run the cases: make the problem, let the providers take turns, judge their answers, collect rows."""

import platform
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fastgrpo
from fastgrpo import backend_report
from fastgrpo.bench.judge import errors, is_wrong
from fastgrpo.bench.measure import Clock, Timing, interleave
from fastgrpo.bench.problems import Case, make_problem
from fastgrpo.bench.providers import PROVIDERS, Contestant, Provider, Unavailable


@dataclass
class Row:
    """One provider on one case."""

    case: str
    what: str
    mode: str
    dtype: str
    tokens: int
    vocabulary: int
    hidden: int
    active: float
    skip_by: str
    frozen_head: bool
    provider: str
    ours: bool
    floor: bool
    has_entropy: bool
    skips: str
    note: str
    unavailable: str = ""
    wrong: bool = False
    ms: float = 0.0
    ms_low: float = 0.0
    ms_high: float = 0.0
    cold_ms: float = 0.0
    repetitions_ms: list[float] = field(default_factory=list)
    extra_mib: float = 0.0
    to_floor: float | None = None  # time / time of the measured floor
    speedup_of_ours: float | None = None  # this provider's time / time of our best right one
    errors: dict[str, float] = field(default_factory=dict)


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
        "thp": _environment_flag("THP_MEM_ALLOC_ENABLE"),
        "seed": seed,
    }


def _environment_flag(name: str) -> bool:
    import os

    return os.environ.get(name) == "1"


def _cpu_name() -> str:
    for line in (
        Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    ):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


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
    problem = make_problem(case, device, seed)
    rows: dict[str, Row] = {}
    contestants: dict[str, Contestant] = {}
    for entry in PROVIDERS[case.what] if providers is None else providers:
        row = rows[entry.name] = _row(case, entry)
        try:
            contestant = entry.make(problem)
            contestant.prepare()
            outputs = contestant.run()
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
        row.errors = {} if entry.is_floor else errors(outputs, problem.expected, problem.mask)
        row.wrong = is_wrong(row.errors)
        contestants[entry.name] = contestant
    timings = interleave(contestants, Clock(device), rounds, budget_seconds)
    for name, timing in timings.items():
        _fill(rows[name], timing)
    _compare(list(rows.values()))
    return list(rows.values())


def _row(case: Case, entry: Provider) -> Row:
    fields = asdict(case)
    dtype = str(fields.pop("dtype")).removeprefix("torch.")
    fields.pop("length")
    return Row(
        case=str(case), dtype=dtype, provider=entry.name, ours=entry.is_ours, floor=entry.is_floor,
        has_entropy=entry.has_entropy, skips=entry.skips, note=entry.note, **fields,
    )  # fmt: skip


def _fill(row: Row, timing: Timing) -> None:
    row.ms = timing.median * 1e3
    row.ms_low, row.ms_high = (q * 1e3 for q in timing.quartiles)
    row.cold_ms = timing.cold_seconds * 1e3
    row.repetitions_ms = [round(s * 1e3, 4) for s in timing.seconds]
    row.extra_mib = timing.extra_bytes / 2**20


def _compare(rows: list[Row]) -> None:
    """Ratios: to the measured floor, and of each right peer to the best right one of ours."""
    measured = [row for row in rows if row.ms and not row.wrong]
    floor = next((row.ms for row in measured if row.floor), None)
    ours = min((row.ms for row in measured if row.ours), default=None)
    for row in measured:
        row.to_floor = row.ms / floor if floor else None
        if ours and not row.floor:
            row.speedup_of_ours = row.ms / ours
