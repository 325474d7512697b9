"""The `fastgrpo` command: finds the subcommand, prepares the process, and only then lets torch be imported.

Threads and the OpenMP wait policy are read when torch loads, so they are set before; and importing torch takes
seconds, so a command that takes long says first what it is about to do.
"""

import os
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

from fastgrpo.trainer.data.foreign_text import presentable
from fastgrpo.words import did_you_mean

STARTED = time.time()
USAGE = "usage: fastgrpo COMMAND [options]      (fastgrpo COMMAND --help lists a command's options)"


class Command(NamedTuple):
    """A subcommand: `main(arguments) -> exit code` of a module."""

    module: str
    help: str
    announces: bool = False  # whether `main` wants its first line printed before torch loads


COMMANDS = {
    "train": Command(
        "fastgrpo.trainer.commands.train", "GRPO: story (default), copy, gsm8k-equations, gsm8k, custom", True
    ),
    "sft": Command("fastgrpo.trainer.commands.sft", "supervised fine-tuning alone", True),
    "eval": Command("fastgrpo.trainer.commands.eval", "accuracy of a saved model: greedy, pass@1, maj@k, pass@k"),
    "bench": Command("fastgrpo.bench.main", "time the ops against the reference and other packages"),
    "plan": Command("fastgrpo.planner", "memory of a head's loss; --step: a whole step on many GPUs"),
    "verify": Command("fastgrpo.verify", "compare the ops with float64 on your model's head"),
    "reward": Command("fastgrpo.trainer.commands.reward", "try a reward function on sample data"),
    "doctor": Command("fastgrpo.doctor", "what this machine has, and what serves each op"),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns the exit code of the process."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        print(f"fastgrpo {_version()}")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS or not _exists(COMMANDS[name].module):
        print(f"fastgrpo: {_unknown(name)}", file=sys.stderr)
        return 2
    threads = option_value(rest, "threads") or "1"
    set_environment(threads)
    if COMMANDS[name].announces and not {"-h", "--help"} & set(rest):
        print(f"fastgrpo {_version()} {presentable(' '.join(argv))}", flush=True)
    try:
        code: int = import_module(COMMANDS[name].module).main(rest)
    except SystemExit as stop:  # parsers end the process themselves, after help or a complaint
        if isinstance(stop.code, str):
            raise
        return stop.code or 0
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `fastgrpo ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def set_environment(threads: str) -> None:
    """What OpenMP, MKL and tokenizers read once, when they are loaded. What the user has exported stays."""
    os.environ.setdefault("OMP_NUM_THREADS", threads)
    # A thread that waits for its team sleeps instead of spinning: on a busy machine spinning is many times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def option_value(arguments: Sequence[str], name: str) -> str | None:
    """The value of `--name VALUE` or `--name=VALUE`, the last one if there are several."""
    value = None
    for argument, following in zip(arguments, [*arguments[1:], None], strict=False):
        if argument == f"--{name}":
            value = following
        elif argument.startswith(f"--{name}="):
            value = argument.partition("=")[2]
    return value


def _exists(module: str) -> bool:
    """Whether a command's module is there; those of later releases are not listed before."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its package does not exist
        return False


def _available() -> dict[str, Command]:
    return {name: command for name, command in COMMANDS.items() if _exists(command.module)}


def _overview() -> str:
    width = max(map(len, COMMANDS))
    rows = [f"  {name:<{width}}  {command.help}" for name, command in _available().items()]
    return "\n".join([USAGE, "", *rows])


def _unknown(name: str) -> str:
    available = _available()
    return f"no command {name!r}.{did_you_mean(name, available)} Commands: {', '.join(available)}"


def _version() -> str:
    from fastgrpo import __version__

    return __version__
