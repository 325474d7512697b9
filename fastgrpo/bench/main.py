"""`fastgrpo bench`: one command, one table, JSON lines, a page and a plot.

On a CPU, run it once more with THP_MEM_ALLOC_ENABLE=1 in the environment: PyTorch's allocator then asks for huge pages,
which makes providers that allocate much up to three times faster. A process has one setting, and the results record it.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import product

import torch

from fastgrpo.bench.goals import verdicts
from fastgrpo.bench.options import DTYPES, ENTROPY, STEP, parse
from fastgrpo.bench.problems import Case
from fastgrpo.bench.report import markdown, plot, print_table
from fastgrpo.bench.rows import Row, compare, write_jsonl
from fastgrpo.bench.run import environment, run_case
from fastgrpo.bench.step import ROUNDS, breakdown


def cases(args: argparse.Namespace) -> list[Case]:
    """Every case that the command line asks for."""
    hidden, vocabulary = args.size
    entropy = [ENTROPY[name] for name in args.entropy]
    found: list[Case] = []
    for kind in args.what:
        if kind == STEP:
            continue
        if kind == "advantage":
            found += [Case(kind, "forward", 64 * b, 1, 0, torch.float32) for b in (64, 8192)]
        for name in args.dtype if kind != "advantage" else ():
            size = (args.tokens, vocabulary, hidden, DTYPES[name])
            if kind == "linear":
                found += _linear(size, args.mode, args.active, entropy[0])
            else:
                # A log-prob alone has a backward of its own; a loss makes its gradient in forward.
                allowed = [m for m in args.mode if m != "backward" or kind == "logprob"]
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
    args = parse(argv, __doc__ or "")
    torch.set_num_threads(args.threads)
    device = args.device
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
    rounds = args.rounds or (5 if args.quick else 20)
    for number, case in enumerate(plan, 1):
        print(f"[{number}/{len(plan)}] {case}", file=sys.stderr, flush=True)
        done = run_case(
            case, device, rounds=rounds, budget_seconds=args.budget, seed=args.seed, say=print
        )
        rows += done
        compare(rows)
        # Goals are for real shapes: small ones are bound by other things.
        goals = [] if args.quick else verdicts(rows, device.type == "cuda")
        print_table(done, [goal for goal in goals if goal.case == str(case)])
        if args.out:  # after each case: an interrupted run keeps what it measured
            args.out.mkdir(parents=True, exist_ok=True)
            write_jsonl(args.out / "results.jsonl", env, rows)
            (args.out / "results.md").write_text(markdown(env, rows, goals))
    if STEP in args.what:
        steps = 4 if args.quick else 20
        options = (
            "--device",
            str(device),
            "--threads",
            str(args.threads),
            "--seed",
            str(args.seed),
        )
        records = breakdown(args.job, steps, print, options, args.rounds or ROUNDS)
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
