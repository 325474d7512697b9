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

if __name__ == "__main__":  # before torch is imported
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
        self.token_ids = torch.randint(vocabulary, self.logits.shape[:2], generator=g)
        self.mask = torch.ones(self.logits.shape[:2], dtype=torch.bool)
        self.advantage = torch.tensor([0.7, -0.4])
        with torch.no_grad():
            logprob = fastgrpo.token_logprob(self.logits, self.token_ids).logprob
        noise = torch.randn(2, *logprob.shape, generator=g) * 0.1
        self.old, self.ref = logprob + noise[0], logprob + noise[1]


def log_softmax_logprob(logits: Tensor, token_ids: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, token_ids[..., None])[..., 0]


def log_softmax_logprob_and_entropy(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    log_p = logits.float().log_softmax(-1)
    return log_p.gather(-1, token_ids[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


def policy_loss(logprob: Tensor, advantage: Tensor, old: Tensor, ref: Tensor) -> Tensor:
    advantage = advantage[:, None]
    ratio, delta = torch.exp(logprob - old), ref - logprob
    surrogate = torch.min(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
    return (-surrogate + BETA * (torch.exp(delta) - delta - 1)).mean()


def eager_loss(logits: Tensor, batch: Batch) -> Tensor:
    return policy_loss(log_softmax_logprob(logits, batch.token_ids), batch.advantage, batch.old, batch.ref)


def step(loss_of: Callable[[Tensor, Batch], Tensor]) -> Callable[[Batch], Tensor]:
    """From the logits to their gradient."""

    def run(batch: Batch) -> Tensor:
        leaf = batch.logits.detach().requires_grad_()
        loss_of(leaf, batch).backward()
        return leaf.grad

    return run


def fused_loss(logits: Tensor, batch: Batch, *, overwrite: bool = True) -> Tensor:
    return fastgrpo.grpo_loss(
        logits, batch.token_ids, batch.advantage, batch.mask, old_logprob=batch.old, ref_logprob=batch.ref,
        objective=fastgrpo.Objective.grpo(beta=BETA), with_entropy=False, overwrite_logits=overwrite,
    ).loss  # fmt: skip


def providers() -> dict[str, dict[str, Callable[[Batch], Tensor]]]:
    """Case -> provider -> function; the result is the log-prob or the gradient."""
    logprob = torch.compile(log_softmax_logprob)
    with_entropy = torch.compile(log_softmax_logprob_and_entropy)
    loss = torch.compile(
        lambda z, ids, *rest: policy_loss(log_softmax_logprob(z, ids), *rest)
    )
    table: dict[str, dict[str, Callable[[Batch], Tensor]]] = {
        "logprob": {
            "fastgrpo": lambda b: fastgrpo.token_logprob(b.logits, b.token_ids).logprob,
            "compile": lambda b: logprob(b.logits, b.token_ids),
            "eager": lambda b: log_softmax_logprob(b.logits, b.token_ids),
        },
        "logprob+entropy": {
            "fastgrpo": lambda b: fastgrpo.token_logprob(b.logits, b.token_ids, with_entropy=True).logprob,
            "compile": lambda b: with_entropy(b.logits, b.token_ids)[0],
            "eager": lambda b: log_softmax_logprob_and_entropy(b.logits, b.token_ids)[0],
        },
        "loss+gradient": {
            "fastgrpo in place": step(fused_loss),
            "fastgrpo": step(lambda z, b: fused_loss(z, b, overwrite=False)),
            "compile": step(lambda z, b: loss(z, b.token_ids, b.advantage, b.old, b.ref)),
            "eager": step(eager_loss),
        },
    }
    try:
        from trl.trainer.utils import selective_log_softmax, selective_log_softmax_and_entropy
    except ImportError:
        return table
    table["logprob"]["trl"] = lambda b: selective_log_softmax(b.logits, b.token_ids)
    table["logprob+entropy"]["trl"] = lambda b: selective_log_softmax_and_entropy(b.logits, b.token_ids)[0]
    table["loss+gradient"]["trl"] = step(
        lambda z, b: policy_loss(selective_log_softmax(z, b.token_ids), b.advantage, b.old, b.ref)
    )
    return table


def error_of(case: str, result: Tensor, batch: Batch, rows: int = 8) -> float:
    """Largest error of the first rows of each sequence; a row's gradient depends on its own logits only."""
    z = batch.original[:, :rows].double().requires_grad_()
    if case != "loss+gradient":
        gold = log_softmax_double(z, batch.token_ids[:, :rows])
        return float((result[:, :rows].double() - gold.detach()).abs().max())
    part = policy_loss(
        log_softmax_double(z, batch.token_ids[:, :rows]), batch.advantage.double(),
        batch.old[:, :rows].double(), batch.ref[:, :rows].double(),
    )  # fmt: skip
    (gold,) = torch.autograd.grad(part * rows / batch.mask.shape[1], z)
    return float((result[:, :rows].double() - gold).abs().max() / gold.abs().max())


def log_softmax_double(z: Tensor, token_ids: Tensor) -> Tensor:
    return z.log_softmax(-1).gather(-1, token_ids[..., None])[..., 0]


def measure(args: argparse.Namespace) -> list[dict[str, object]]:
    """Medians of this process."""
    torch.set_num_threads(1)
    records: list[dict[str, object]] = []
    table = providers()
    for name in args.dtypes:
        batch = Batch(args.rows, args.vocabulary, DTYPES[name])
        for case in args.cases:
            times: dict[str, list[float]] = {provider: [] for provider in table[case]}
            errors = {}
            for repeat in range(args.repeats + 1):
                for provider, run in table[case].items():
                    batch.logits.copy_(batch.original)
                    with torch.set_grad_enabled(case == "loss+gradient"):
                        start = time.process_time()
                        result = run(batch)
                        elapsed = time.process_time() - start
                    if repeat == 0:  # compiles and warms up
                        errors[provider] = error_of(case, result, batch)
                    else:
                        times[provider].append(1e3 * elapsed)
                    del result
            for provider, values in times.items():
                records.append({
                    "case": case, "dtype": name, "provider": provider, "ms": statistics.median(values),
                    "error": errors[provider],
                })  # fmt: skip
    return records


def report(best: dict[tuple[str, str, str], dict[str, object]]) -> None:
    print(f"{'case':16} {'dtype':9} {'provider':18} {'CPU ms':>8} {'vs compile':>10} {'max error':>10}")
    for (case, dtype, provider), record in best.items():
        ratio = float(best[case, dtype, "compile"]["ms"]) / float(record["ms"])
        print(f"{case:16} {dtype:9} {provider:18} {record['ms']:8.2f} {ratio:9.2f}x {record['error']:10.1e}")


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
    for huge_pages in ("0", "1"):
        env = os.environ | {"THP_MEM_ALLOC_ENABLE": huge_pages}
        command = [sys.executable, __file__, "--child", *sys.argv[1:]]
        output = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
        for record in json.loads(output.splitlines()[-1]):
            record |= {"huge_pages": huge_pages == "1", "rows": args.rows, "vocabulary": args.vocabulary}
            record |= {"isa": fastgrpo.backend_report().cpu_isa, "torch": torch.__version__}
            key = record["case"], record["dtype"], record["provider"]
            if key not in best or record["ms"] < best[key]["ms"]:
                best[key] = record
    report(best)
    if args.json:
        with open(args.json, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in best.values())


if __name__ == "__main__":
    main()
