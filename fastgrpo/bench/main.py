"""`fastgrpo bench`: one command, one table, JSON lines, a page and a plot.

On a CPU, run it once more with THP_MEM_ALLOC_ENABLE=1 in the environment: PyTorch's allocator then asks for huge pages,
which makes providers that allocate much up to three times faster. A process has one setting, and the results record it.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch

from fastgrpo.bench.goals import verdicts
from fastgrpo.bench.problems import Case, preset
from fastgrpo.bench.report import markdown, plot, print_table
from fastgrpo.bench.rows import Row, compare, write_jsonl
from fastgrpo.bench.run import environment, run_case
from fastgrpo.bench.step import breakdown

KINDS = ("logprob", "loss", "linear", "advantage")
STEP = "step"  # not a kind of problem but a run of the bundled trainer
MODES = ("forward", "backward", "train")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ENTROPY = {"off": False, "on": True}


def parser() -> argparse.ArgumentParser:
    """Build the command line."""
    p = argparse.ArgumentParser(
        prog="fastgrpo bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    names = "comma-separated: {}".format
    p.add_argument(
        "--what",
        default=",".join(KINDS),
        help=names(", ".join(KINDS)) + "; step: stages of a training step, by the bundled trainer",
    )
    p.add_argument("--job", default="story", help="what the trainer runs for --what step")
    p.add_argument("--mode", default="forward,train", help=names(", ".join(MODES)))
    p.add_argument(
        "--preset",
        default="qwen2.5-0.5b",
        help="model whose hidden size and vocabulary are used, or a size: 2048x151936",
    )
    p.add_argument(
        "--tokens", type=int, help="tokens per call (default 256 on a CPU, 8192 on a GPU)"
    )
    p.add_argument("--dtype", help=names(", ".join(DTYPES)) + " (default bfloat16,float32)")
    p.add_argument(
        "--entropy", help="off, on or both (default off,on); the linear losses take the first"
    )
    p.add_argument(
        "--active", default="1,0.4", help="shares of rows with a gradient, for the linear losses"
    )
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--threads", type=int, default=1, help="CPU threads")
    p.add_argument("--rounds", type=int, default=20, help="most repetitions of each provider")
    p.add_argument("--budget", type=float, default=20.0, help="seconds per case")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, help="folder for results.jsonl, results.md and results.png")
    p.add_argument("--quick", action="store_true", help="small shapes, one dtype, in a minute")
    return p


def _defaults(args: argparse.Namespace) -> None:
    """What depends on other options."""
    args.dtype = args.dtype or ("bfloat16" if args.quick else "bfloat16,float32")
    args.entropy = args.entropy or ("off" if args.quick else "off,on")
    args.tokens = args.tokens or (128 if args.quick else 256 if args.device == "cpu" else 8192)


def _listed(args: argparse.Namespace, option: str, known: Any) -> list[str]:
    values: list[str] = getattr(args, option).split(",")
    unknown = [value for value in values if value not in known]
    if unknown:
        raise SystemExit(
            f"fastgrpo bench: unknown {', '.join(unknown)}; --{option} takes {', '.join(known)}"
        )
    return values


def cases(args: argparse.Namespace) -> list[Case]:
    """Every case that the command line asks for."""
    _defaults(args)
    dtypes = [DTYPES[name] for name in _listed(args, "dtype", DTYPES)]
    entropy = [ENTROPY[name] for name in _listed(args, "entropy", ENTROPY)]
    modes = _listed(args, "mode", MODES)
    hidden, vocabulary = (64, 2048) if args.quick else preset(args.preset)
    found: list[Case] = []
    for kind in _listed(args, "what", (*KINDS, STEP)):
        if kind == STEP:
            continue
        if kind == "advantage":
            found += [Case(kind, "forward", 64 * b, 1, 0, torch.float32) for b in (64, 8192)]
        for dtype in dtypes if kind != "advantage" else ():
            size = (args.tokens, vocabulary, hidden, dtype)
            if kind == "linear":
                shares = [float(share) for share in args.active.split(",")]
                found += _linear(size, modes, shares, entropy[0])
            else:
                # A log-prob alone has a backward of its own; a loss makes its gradient in forward.
                allowed = [m for m in modes if m != "backward" or kind == "logprob"]
                found += [Case(kind, m, *size, entropy=e) for m, e in product(allowed, entropy)]
    return found


def _linear(
    size: tuple[int, int, int, torch.dtype], modes: list[str], shares: list[float], entropy: bool
) -> Iterator[Case]:
    for mode in modes:
        if mode != "backward":
            yield Case("linear", mode, *size, entropy=entropy)
    if "train" in modes:
        for share, by in product([s for s in shares if s < 1], ("mask", "advantage")):
            yield Case("linear", "train", *size, active=share, skip_by=by, entropy=entropy)
        yield Case("linear", "train", *size, frozen_head=True, entropy=entropy)


def main(argv: list[str]) -> int:
    """Run the benchmark; exit code 1 if an answer of ours was wrong."""
    args = parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    env = environment(device, args.seed)
    torch_version, pages = env["versions"]["torch"], "on" if env["thp"] else "off"
    print(
        f"{env['device']}, {env['threads']} thread(s), ISA {env['cpu_isa']}, torch {torch_version}"
    )
    if device.type == "cpu":
        print(
            f"CPU: processor time of interleaved runs, huge pages {pages}; read the ratios, not the milliseconds."
        )
    rows: list[Row] = []
    plan = cases(args)
    rounds, budget = (5, 1.0) if args.quick else (args.rounds, args.budget)
    for number, case in enumerate(plan, 1):
        print(f"[{number}/{len(plan)}] {case}", file=sys.stderr, flush=True)
        done = run_case(
            case, device, rounds=rounds, budget_seconds=budget, seed=args.seed, say=print
        )
        rows += done
        compare(rows)
        goals = verdicts(rows, device.type == "cuda")
        print_table(done, [goal for goal in goals if goal.case == str(case)])
        if args.out:  # after each case: an interrupted run keeps what it measured
            args.out.mkdir(parents=True, exist_ok=True)
            write_jsonl(args.out / "results.jsonl", env, rows)
            (args.out / "results.md").write_text(markdown(env, rows, goals))
    if STEP in args.what.split(","):
        records = breakdown(args.job, 4 if args.quick else 20, print)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(env | record) + "\n" for record in records]
            (args.out / "step.jsonl").write_text("".join(lines))
    if args.out and rows:
        files = ["results.jsonl", "results.md"]
        if plot(args.out / "results.png", rows):
            files.append("results.png")
        print(f"\nwritten to {args.out}: {', '.join(files)}")
    wrong = [row for row in rows if row.ours and row.wrong]
    for row in wrong:
        print(f"WRONG: {row.provider} on {row.case}: {row.errors}")
    return 1 if wrong else 0
