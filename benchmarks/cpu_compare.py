"""Fused CPU ops against eager torch, torch.compile and TRL: process CPU time, one thread, interleaved in one process.

    python benchmarks/cpu_compare.py [--rows 256] [--vocabulary 151936] [--repeats 7] [--json FILE]

Every provider is run with the default allocator and with huge pages (THP_MEM_ALLOC_ENABLE=1), in two processes, and its
better median counts: touching a fresh buffer costs more than streaming it, and peers allocate several. Within a process
the providers take turns, so that a busy machine slows them alike. CPU time, not wall time, for the same reason.

Cases: the log-prob of N tokens without and with entropy (forward), and the GRPO loss (clip 0.2, k3 KL with beta 0.04,
mean over tokens) down to the gradient of the logits. All rows are live and active: no work is skipped. "max error" is
against float64 on the same inputs: of the log-prob, and of the gradient relative to its largest entry.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

import fastgrpo

BETA, CLIP = 0.04, 0.2
CASES = ("logprob", "logprob+entropy", "loss+gradient")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Batch:
    """N tokens in two sequences of equal length."""

    def __init__(self, rows: int, vocabulary: int, dtype: torch.dtype) -> None:
        g = torch.Generator().manual_seed(0)
        self.original = (torch.randn(2, rows // 2, vocabulary, generator=g) * 3).to(dtype)
        self.logits = self.original.clone()
        self.ids = torch.randint(vocabulary, self.logits.shape[:2], generator=g)
        self.mask = torch.ones(self.logits.shape[:2], dtype=torch.bool)
        logprob = fastgrpo.token_logprob(self.logits, self.ids).logprob
        noise = torch.randn(2, *logprob.shape, generator=g) * 0.1
        self.sides = (torch.tensor([0.7, -0.4]), logprob + noise[0], logprob + noise[1])

    def part(self, rows: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """The first rows of each sequence in float64."""
        advantage, *sides = (side.double() for side in self.sides)
        logits = self.original[:, :rows].double().requires_grad_()
        return logits, self.ids[:, :rows], (advantage, *(side[:, :rows] for side in sides))


def plain_logprob(logits: Tensor, ids: Tensor) -> Tensor:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def plain_logprob_and_entropy(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    log_p = logits.float().log_softmax(-1)
    return log_p.gather(-1, ids[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


def plain_loss(logprob: Tensor, advantage: Tensor, old: Tensor, ref: Tensor) -> Tensor:
    advantage = advantage[:, None]
    ratio, delta = torch.exp(logprob - old), ref - logprob
    surrogate = torch.min(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
    return (-surrogate + BETA * (torch.exp(delta) - delta - 1)).mean()


def gradient(loss: Callable[..., Tensor]) -> Callable[[Batch], Tensor]:
    """From the logits to their gradient."""

    def run(batch: Batch) -> Tensor:
        leaf = batch.logits.detach().requires_grad_()
        loss(leaf, batch).backward()
        return leaf.grad

    return run


def fused_loss(logits: Tensor, b: Batch, overwrite_logits: bool) -> Tensor:
    advantage, old, ref = b.sides
    return fastgrpo.grpo_loss(
        logits, b.ids, advantage, b.mask, old_logprob=old, ref_logprob=ref, with_entropy=False,
        objective=fastgrpo.Objective.grpo(beta=BETA), overwrite_logits=overwrite_logits,
    ).loss  # fmt: skip


def providers() -> dict[str, dict[str, Callable[[Batch], Tensor]]]:
    """Case -> provider -> function; the result is the log-prob or the gradient."""
    logprob, both = torch.compile(plain_logprob), torch.compile(plain_logprob_and_entropy)
    loss = torch.compile(lambda z, ids, *sides: plain_loss(plain_logprob(z, ids), *sides))
    ours = fastgrpo.token_logprob
    table = {
        "logprob": {
            "fastgrpo": lambda b: ours(b.logits, b.ids).logprob,
            "compile": lambda b: logprob(b.logits, b.ids),
            "eager": lambda b: plain_logprob(b.logits, b.ids),
        },
        "logprob+entropy": {
            "fastgrpo": lambda b: ours(b.logits, b.ids, with_entropy=True).logprob,
            "compile": lambda b: both(b.logits, b.ids)[0],
            "eager": lambda b: plain_logprob_and_entropy(b.logits, b.ids)[0],
        },
        "loss+gradient": {
            "fastgrpo in place": gradient(lambda z, b: fused_loss(z, b, True)),
            "fastgrpo": gradient(lambda z, b: fused_loss(z, b, False)),
            "compile": gradient(lambda z, b: loss(z, b.ids, *b.sides)),
            "eager": gradient(lambda z, b: plain_loss(plain_logprob(z, b.ids), *b.sides)),
        },
    }
    try:
        from trl.trainer.utils import selective_log_softmax as trl
        from trl.trainer.utils import selective_log_softmax_and_entropy as trl_both
    except ImportError:
        return table
    table["logprob"]["trl"] = lambda b: trl(b.logits, b.ids)
    table["logprob+entropy"]["trl"] = lambda b: trl_both(b.logits, b.ids)[0]
    table["loss+gradient"]["trl"] = gradient(lambda z, b: plain_loss(trl(z, b.ids), *b.sides))
    return table


def error_of(case: str, result: Tensor, batch: Batch, rows: int = 8) -> float:
    """Largest error of the first rows of each sequence; a row's gradient depends on its own logits only."""
    z, ids, sides = batch.part(rows)
    logprob = plain_logprob(z, ids)
    want, largest = logprob.detach(), 1.0
    if case == "loss+gradient":
        share = ids.shape[1] / batch.mask.shape[1]
        (want,) = torch.autograd.grad(plain_loss(logprob, *sides) * share, z)
        largest = float(want.abs().max())
    return float((result.detach()[:, :rows].double() - want).abs().max()) / largest


