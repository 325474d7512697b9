"""Sizes, timing and result files of the GPU check. FASTGRPO_DRY_RUN=1: tiny sizes on the CPU, to rehearse the flow."""

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastgrpo.bench.measure import Clock

DRY = os.environ.get("FASTGRPO_DRY_RUN") == "1"
DEVICE = torch.device("cpu" if DRY else "cuda")
TOKENS = 4 if DRY else 8192
VOCABULARY = 48 if DRY else 151_936
HIDDEN = (16,) if DRY else (896, 2048, 4096)
SQUARE = 64 if DRY else 8192  # side of the matrix product that shows the peak


def milliseconds(
    run: Callable[[], object], clock: Clock | None = None, budget_seconds: float = 0.4
) -> float:
    """Median time of a call with a cold L2 cache: at least 3 calls, at most 50, after 2 that warm up."""
    clock = clock or Clock(DEVICE)
    if DRY:
        return clock.time(run)[0] * 1e3
    run()
    run()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 3 or (len(times) < 50 and time.perf_counter() - started < budget_seconds):
        times.append(clock.time(run)[0])
    return statistics.median(times) * 1e3


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    """Random, not zeros: a product of zeros runs faster than one of data."""
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


class Results:
    """JSON lines, written as they come, so that a stage that is stopped keeps what it has."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        path.write_text("")

    def add(self, **record: object) -> None:
        """Append a record and print it."""
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print("  ".join(f"{name}={_short(value)}" for name, value in record.items()), flush=True)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
