"""Command line of `fastgrpo plan`; `--measure` runs each contender and shows how far its formula is off."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec

import torch

from fastgrpo.bench import step_model
from fastgrpo.bench.problems import preset
from fastgrpo.planner.formulas import DTYPES, MIB, PLANS, Case
from fastgrpo.planner.peaks import measure
from fastgrpo.words import Parser

ABOUT = "Peak memory of a language-model head's loss and gradients, before anything is run."
STEP = "fastgrpo plan --step: time and memory of a whole GRPO step on 1 to 1,024 GPUs (fastgrpo plan --step --help)."


def plan(case: Case, measured: bool) -> list[dict[str, object]]:
    """A row per contender: name, planned bytes, and measured ones if asked for."""
    rows: list[dict[str, object]] = []
    for name, formula in PLANS.items():
        row: dict[str, object] = {"name": name, "planned_bytes": formula(case)}
        if measured and (name != "TRL 1.16" or find_spec("trl")):
            row["measured_bytes"] = measure(name, case)
        rows.append(row)
    return rows


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="fastgrpo plan", description=ABOUT, epilog=STEP)
    size = "hidden size and vocabulary of a model, e.g. qwen2.5-0.5b, or of a size like 896x151936"
    parser.add_argument("--preset", help=size)
    parser.add_argument("--hidden", type=int, help="hidden size H, instead of --preset")
    parser.add_argument("--vocab", type=int, help="vocabulary V, instead of --preset")
    parser.add_argument(
        "--tokens", type=int, required=True, help="tokens N of a micro-batch that are scored"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--frozen", action="store_true", help="the head's weight gets no gradient (LoRA)"
    )
    parser.add_argument(
        "--active", type=float, default=1.0, help="share of tokens with a gradient (default 1)"
    )
    parser.add_argument("--precision", choices=("auto", "float32", "input"), default="auto")
    parser.add_argument(
        "--workspace-bytes", type=int, default=None, help="memory for logits (default by device)"
    )
    parser.add_argument("--measure", action="store_true", help="run each contender and compare")
    parser.add_argument("--json", action="store_true", help="print JSON")
    found = parser.parse_args(argv)
    if (found.preset is None) == (found.hidden is None and found.vocab is None):
        parser.error("give either --preset, or --hidden and --vocab")
    if found.preset is not None:
        try:
            found.hidden, found.vocab = preset(found.preset)
        except ValueError as error:
            parser.error(str(error))
    for name in ("hidden", "vocab"):
        if getattr(found, name) is None:
            parser.error(f"--{name} is missing")
    for name in ("hidden", "vocab", "tokens"):
        if getattr(found, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(found, name)}")
    if not 0 <= found.active <= 1:
        parser.error(f"--active must be within 0 and 1, got {found.active}")
    if found.measure and found.device == "cuda" and not torch.cuda.is_available():
        parser.error("--measure needs the device: torch finds no GPU here")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--step" in argv:
        return step_model.main([argument for argument in argv if argument != "--step"])
    options = _arguments(argv)
    case = Case(
        hidden=options.hidden,
        vocabulary=options.vocab,
        tokens=options.tokens,
        dtype=options.dtype,
        device=options.device,
        frozen=options.frozen,
        active=options.active,
        precision=options.precision,
        workspace_bytes=options.workspace_bytes,
    )
    rows = plan(case, options.measure)
    if options.json:
        print(json.dumps({"case": asdict(case), "rows": rows}))
        return 0
    parameters = case.vocabulary * case.hidden * case.item
    kind = "frozen" if case.frozen else "trained"
    size = f"{case.vocabulary:,} x {case.hidden:,} {case.dtype}, {parameters / MIB:,.0f} MiB"
    print(f"{kind} head ({size}) on {case.device}")
    print(f"peak of loss and gradients for {case.tokens:,} tokens, in MiB")
    for row in rows:
        line = f"  {row['name']:<10} {_mib(row['planned_bytes']):>10}"
        if "measured_bytes" in row:
            line += f"   measured {_mib(row['measured_bytes']):>10}"
        print(line)
    return 0


def _mib(value: object) -> str:
    assert isinstance(value, int)
    return f"{value / MIB:,.0f}"
