"""The open questions that only hardware answers: prediction, measurement, and what the difference says.

python -m benchmarks.gpu.questions OUT/questions.jsonl [copy bandwidth in TB/s]

1. Does the second pass of the one-pass loss find its row in the L2 cache, and with how many rows in flight?
2. What does a matrix product with float32 output cost over one with bf16 output?
3. What does accumulating the weight's gradient in float32 cost, by size of the chunk?
4. Is TRL's forward bound by instructions (0.88 ms) or by memory (0.62 ms)?
5. What does this Triton make of exp2, and how many registers do our kernels take? (benchmarks/static_check.py)
6. How many 128 x 128 tiles of the probabilities have no entry above 2^-12?
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.gpu.common import (
    DEVICE,
    DRY,
    HIDDEN,
    TOKENS,
    VOCABULARY,
    Results,
    milliseconds,
    normal,
)
from fastgrpo import grpo_loss
from fastgrpo.functional.linear.gemm import mm_float32
from fastgrpo.kernels import grpo_loss as one_pass
from fastgrpo.kernels.launch import RowConfig
from fastgrpo.testing import make_inputs

PREDICTED_TBPS = 4.3  # of an H200
Answer = dict[str, object]


def main() -> int:
    """Answer all; a question that fails is an answer too, but makes the exit code 1."""
    results = Results(Path(sys.argv[1]))
    bandwidth = float(sys.argv[2]) if len(sys.argv) > 2 else PREDICTED_TBPS
    questions: tuple[Callable[[float], Iterator[Answer]], ...] = (
        second_pass, float32_output, float32_accumulation, trl_forward, machine_code, empty_tiles,
    )  # fmt: skip
    failed = 0
    for number, question in enumerate(questions, 1):
        try:
            for answer in question(bandwidth):
                results.add(question=number, **answer)
        except (RuntimeError, ImportError, TypeError) as error:
            failed += 1
            message = str(error).splitlines()[0] if str(error) else ""
            results.add(question=number, error=f"{type(error).__name__}: {message}")
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
    return int(failed > 0)


@contextmanager
def _launched_with(config: RowConfig) -> Iterator[None]:
    table = one_pass.row_config
    one_pass.row_config = lambda *_args, **_options: config  # type: ignore[assignment]
    try:
        yield
    finally:
        one_pass.row_config = table


def second_pass(bandwidth: float) -> Iterator[Answer]:
    """Units of memory traffic that the measured time amounts to: 2 if every second read hits, 3 if none does."""
    x = make_inputs(
        1, TOKENS, 128, torch.bfloat16, device=DEVICE
    )  # sides; the logits are made on the device
    logits = normal(1, TOKENS, VOCABULARY, scale=3.0)
    unit_ms = logits.numel() * 2 / bandwidth / 1e9

    def run() -> None:
        leaf = logits.detach().requires_grad_()
        sides = x.loss_arguments() | {"mask": torch.ones_like(x.mask)}
        grpo_loss(
            leaf, x.token_ids, **sides, overwrite_logits=True, with_entropy=True
        ).loss.backward()

    # 512 threads with 64 registers: two programs per multiprocessor, 264 rows in flight on 132 of them.
    options = {
        "two rows per SM (16 warps, 64 registers)": RowConfig(16, 2, 64),
        "one row per SM (16 warps, 128 registers)": RowConfig(16, 2, 128),
        "one row per SM (32 warps, 64 registers)": RowConfig(32, 2, 64),
        "one row per SM (32 warps, 4 loads)": RowConfig(32, 4, 64),
    }
    for name, config in list(options.items())[: 1 if DRY else None]:
        with _launched_with(config):
            ms = milliseconds(run)
        units = ms / unit_ms
        yield {
            "what": f"one-pass loss, {name}", "predicted": "2.0-2.3 units with one row per SM, up to 3 with two",
            "measured": units, "ms": ms,
            "why": "second reads hit the L2 cache" if units < 2.3 else
            "second reads miss, or instructions bind: compare with the other rows of this question",
        }  # fmt: skip


def float32_output(bandwidth: float) -> Iterator[Answer]:
    """The wider output is written at memory speed, beside a product that is bound by arithmetic."""
    for hidden_size in HIDDEN:
        hidden, weight = normal(TOKENS, hidden_size), normal(VOCABULARY, hidden_size, scale=0.02)
        narrow = hidden @ weight.T
        wide = torch.empty(TOKENS, VOCABULARY, device=DEVICE)
        bf16 = milliseconds(lambda h=hidden, w=weight, z=narrow: torch.mm(h, w.T, out=z))
        fp32 = milliseconds(lambda h=hidden, w=weight, z=wide: mm_float32(h, w.T, z))
        more = narrow.numel() * 2 / bandwidth / 1e9
        yield {
            "what": f"mm with float32 output, K={hidden_size}", "predicted": f"at most +{more:.2f} ms",
            "measured": fp32 - bf16, "ms": fp32, "bf16_ms": bf16,
            "why": "the store overlaps with the product" if fp32 - bf16 <= more else
            "more than the bytes explain: another kernel was chosen for this output",
        }  # fmt: skip


def float32_accumulation(bandwidth: float) -> Iterator[Answer]:
    """Each chunk of rows reads and writes the float32 gradient of the weight once more."""
    hidden_size = HIDDEN[-1]
    hidden, dlogits = normal(TOKENS, hidden_size), normal(TOKENS, VOCABULARY, scale=0.01)
    total = torch.zeros(VOCABULARY, hidden_size, device=DEVICE)
    single = milliseconds(lambda: dlogits.T @ hidden)
    predicted = {1: "9 %", 2: "18 %", 4: "36 %"}
    for chunks in (1, 2, 4):
        rows = TOKENS // chunks
        parts = list(zip(dlogits.split(rows), hidden.split(rows), strict=True))

        def accumulate(parts: list[tuple[torch.Tensor, torch.Tensor]] = parts) -> None:
            for dz, h in parts:
                mm_float32(dz.T, h, total, accumulate=True)

        ms = milliseconds(accumulate)
        traffic = 8 * total.numel() * chunks / bandwidth / 1e9
        yield {
            "what": f"float32 sum of dW in chunks of {rows} rows", "predicted": f"+{predicted[chunks]} of one product",
            "measured": f"{(ms / single - 1) * 100:+.0f} %", "ms": ms, "single_ms": single,
            "why": f"the traffic alone is {traffic:.2f} ms; the rest is the shape of the product",
        }  # fmt: skip


def trl_forward(bandwidth: float) -> Iterator[Answer]:
    """23.6 instructions per element at 132 multiprocessors x 128 lanes x 1.98 GHz are 0.88 ms."""
    if DRY:
        yield {
            "what": "TRL's forward",
            "predicted": "0.88 ms",
            "measured": "not run in a rehearsal",
            "why": "",
        }
        return
    from trl.trainer.utils import selective_log_softmax_and_entropy

    logits = normal(1, TOKENS, VOCABULARY, scale=3.0)
    ids = torch.randint(0, VOCABULARY, (1, TOKENS), device=DEVICE)
    with torch.no_grad():
        ms = milliseconds(lambda: selective_log_softmax_and_entropy(logits, ids))
    floor = logits.numel() * 2 / bandwidth / 1e9
    bound = "instructions bind, as modelled" if ms > 1.25 * floor else (
        "memory binds: the instruction model is wrong"
    )  # fmt: skip
    yield {
        "what": f"TRL's forward with entropy, {TOKENS} x {VOCABULARY}",
        "predicted": "0.88 ms (issue-bound), 0.62 ms if memory-bound",
        "measured": ms, "floor_ms": floor, "why": f"{ms / floor:.2f}x of one read: {bound}",
    }  # fmt: skip


def machine_code(bandwidth: float) -> Iterator[Answer]:
    """Compile every kernel with the Triton that is installed here; the log has registers, spills and instructions."""
    if DRY:
        yield {
            "what": "static check",
            "predicted": "0 spills",
            "measured": "not run in a rehearsal",
            "why": "",
        }
        return
    command = [sys.executable, "-m", "benchmarks.static_check", "--sm", "90"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    Path(sys.argv[1]).with_name("static_check.log").write_text(done.stdout + done.stderr)
    last = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()[-1]
    yield {
        "what": "static check with this Triton", "predicted": "0 spills, <= 10 / 8 / 16 instructions per element",
        "measured": "passed" if done.returncode == 0 else "failed", "why": last,
    }  # fmt: skip


def empty_tiles(bandwidth: float) -> Iterator[Answer]:
    """On drawn logits, not rollouts: their tails are thinner than a trained model's, so this is an upper bound."""
    for scale in (3.0, 5.0):
        logits = normal(min(TOKENS, 1024), VOCABULARY, dtype=torch.float32, scale=scale)
        p = logits.softmax(-1)
        tile = 4 if DRY else 128
        rows, columns = p.shape[0] // tile * tile, p.shape[1] // tile * tile
        tiles = p[:rows, :columns].view(rows // tile, tile, columns // tile, tile).amax((1, 3))
        yield {
            "what": f"tiles without p > 2^-12, normal logits of scale {scale:g}", "predicted": "unknown",
            "measured": float((tiles < 2.0**-12).float().mean()),
            "why": "filtering pays only if most tiles are empty; real rollouts have to confirm it",
        }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
