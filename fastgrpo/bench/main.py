"""`fastgrpo bench`: one command, one table, JSON lines, a page and a plot."""

import argparse
import sys
from pathlib import Path

import torch

from fastgrpo.bench.problems import Case, preset
from fastgrpo.bench.report import markdown, plot, print_table, write_jsonl
from fastgrpo.bench.run import Row, environment, run_case

KINDS = ("logprob", "loss", "linear", "advantage")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parser() -> argparse.ArgumentParser:
    """Build the command line."""
    p = argparse.ArgumentParser(prog="fastgrpo bench", description=__doc__)
    p.add_argument("--what", default=",".join(KINDS), help=f"comma-separated: {', '.join(KINDS)}")
    p.add_argument(
        "--preset", default="qwen2.5-0.5b", help="model whose hidden size and vocabulary are used"
    )
    p.add_argument(
        "--tokens", type=int, help="tokens per call (default 256 on a CPU, 8192 on a GPU)"
    )
    p.add_argument(
        "--dtype", default="bfloat16,float32", help=f"comma-separated: {', '.join(DTYPES)}"
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
    p.add_argument("--quick", action="store_true", help="small shapes, under a minute on two cores")
    return p


def cases(args: argparse.Namespace) -> list[Case]:
    """Every case that the command line asks for."""
    kinds = args.what.split(",")
    unknown = sorted(set(kinds) - set(KINDS)) + sorted(set(args.dtype.split(",")) - set(DTYPES))
    if unknown:
        known = f"--what takes {', '.join(KINDS)}, --dtype {', '.join(DTYPES)}"
        raise SystemExit(f"fastgrpo bench: unknown {', '.join(unknown)}; {known}")
    hidden, vocabulary = (64, 2048) if args.quick else preset(args.preset)
    tokens = args.tokens or (128 if args.quick else 256 if args.device == "cpu" else 8192)
    shares = [float(share) for share in args.active.split(",")]
    found: list[Case] = []
    for kind in kinds:
        if kind == "advantage":
            found += [Case(kind, "forward", 64 * b, 1, 0, torch.float32) for b in (64, 8192)]
            continue
        for dtype in (DTYPES[name] for name in args.dtype.split(",")):
            size = (tokens, vocabulary, hidden, dtype)
            found += [Case(kind, mode, *size) for mode in ("forward", "train")]
            if kind == "linear":
                idle = [
                    (share, by) for share in shares if share < 1 for by in ("mask", "advantage")
                ]
                found += [Case(kind, "train", *size, active=f, skip_by=by) for f, by in idle]
                found += [Case(kind, "train", *size, frozen_head=True)]
    return found


def main(argv: list[str]) -> int:
    """Run the benchmark; exit code 1 if an answer of ours was wrong."""
    args = parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    env = environment(device, args.seed)
    print(
        f"{env['device']}, {env['threads']} thread(s), ISA {env['cpu_isa']}, torch {env['versions']['torch']}"
    )
    if device.type == "cpu":
        print("CPU: processor time of interleaved runs; read the ratios, not the milliseconds.")
    rows: list[Row] = []
    plan = cases(args)
    rounds, budget = (5, 1.0) if args.quick else (args.rounds, args.budget)
    for number, case in enumerate(plan, 1):
        print(f"[{number}/{len(plan)}] {case}", file=sys.stderr, flush=True)
        done = run_case(
            case, device, rounds=rounds, budget_seconds=budget, seed=args.seed, say=print
        )
        print_table(done)
        rows += done
        if args.out:  # after each case: an interrupted run keeps what it measured
            args.out.mkdir(parents=True, exist_ok=True)
            write_jsonl(args.out / "results.jsonl", env, rows)
            (args.out / "results.md").write_text(markdown(env, rows))
    if args.out:
        files = ["results.jsonl", "results.md"]
        if plot(args.out / "results.png", rows):
            files.append("results.png")
        print(f"\nwritten to {args.out}: {', '.join(files)}")
    wrong = [row for row in rows if row.ours and row.wrong]
    for row in wrong:
        print(f"WRONG: {row.provider} on {row.case}: {row.errors}")
    return 1 if wrong else 0
