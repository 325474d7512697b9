"""Mutation check of our own tests: change one token of the source, run the tests that guard it, expect a failure.

`python -m tests.tools.mutants --group reference --count 40 --seed 0` works on a copy of the last commit in a temporary
directory. Groups: reference (eager specification), triton (kernels, in the interpreter), cpu (C++, rebuilt each time),
host (validation, batching, autograd), linear (from hidden states to the loss). A mutant that does not compile or import
is not counted, nor is one that is the same program (equivalents.py, each with its reason). Results are appended as JSON
lines; `--summary FILE.json` prints the share killed and the survivors, and writes them down.
"""

import argparse
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.tools.equivalents import EQUIVALENT
from tests.tools.mutant_groups import GROUPS, Group

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "runs" / "mutants.jsonl"
LIMIT_S = (
    300  # at least; a mutant that takes three times as long as the unchanged tests counts as killed
)

SWAPS = {
    "<": ("<=", ">"), "<=": ("<",), ">": (">=", "<"), ">=": (">",), "==": ("!=",), "!=": ("==",),
    "+": ("-",), "-": ("+",), "*": ("/",), "/": ("*",), "&": ("|",), "|": ("&",), "&&": ("||",), "||": ("&&",),
    "and": ("or",), "or": ("and",), "True": ("False",), "False": ("True",), "true": ("false",), "false": ("true",),
    "minimum": ("maximum",), "maximum": ("minimum",), "amax": ("amin",), "amin": ("amax",), "min": ("max",),
    "max": ("min",), "expm1": ("exp",), "log1p": ("log",), "int64": ("int32",), "int64_t": ("int32_t",),
    "0": ("1",), "1": ("0", "2"), "2": ("1",), "0.0": ("1.0",), "1.0": ("0.0",), "0.5": ("1.0",), "4": ("2",),
    "inf": ("nan",), "nan": ("inf",), "float64": ("float32",), "low": ("high",), "high": ("low",),
}  # fmt: skip
PYTHON_SKIP = re.compile(
    r"^\s*(from |import |@|def |class |raise |assert |return f|\"\"\"|#|\w+: )|->|noqa|Error\("
)
CPP_SKIP = re.compile(
    r"^\s*(#|//|template|namespace|using|case |static_assert|struct |inline |constexpr )|CHECK\(|std::|<[A-Za-z]"
)
CPP_TOKEN = re.compile(
    r"[A-Za-z_][A-Za-z_0-9]*|\d+\.\d+|\d+|<=|>=|==|!=|&&|\|\||->|<<|>>|\+=|-=|\*=|[-+*/<>&|]"
)


@dataclass
class Mutant:
    """One changed token, and what came of it."""

    group: str
    file: str
    line: int
    column: int
    before: str
    after: str
    source: str = ""
    outcome: str = ""  # killed, survived or invalid
    by: str = ""
    seconds: float = 0.0


def python_tokens(text: str) -> Iterator[tuple[int, int, str]]:
    """Line, column and text of the operators, numbers and names outside strings, comments and signatures."""
    lines = text.splitlines()
    depth_of_signature = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        row, column = token.start
        line = lines[row - 1] if row <= len(lines) else ""
        if re.match(r"\s*(def|class) ", line) and token.string in ("def", "class"):
            depth_of_signature = 1
        if depth_of_signature:
            depth_of_signature = 0 if token.string == ":" and line.rstrip().endswith(":") else 1
            continue
        if token.type in (tokenize.OP, tokenize.NUMBER, tokenize.NAME) and not PYTHON_SKIP.search(
            line
        ):
            unpacking = token.string in ("*", "-", "+") and re.search(r"[(,\[=]\s*$", line[:column])
            if not (unpacking and token.string == "*"):
                yield row, column, token.string


def cpp_tokens(text: str) -> Iterator[tuple[int, int, str]]:
    """The same for C++ by a regular expression; what does not compile afterwards is not counted."""
    for row, line in enumerate(text.splitlines(), start=1):
        code = line.split("//")[0]
        if CPP_SKIP.search(code) or '"' in code:
            continue
        for match in CPP_TOKEN.finditer(code):
            yield row, match.start(), match.group()


def candidates(name: str, folder: Path) -> list[Mutant]:
    """Every mutant of a group."""
    found = []
    paths = [path for pattern in GROUPS[name].files for path in sorted(folder.glob(pattern))]
    for path in paths:
        text = path.read_text(encoding="utf-8")
        tokens = python_tokens(text) if path.suffix == ".py" else cpp_tokens(text)
        lines = text.splitlines()
        for row, column, token in tokens:
            for after in SWAPS.get(token, ()):
                file = str(path.relative_to(folder))
                found.append(
                    Mutant(name, file, row, column, token, after, lines[row - 1].strip()[:90])
                )
    return found


def copy_repository(folder: Path) -> None:
    """The last commit and the compiled libraries; the copy is what gets changed."""
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True)
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    for library in (ROOT / "fastgrpo").glob("*.so"):
        shutil.copy2(library, folder / "fastgrpo")


