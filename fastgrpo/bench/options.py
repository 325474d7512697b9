"""The command line of `fastgrpo bench`, checked before anything runs."""

import argparse
from pathlib import Path

import torch

from fastgrpo.bench.problems import preset
from fastgrpo.functional.devices import pick_device
from fastgrpo.words import Parser

KINDS = ("logprob", "loss", "linear", "advantage")
STEP = "step"  # not a kind of problem but a run of the bundled trainer
MODES = ("forward", "backward", "train")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ENTROPY = {"off": False, "on": True}
JOBS = ("story", "copy")  # those that need no file and no model
FOR_KERNELS = ("mode", "preset", "tokens", "dtype", "entropy", "active", "budget")


def parser(description: str) -> Parser:
    """Every option; what depends on others or on the machine is None until `parse` fills it in."""
    p = Parser(
        prog="fastgrpo bench", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    names = "comma-separated: {}".format
    everything = ",".join(KINDS)
    p.add_argument("--what", default=everything, help=names(f"{everything} (the default); step: the stages of a "
                   "training step, by the bundled trainer"))  # fmt: skip
    p.add_argument(
        "--job", choices=JOBS, help="what the trainer runs for --what step (default story)"
    )
    p.add_argument("--mode", help=names(", ".join(MODES)) + " (default forward,train)")
    p.add_argument("--preset", help="model whose hidden size and vocabulary are used, or a size, 2048x151936 (default "
                   "qwen2.5-0.5b, with --quick 256x32768)")  # fmt: skip
    p.add_argument(
        "--tokens",
        type=int,
        help="tokens per call (default 256 on a CPU, 8192 on a GPU, 128 with --quick)",
    )
    p.add_argument("--dtype", help=names(", ".join(DTYPES)) + " (default bfloat16,float32)")
    p.add_argument(
        "--entropy", help="off, on or both (default off,on); the linear losses take the first"
    )
    p.add_argument(
        "--active", help="shares of rows with a gradient, for the linear losses (default 1,0.4)"
    )
    p.add_argument(
        "--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ..."
    )
    p.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    p.add_argument("--rounds", type=int, help="most repetitions of each provider (default 20); of --what step: runs of "
                   "each backend, which take turns (default 2)")  # fmt: skip
    p.add_argument("--budget", type=float, help="seconds per case (default 20, with --quick 1)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, help="folder for results.jsonl, results.md and results.png")
    p.add_argument(
        "--quick", action="store_true", help="small shapes, one dtype, no goals, in a minute"
    )
    return p


def parse(argv: list[str], description: str) -> argparse.Namespace:
    """The options, complete and checked; ends the process with code 2 on one that cannot be meant."""
    p = parser(description)
    args = p.parse_args(argv)
    args.what = args.what.split(",")
    if args.what == [STEP]:
        idle = next((name for name in FOR_KERNELS if getattr(args, name) is not None), None)
        if idle:
            p.error(f"--{idle} has no effect on --what step")
    if args.job is not None and STEP not in args.what:
        p.error("--job belongs to --what step")
    try:
        args.device = pick_device(args.device)
        _fill(args)
        args.size = preset(args.preset)
    except ValueError as error:
        p.error(str(error))
    known = {"what": (*KINDS, STEP), "mode": MODES, "dtype": DTYPES, "entropy": ENTROPY}
    for name, choices in known.items():
        unknown = [value for value in getattr(args, name) if value not in choices]
        if unknown:
            p.error(f"--{name} must be some of {', '.join(choices)}, got {', '.join(unknown)}")
    for name in ("tokens", "threads", "rounds"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            p.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if not args.budget > 0:
        p.error(f"--budget must be above 0, got {args.budget}")
    if not all(0 < share <= 1 for share in args.active):
        p.error(f"--active must be shares in (0, 1], got {', '.join(map(str, args.active))}")
    return args


def _fill(args: argparse.Namespace) -> None:
    """The defaults that depend on other options, and lists instead of text."""
    quick = args.quick
    args.job = args.job or JOBS[0]
    args.preset = args.preset or ("256x32768" if quick else "qwen2.5-0.5b")
    if args.tokens is None:
        args.tokens = 128 if quick else 256 if args.device.type == "cpu" else 8192
    args.budget = (1.0 if quick else 20.0) if args.budget is None else args.budget
    args.mode = (args.mode or "forward,train").split(",")
    args.dtype = (args.dtype or ("bfloat16" if quick else "bfloat16,float32")).split(",")
    args.entropy = (args.entropy or ("off" if quick else "off,on")).split(",")
    try:
        args.active = [float(share) for share in (args.active or "1,0.4").split(",")]
    except ValueError:
        raise ValueError(
            f"--active must be numbers with commas between, got {args.active!r}"
        ) from None
