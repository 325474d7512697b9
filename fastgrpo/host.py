"""Work for the host alone: dividing sequences by token count, and what the CPU can do. Imports no torch.

Each function runs in the compiled module `fastgrpo._host` where it was built and in Python elsewhere, with identical
results. The compiled ones release the interpreter lock, so that a data-loading thread can pack the next batch.
"""

import os
import platform
from bisect import bisect_left, insort
from collections.abc import Iterable
from heapq import heapify, heappop, heappush
from operator import index
from pathlib import Path

try:
    import fastgrpo._host as _host
except ImportError:  # not built for this Python
    _host = None

CPU_ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")

# CPU flags that the kernels of each instruction set need, besides those of the sets before it.
_FLAGS = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512_bf16": {"avx512_bf16"},
}


def pack_by_token_budget(
    lengths: Iterable[int],  # [B] tokens of each sequence, >= 0
    budget: int,  # tokens that one part may hold
    max_sequences: int | None = None,  # sequences that one part may hold
) -> list[list[int]]:
    """Few parts that each keep within a token budget, for micro-batches of packed sequences.

    Best-fit decreasing: sequences from long to short, each into the fullest part that still has room. Every index
    stands in exactly one part, in ascending order; the part with the longest sequence comes first, so that memory runs
    out in the first step or never. Deterministic.

    Raises:
        ValueError: a length is negative or larger than the budget, or a limit is below 1.
        TypeError: a length or limit is not an integer.
    """
    counts, budget = _checked_lengths(lengths), _checked_limit("budget", budget)
    for i, length in enumerate(counts):
        if length > budget:
            raise ValueError(f"lengths[{i}] = {length} is larger than budget = {budget}")
    most = len(counts) + 1
    if max_sequences is not None:
        most = _checked_limit("max_sequences", max_sequences)
    if _host is not None:
        parts: list[list[int]] = _host.pack_by_token_budget(counts, budget, most)
        return parts
    return _pack_by_token_budget(counts, budget, most)


def balance(
    lengths: Iterable[int],  # [B] tokens of each sequence, >= 0
    parts: int,  # how many ranks or micro-batches
) -> list[list[int]]:
    """Exactly `parts` parts with nearly equal token counts, for ranks that wait for each other.

    The largest differencing method of Karmarkar and Karp. Every index stands in exactly one part, in ascending order;
    the heaviest part comes first. No part is empty unless there are fewer sequences than parts. Deterministic.

    Raises:
        ValueError: a length is negative, or `parts` is below 1.
        TypeError: a length or `parts` is not an integer.
    """
    counts, parts = _checked_lengths(lengths), _checked_limit("parts", parts)
    if _host is not None:
        result: list[list[int]] = _host.balance(counts, parts)
        return result
    return _balance(counts, parts)


def cpu_capability() -> str:
    """The instruction set that CPU kernels use here: baseline, avx2, avx512 or avx512_bf16.

    `FASTGRPO_CPU_ISA` lowers it, to measure or to rule a code path out.

    Raises:
        ValueError: `FASTGRPO_CPU_ISA` is none of these names, or more than this CPU has.
    """
    found: str = _host.detect_cpu_isa() if _host is not None else _detect_cpu_isa()
    wanted = os.environ.get("FASTGRPO_CPU_ISA") or found
    if wanted not in CPU_ISAS:
        raise ValueError(f"FASTGRPO_CPU_ISA must be one of {', '.join(CPU_ISAS)}, got {wanted!r}")
    if CPU_ISAS.index(wanted) > CPU_ISAS.index(found):
        raise ValueError(f"FASTGRPO_CPU_ISA={wanted} but this CPU has only {found}")
    return wanted


def _checked_lengths(lengths: Iterable[int]) -> list[int]:
    counts = [index(length) for length in lengths]
    for i, length in enumerate(counts):
        if length < 0:
            raise ValueError(f"lengths must be >= 0, got lengths[{i}] = {length}")
    return counts


def _checked_limit(name: str, value: int) -> int:
    if index(value) < 1:
        raise ValueError(f"{name} must be >= 1, got {value}")
    return index(value)


def _pack_by_token_budget(lengths: list[int], budget: int, max_sequences: int) -> list[list[int]]:
    """Twin of `pack_by_token_budget` in csrc/host/packing.cpp."""
    packed: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (free tokens, part) of the parts that are open, sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(free, (lengths[i], 0))
        if place == len(free):
            room, part = budget, len(packed)
            packed.append([])
        else:
            room, part = free.pop(place)
        packed[part].append(i)
        if len(packed[part]) < max_sequences:
            insort(free, (room - lengths[i], part))
    return [sorted(part) for part in packed]


# A bucket of `_balance` sorts by its first three entries: heaviest first; more items break ties, so that sequences of
# length 0 spread too and no part stays empty; then the lowest index inside.
_Bucket = tuple[int, int, float, tuple[int, ...]]


def _balance(lengths: list[int], parts: int) -> list[list[int]]:
    """Twin of `balance` in csrc/host/packing.cpp."""
    empty: _Bucket = (0, 0, float("inf"), ())
    # (-spread, id, buckets): the heap gives the most uneven partial partition, the oldest one among equals
    heap: list[tuple[int, int, list[_Bucket]]] = []
    for i, length in enumerate(lengths):
        spread = -length if parts > 1 else 0
        heap.append((spread, i, [(-length, -1, i, (i,)), *[empty] * (parts - 1)]))
    if not heap:
        return [[] for _ in range(parts)]
    heapify(heap)
    created = len(heap)
    while len(heap) > 1:
        _, _, uneven = heappop(heap)
        _, _, other = heappop(heap)
        merged: list[_Bucket] = sorted(
            (a[0] + b[0], a[1] + b[1], min(a[2], b[2]), a[3] + b[3])
            for a, b in zip(uneven, reversed(other), strict=True)
        )
        heappush(heap, (merged[0][0] - merged[-1][0], created, merged))
        created += 1
    return [sorted(bucket[3]) for bucket in heap[0][2]]


def _detect_cpu_isa() -> str:
    """Twin of `detect_cpu_isa` in csrc/host/cpu_capability.h, from the flags that Linux lists."""
    found = "baseline"
    if platform.machine() not in ("x86_64", "AMD64") or not Path("/proc/cpuinfo").exists():
        return found
    text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    flags = {f for line in text.splitlines() if line.startswith("flags") for f in line.split()}
    for isa, needed in _FLAGS.items():
        if not needed <= flags:
            break
        found = isa
    return found