def build(folder: Path) -> bool:
    """Compile the CPU library of the copy."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    environment = {**os.environ, "FASTGRPO_CUDA": "0", "FASTGRPO_REQUIRE_EXT": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode == 0


def run_tests(group: Group, folder: Path, limit_s: float) -> tuple[str, str]:
    """Outcome and the first test that failed."""
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", "--tb=no"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "OMP_NUM_THREADS": "1",
        **dict(group.environment),
    }
    command = [sys.executable, "-m", "pytest", *options, *group.tests]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=limit_s
        )
    except subprocess.TimeoutExpired:
        return "killed", "timeout"
    if done.returncode == 0:
        return "survived", ""
    if done.returncode < 0:
        return "killed", f"signal {-done.returncode}"
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    by = failed.group(1) if failed else "no test could run"
    broken = "rror" in done.stdout and done.returncode in (2, 4) and "::" not in by
    return ("invalid" if broken else "killed"), by


def try_mutant(mutant: Mutant, folder: Path, limit_s: float) -> None:
    """Change the copy, build if needed, run the tests, change it back."""
    group, path = GROUPS[mutant.group], folder / mutant.file
    original = path.read_text(encoding="utf-8")
    lines = original.splitlines(keepends=True)
    line = lines[mutant.line - 1]
    lines[mutant.line - 1] = (
        line[: mutant.column] + mutant.after + line[mutant.column + len(mutant.before) :]
    )
    start = time.perf_counter()
    try:
        path.write_text("".join(lines), encoding="utf-8")
        if group.build and not build(folder):
            mutant.outcome = "invalid"
        else:
            mutant.outcome, mutant.by = run_tests(group, folder, limit_s)
    finally:
        path.write_text(original, encoding="utf-8")
    mutant.seconds = round(time.perf_counter() - start, 1)


def survivors(output: Path) -> list[Mutant]:
    """Those that no test noticed the last time they were tried, and those that only took long."""
    tried = [Mutant(**json.loads(line)) for line in output.read_text(encoding="utf-8").splitlines()]
    last = {(m.group, m.file, m.line, m.column, m.after): m for m in tried}
    return [m for m in last.values() if m.outcome == "survived" or m.by == "timeout"]


def campaign(name: str, count: int, seed: int, output: Path, retry: bool) -> None:
    """Draw mutants until `count` of them were valid; or try the survivors of this commit's source once more."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copy_repository(folder)
        pool = candidates(name, folder)
        random.Random(seed).shuffle(pool)
        if retry:
            pool = [m for m in survivors(output) if m.group == name]
        if GROUPS[name].build and not build(folder):
            raise RuntimeError("the unchanged copy does not build")
        begun = time.perf_counter()
        outcome, by = run_tests(GROUPS[name], folder, 10 * LIMIT_S)
        limit_s = max(LIMIT_S, 3 * (time.perf_counter() - begun))
        if outcome != "survived":
            raise RuntimeError(f"the tests fail without a mutant: {by}")
        valid = 0
        for mutant in pool:
            if valid == count:
                break
            try_mutant(mutant, folder, limit_s)
            valid += mutant.outcome != "invalid"
            with output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(mutant)) + "\n")
            print(f"{mutant.outcome:9}{mutant.seconds:6.0f} s  {mutant.file}:{mutant.line} "
                  f"{mutant.before} -> {mutant.after}  {mutant.by}", flush=True)  # fmt: skip


def same_program(mutant: Mutant) -> str | None:
    """Why nothing can notice this mutant; None: something can."""
    if mutant.outcome != "survived":
        return None
    places = (
        key
        for key in EQUIVALENT
        if key[0] == mutant.file and key[2:] == (mutant.before, mutant.after)
    )
    return next((EQUIVALENT[key] for key in places if key[1].startswith(mutant.source)), None)


def summary(output: Path, report: Path | None) -> None:
    """Share killed per group and the survivors; a mutant that was tried again counts as it came out last."""
    lines = output.read_text(encoding="utf-8").splitlines()
    tried = [Mutant(**json.loads(line)) for line in lines]
    places = [(m.group, m.file, m.line, m.column, m.after) for m in tried]
    last = dict(zip(places, tried, strict=True))
    first = dict(zip(reversed(places), reversed(tried), strict=True))
    valid = [
        m for m in last.values() if m.outcome in ("killed", "survived") and not same_program(m)
    ]
    groups = {}
    for name in GROUPS:
        own = [m for m in valid if m.group == name]
        killed = sum(m.outcome == "killed" for m in own)
        if own:
            groups[name] = {"mutants": len(own), "killed": killed}
            print(f"{name}: {killed} of {len(own)} killed ({100 * killed / len(own):.0f} %)")
    survivors = [
        f"{m.file}:{m.line} {m.before} -> {m.after} in: {m.source}"
        for m in valid
        if m.outcome == "survived"
    ]
    print("\n".join(f"survived: {text}" for text in survivors))
    same = sorted(
        {
            f"{m.file} {m.before} -> {m.after}: {why}"
            for m in last.values()
            if (why := same_program(m))
        }
    )
    if report is not None:
        killers = Counter(m.by.split("::")[0] for m in valid if m.outcome == "killed")
        content = {
            "mutants": len(valid),
            "killed": sum(g["killed"] for g in groups.values()),
            "groups": groups,
            "killed_at_once": sum(m.outcome == "killed" for m in first.values()),
            "survivors": survivors,
            "same_program": same,
            "killed_by": dict(killers.most_common()),
        }
        report.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """Run a campaign or print the summary of the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--group", choices=GROUPS)
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--retry", action="store_true", help="only those that survived before")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument(
        "--summary", type=Path, help="JSON file for what came of all results so far"
    )
    options = parser.parse_args()
    options.output.parent.mkdir(exist_ok=True)
    if options.group:
        campaign(options.group, options.count, options.seed, options.output, options.retry)
    if options.summary or not options.group:
        summary(options.output, options.summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
