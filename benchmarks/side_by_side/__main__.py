"""Run every row against every installed system, each in a process of its own, and write the table.

`python -m benchmarks.side_by_side [--systems fastgrpo trl-eager ...] [--output FILE]`. A check that ends its process (a
read outside of a tensor, behind which lies a protected page) is recorded; the next one starts afresh.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.side_by_side.systems import SYSTEMS
from benchmarks.side_by_side.table import ADVANTAGES, LOGITS, LOSSES, ROWS, Row, is_right
from benchmarks.side_by_side.verdicts import ABSENT

ROOT = Path(__file__).resolve().parent.parent.parent
CHECKS = [(row, check) for row in ROWS for check in row.checks]
READS_OUTSIDE = "reads outside (SIGSEGV)"


def child(name: str, first: int) -> None:
    """Run the checks from `first` on and print one JSON line each."""
    warnings.simplefilter("ignore")
    system = SYSTEMS[name]()
    for index, (_, check) in enumerate(CHECKS[first:], start=first):
        try:
            verdict = check(system)
        except NotImplementedError:
            verdict = ABSENT
        except Exception as error:
            verdict = f"ERR ({type(error).__name__})"
        print(json.dumps([index, verdict]), flush=True)


def run_system(name: str) -> list[str]:
    """Verdict of each check, restarting behind a check that killed the process."""
    verdicts: list[str] = []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **SYSTEMS[name]().environment}
    while len(verdicts) < len(CHECKS):
        command = [
            sys.executable,
            "-m",
            "benchmarks.side_by_side",
            "--child",
            name,
            "--first",
            str(len(verdicts)),
        ]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
        verdicts += [json.loads(line)[1] for line in lines]
        if len(verdicts) < len(CHECKS):
            if done.returncode not in (-signal.SIGSEGV, -signal.SIGBUS):
                raise RuntimeError(f"{name} ended with {done.returncode}:\n{done.stderr[-2000:]}")
            verdicts.append(READS_OUTSIDE)
    return verdicts


def cells(verdicts: list[str]) -> list[list[str]]:
    """Group the verdicts of the checks by row."""
    position, grouped = 0, []
    for row in ROWS:
        grouped.append(verdicts[position : position + len(row.checks)])
        position += len(row.checks)
    return grouped


def cell(row: Row, parts: list[str]) -> str:
    """Text of a cell; what is not right is bold."""
    shown = [part if is_right(row, part) else f"**{part}**" for part in parts]
    return shown[0] if len(set(shown)) == 1 else " / ".join(shown)


def section(title: str, rows: tuple[Row, ...], results: dict[str, list[list[str]]]) -> list[str]:
    """A Markdown table; systems without a single answer in it are left out."""
    start = ROWS.index(rows[0])
    span = range(start, start + len(rows))
    names = [n for n in results if any(part != ABSENT for k in span for part in results[n][k])]
    lines = [f"## {title}", "", "| case | " + " | ".join(SYSTEMS[n]().title for n in names) + " |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for k in span:
        lines.append(
            f"| {ROWS[k].title} | " + " | ".join(cell(ROWS[k], results[n][k]) for n in names) + " |"
        )
    return [*lines, ""]


def score_of(results: list[list[str]]) -> str:
    """Right rows of those that the system has."""
    has = [k for k, parts in enumerate(results) if any(part != ABSENT for part in parts)]
    right = [k for k in has if all(is_right(ROWS[k], part) for part in results[k])]
    return f"{len(right)} of {len(has)}"


def installed(distribution: str) -> str:
    """Version, or that it is missing."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def document(results: dict[str, list[list[str]]]) -> str:
    """The Markdown page."""
    names = ("fastgrpo", "trl", "liger-kernel", "torch", "triton")
    versions = ", ".join(f"{name} {installed(name)}" for name in names)
    totals = "; ".join(f"{SYSTEMS[n]().title}: {score_of(r)}" for n, r in results.items())
    lines = [
        "# Bad input, side by side",
        "",
        "Written by `python -m benchmarks.side_by_side`; do not edit. The ids are those of the failure catalogue,",
        "which `tests/ops/test_catalogue_*.py` runs in full. CPU tensors; Triton kernels run in Triton's interpreter,",
        f"which executes their source. {versions}.",
        "",
        "**ok**: equal to float64. **refused**: `ValueError` or `TypeError` that names the argument. **flagged**:",
        "the faulty row is NaN, counted in the metrics, and no other row changes. **ERR**: another exception.",
        "**accepted**: no error for an argument that means nothing. **reads outside**: memory behind the tensor,",
        "which a protected page shows. A dash: no such function. The rest says what came out; bold is wrong.",
        "",
        "Wrong is a result that looks like one and is none, or a refusal of input that has a result. So an ERR",
        "counts as right where the input is at fault (a bad id, beta without a reference) or the derivative is one",
        "that need not be offered: the user is stopped, if not told why. It is bold where the input is good, such",
        "as an empty batch. Of fastgrpo more is asked: bad input must be refused by name or flagged, and an ERR",
        "there would be wrong.",
        "",
        f"Right rows of those that a system has: {totals}.",
        "",
        *section("Logits, ids, shapes, derivatives", LOGITS, results),
        *section("Loss", LOSSES, results),
        *section("Advantages", ADVANTAGES, results),
    ]
    return "\n".join(lines)


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "side_by_side.md")
    parser.add_argument("--child", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.first)
        return 0
    results = {}
    for name in options.systems:
        print(f"running {SYSTEMS[name]().title} ...", flush=True)
        results[name] = cells(run_system(name))
        print(f"  right: {score_of(results[name])}")
    options.output.write_text(document(results), encoding="utf-8")
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