def measure(args: argparse.Namespace) -> list[dict[str, object]]:
    """Medians of this process."""
    torch.set_num_threads(1)
    records, table = [], providers()
    for dtype in args.dtypes:
        batch = Batch(args.rows, args.vocabulary, DTYPES[dtype])
        for case in args.cases:
            times: dict[str, list[float]] = {provider: [] for provider in table[case]}
            errors: dict[str, float] = {}
            for repeat in range(args.repeats + 1):  # the first compiles and warms up
                for provider, run in table[case].items():
                    batch.logits.copy_(batch.original)
                    start = time.process_time()
                    result = run(batch)
                    times[provider].append(1e3 * (time.process_time() - start))
                    if repeat == 0:
                        errors[provider] = error_of(case, result, batch)
                    del result
            for provider, values in times.items():
                record = {"case": case, "dtype": dtype, "provider": provider}
                record |= {"ms": statistics.median(values[1:]), "error": errors[provider]}
                records.append(record)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--json", metavar="FILE", help="append one line per provider")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args)))
        return
    best: dict[tuple[str, str, str], dict[str, object]] = {}
    shared = {"rows": args.rows, "vocabulary": args.vocabulary, "torch": torch.__version__}
    shared["isa"] = fastgrpo.backend_report().cpu_isa
    for huge_pages in ("0", "1"):
        command = [sys.executable, __file__, "--child", *sys.argv[1:]]
        env = os.environ | {"THP_MEM_ALLOC_ENABLE": huge_pages}
        output = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
        for record in json.loads(output.stdout.splitlines()[-1]):
            key = record["case"], record["dtype"], record["provider"]
            if key not in best or record["ms"] < best[key]["ms"]:
                best[key] = record | shared | {"huge_pages": huge_pages == "1"}
    print("case             dtype     provider             CPU ms  x compile  max error")
    for (case, dtype, provider), record in best.items():
        ms, error = record["ms"], record["error"]
        ratio = best[case, dtype, "compile"]["ms"] / ms
        print(f"{case:16} {dtype:9} {provider:18} {ms:8.2f} {ratio:10.2f} {error:10.1e}")
    if args.json:
        with open(args.json, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in best.values())


if __name__ == "__main__":
    main()
