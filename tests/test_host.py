"""Packing and balancing: guarantees, the Python twin against the compiled module, and bad arguments."""

import itertools
import random
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgrpo import host

compiled = pytest.mark.skipif(
    host._host is None, reason="fastgrpo._host is not built for this Python (no Python.h?)"
)
# Zeros (empty completions), equal lengths (ties) and a wide range: each takes another branch.
lengths_of = st.lists(st.one_of(st.just(0), st.just(7), st.integers(0, 5000)), max_size=40)
limits = st.one_of(st.none(), st.integers(1, 6))


def total(lengths, part):
    return sum(lengths[i] for i in part)


@given(lengths=lengths_of, slack=st.integers(0, 5000), most=limits)
def test_packing_keeps_every_promise(lengths, slack, most):
    budget = max([1, *lengths]) + slack
    parts = host.pack_by_token_budget(lengths, budget, most)
    assert sorted(itertools.chain(*parts)) == list(range(len(lengths)))
    assert all(part and part == sorted(part) for part in parts)
    assert all(total(lengths, part) <= budget for part in parts)
    assert most is None or all(len(part) <= most for part in parts)
    # Two parts never fit into one: then the sequences of the later one would have been put into the earlier one.
    if most is None:
        assert all(
            total(lengths, a) + total(lengths, b) > budget
            for a, b in itertools.combinations(parts, 2)
        )
    if lengths:
        assert max(lengths) == max(lengths[i] for i in parts[0])


@given(lengths=lengths_of, count=st.integers(1, 9))
def test_balance_keeps_every_promise(lengths, count):
    parts = host.balance(lengths, count)
    sums = [total(lengths, part) for part in parts]
    assert len(parts) == count
    assert sorted(itertools.chain(*parts)) == list(range(len(lengths)))
    assert all(part == sorted(part) for part in parts)
    assert sums == sorted(sums, reverse=True)
    # No rank waits without work: an empty one would not join the collectives of its backward.
    assert all(parts) or len(lengths) < count
    # Merging opposite orders never widens a spread, and each starts as the length of one sequence.
    assert sums[0] - sums[-1] <= max(lengths, default=0)


def test_balance_is_near_equal_on_real_lengths():
    rng = random.Random(0)
    lengths = [
        min(4096, int(rng.lognormvariate(6.0, 1.0))) for _ in range(512)
    ]  # completions have long tails
    sums = [total(lengths, part) for part in host.balance(lengths, 8)]
    in_order = [sum(lengths[i::8]) for i in range(8)]
    assert max(sums) / (sum(lengths) / 8) < 1.0005
    assert max(in_order) / (sum(lengths) / 8) > 1.02  # what dealing them out would cost every step


@pytest.mark.parametrize(
    ("lengths", "budget", "most", "parts"),
    [
        ([], 4, None, []),
        ([4], 4, None, [[0]]),  # exactly full
        ([1, 2, 3, 4], 5, None, [[0, 3], [1, 2]]),
        ([2, 2, 2, 2], 8, 3, [[0, 1, 2], [3]]),  # the number of sequences binds
        ([0, 0, 0], 1, None, [[0, 1, 2]]),
        ([5, 3, 2, 2], 6, None, [[0], [1, 2], [3]]),
    ],
)
def test_packing_by_hand(lengths, budget, most, parts):
    assert host.pack_by_token_budget(lengths, budget, most) == parts


@pytest.mark.parametrize(
    ("lengths", "count", "parts"),
    [
        ([], 2, [[], []]),
        (
            [8, 7, 6, 5, 4],
            2,
            [[1, 3, 4], [0, 2]],
        ),  # 16 : 14; dealing the longest first gives 17 : 13
        ([3, 0, 0], 3, [[0], [1], [2]]),  # empty completions spread too
        ([2], 3, [[0], [], []]),
        ([1, 1, 1], 1, [[0, 1, 2]]),
    ],
)
def test_balance_by_hand(lengths, count, parts):
    assert host.balance(lengths, count) == parts


