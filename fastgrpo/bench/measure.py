"""Timing and memory: providers take turns on the same inputs; medians with their spread."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fastgrpo.bench.providers.base import Contestant, Outputs


@dataclass
class Timing:
    """Repetitions of one provider on one case."""

    seconds: list[float] = field(default_factory=list)
    least_wall: float = float("inf")  # least elapsed time of a repetition
    extra_bytes: int = 0  # peak memory above what was in use before the call

    @property
    def median(self) -> float:
        """Median of the repetitions."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile."""
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high


class Clock:
    """CPU: processor time of this process. GPU: events around the call. Caches are flushed: a loop would warm them."""

    def __init__(self, device: torch.device, calls: int = 1) -> None:
        """Allocate the buffer that flushes a GPU's L2, or a CPU's caches up to 64 MiB.

        With several `calls` per repetition, for what takes microseconds, caches stay as the calls leave them.
        """
        self.device, self.calls = device, calls
        self.is_cuda = device.type == "cuda"
        size = 2**26
        if self.is_cuda:
            size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(size, dtype=torch.int8, device=device)

    def time(self, run: Callable[[], Outputs]) -> tuple[float, float]:
        """Seconds and elapsed seconds of one call."""
        if self.calls == 1:
            self.flush.zero_()
        if not self.is_cuda:
            wall, start = time.perf_counter(), time.process_time()
            for _ in range(self.calls):
                run()
            seconds, elapsed = time.process_time() - start, time.perf_counter() - wall
            return seconds / self.calls, elapsed / self.calls
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        wall = time.perf_counter()
        begin.record()
        for _ in range(self.calls):
            run()
        end.record()
        end.synchronize()
        elapsed = time.perf_counter() - wall
        return begin.elapsed_time(end) / 1e3 / self.calls, elapsed / self.calls

    def peak_extra_bytes(self, run: Callable[[], Outputs]) -> int:
        """Peak memory of one call above what was in use before it; 0 where the system does not tell."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            run()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated(self.device) - before
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return 0
        before = _status_bytes("VmRSS")
        run()
        return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0


def interleave(
    contestants: dict[str, Contestant], clock: Clock, rounds: int, budget_seconds: float
) -> dict[str, Timing]:
    """Time the contestants in turns A B C A B C ...: at least 3 rounds, at most `rounds`, within the time budget.

    One whose single call takes longer than the budget is timed once: its ratio needs no second digit. Whatever else the
    machine does falls on all of them alike, so a ratio of two keeps its meaning.
    """
    timings = {name: Timing() for name in contestants}
    slow = set()
    for name, contestant in contestants.items():
        contestant.prepare()
        started = time.perf_counter()
        contestant.run()
        if time.perf_counter() - started > budget_seconds:
            slow.add(name)
        contestant.prepare()
        timings[name].extra_bytes = clock.peak_extra_bytes(contestant.run)
    started = time.perf_counter()
    for number in range(rounds):
        for name, contestant in contestants.items():
            if name in slow and number:
                continue
            contestant.prepare()
            seconds, wall = clock.time(contestant.run)
            timings[name].seconds.append(seconds)
            timings[name].least_wall = min(timings[name].least_wall, wall)
        if number >= 2 and time.perf_counter() - started > budget_seconds:
            break
    return timings
