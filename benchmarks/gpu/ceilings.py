"""Ceilings of this GPU: memory, matrix products, launches. Everything else is a share of these.

python -m benchmarks.gpu.ceilings OUT/ceilings.jsonl
"""

import sys
import time
from pathlib import Path

import torch

from benchmarks.gpu.common import (
    DEVICE,
    HIDDEN,
    SQUARE,
    TOKENS,
    VOCABULARY,
    Results,
    milliseconds,
    normal,
)
from fastgrpo import Objective, group_advantage, policy_loss, token_logprob

COPY_BYTES = 2**20 if DEVICE.type == "cpu" else 4_300_000_000  # 8.6 GB read and written


def copy(results: Results) -> None:
    """Device to device, bytes read plus bytes written."""
    source = torch.randint(0, 127, (COPY_BYTES,), dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    ms = milliseconds(lambda: target.copy_(source))
    results.add(name="copy", ms=ms, tb_per_s=2 * COPY_BYTES / ms / 1e9)


def gemm(results: Results) -> None:
    """A large square product in bf16: the peak that counts."""
    a, b = normal(SQUARE, SQUARE), normal(SQUARE, SQUARE)
    ms = milliseconds(lambda: a @ b)
    results.add(name=f"gemm {SQUARE}^3 bf16", ms=ms, tflop_per_s=2 * SQUARE**3 / ms / 1e9)


def head_gemms(results: Results) -> None:
    """The three products of a head: logits, gradient of the hidden states, gradient of the weight."""
    for hidden_size in HIDDEN:
        hidden, weight = normal(TOKENS, hidden_size), normal(VOCABULARY, hidden_size, scale=0.02)
        logits = hidden @ weight.T
        products = {
            "logits": lambda h=hidden, w=weight, z=logits: torch.mm(h, w.T, out=z),
            "dhidden": lambda w=weight, z=logits: z @ w,
            "dweight": lambda h=hidden, z=logits: z.T @ h,
        }
        flop = 2 * TOKENS * hidden_size * VOCABULARY
        for name, run in products.items():
            ms = milliseconds(run)
            results.add(name=f"head {name} H={hidden_size}", ms=ms, tflop_per_s=flop / ms / 1e9)


def host_overhead(results: Results) -> None:
    """Time on the host of a call that gives the GPU next to nothing to do."""
    logits, ids = normal(16, 128), torch.zeros(16, dtype=torch.int64, device=DEVICE)
    logprob, reward = -torch.rand(2, 8, device=DEVICE), torch.rand(64, device=DEVICE)
    mask, advantage = torch.ones_like(logprob, dtype=torch.bool), torch.ones(2, device=DEVICE)
    calls = {
        "token_logprob": lambda: token_logprob(logits, ids),
        "policy_loss": lambda: policy_loss(logprob, advantage, mask, objective=Objective.dapo()),
        "group_advantage": lambda: group_advantage(reward, group_size=8),
        "torch.add": lambda: torch.add(logprob, logprob),
    }
    repeats = 1 if DEVICE.type == "cpu" else 300
    for name, run in calls.items():
        run()
        _wait()
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        _wait()
        results.add(name=f"host {name}", us=(time.perf_counter() - start) / repeats * 1e6)


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def main() -> int:
    """Measure all; the argument is the file to write."""
    results = Results(Path(sys.argv[1]))
    for ceiling in (copy, gemm, head_gemms, host_overhead):
        ceiling(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