@compiled
@given(lengths=lengths_of, slack=st.integers(0, 5000), most=limits, count=st.integers(1, 9))
def test_compiled_and_python_give_the_same(lengths, slack, most, count):
    budget = max([1, *lengths]) + slack
    limit = most or len(lengths) + 1
    assert host._host.pack_by_token_budget(lengths, budget, limit) == host._pack_by_token_budget(
        lengths, budget, limit
    )
    assert host._host.balance(lengths, count) == host._balance(lengths, count)


@compiled
def test_capability_is_the_same_from_cpuid_and_from_linux():
    assert host._host.detect_cpu_isa() == host._detect_cpu_isa()


@compiled
def test_the_interpreter_lock_is_released():
    lengths = list(range(1, 20001))
    worker = threading.Thread(target=host.balance, args=(lengths, 128))
    worker.start()
    begin = last = time.perf_counter()
    longest = 0.0
    while worker.is_alive():
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    # Held, this loop would stand still for as long as the call runs.
    assert longest < 0.5 * (last - begin), f"stood still {longest:.3f} s of {last - begin:.3f} s"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: host.pack_by_token_budget([3, 9], 8),
            ValueError,
            r"lengths\[1\] = 9 .* budget = 8",
        ),
        (lambda: host.pack_by_token_budget([3, -1], 8), ValueError, r"lengths\[1\] = -1"),
        (lambda: host.pack_by_token_budget([1], 0), ValueError, "budget must be >= 1, got 0"),
        (
            lambda: host.pack_by_token_budget([1], 4, 0),
            ValueError,
            "max_sequences must be >= 1, got 0",
        ),
        (lambda: host.pack_by_token_budget([1.5], 4), TypeError, "float"),
        (lambda: host.pack_by_token_budget([1], 4.0), TypeError, "float"),
        (lambda: host.balance([1], 0), ValueError, "parts must be >= 1, got 0"),
        (lambda: host.balance([-2], 1), ValueError, r"lengths\[0\] = -2"),
        (lambda: host.balance(["a"], 1), TypeError, "str"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_tensors_and_numpy_integers_are_lengths():
    import numpy as np
    import torch

    assert host.pack_by_token_budget(torch.tensor([1, 2]), 3) == [[0, 1]]
    assert host.balance(np.array([1, 2]), 2) == [[1], [0]]


def test_capability_can_be_lowered(monkeypatch):
    monkeypatch.setenv("FASTGRPO_CPU_ISA", "baseline")
    assert host.cpu_capability() == "baseline"
    monkeypatch.setenv("FASTGRPO_CPU_ISA", "")
    assert host.cpu_capability() in host.CPU_ISAS


def test_capability_cannot_be_raised_or_misspelt(monkeypatch):
    monkeypatch.setenv("FASTGRPO_CPU_ISA", "avx")
    with pytest.raises(ValueError, match="FASTGRPO_CPU_ISA must be one of baseline, avx2"):
        host.cpu_capability()
    monkeypatch.setattr(host, "_host", None)
    monkeypatch.setattr(host, "_detect_cpu_isa", lambda: "avx2")
    monkeypatch.setenv("FASTGRPO_CPU_ISA", "avx512")
    with pytest.raises(ValueError, match="has only avx2"):
        host.cpu_capability()


def test_without_the_compiled_module_the_twin_serves(monkeypatch):
    monkeypatch.setattr(host, "_host", None)
    assert host.pack_by_token_budget([4, 3, 2, 1], 5) == [[0, 3], [1, 2]]
    assert host.balance([4, 3, 2, 1], 2) == [[0, 3], [1, 2]]
    assert host.cpu_capability() in host.CPU_ISAS


@compiled
def test_the_compiled_module_needs_no_torch():
    code = "import fastgrpo._host as h, sys; assert h.balance([1, 2], 2); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
