"""Instruction counts of the CPU kernels (AVX2) under callgrind against a committed baseline: exact where time is noise.

    make callgrind                                     fails if a kernel takes more than 3 % more instructions
    python -m benchmarks.callgrind_gate --update       accept the present counts as the baseline

The driver (callgrind/driver.cpp) is linked with the object files of the library, so the counts are of the code that is
shipped. Valgrind knows no AVX-512; the AVX2 code comes from the same source. Counts depend on the compiler: there is a
baseline per version, and without one there is nothing to compare with (exit code 77: skipped).
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OBJECTS = ROOT / "build" / "native" / "csrc" / "cpu"
NEEDED = ("row_kernels.cpp.o", "policy_kernels.cpp.o")
BASELINE = Path(__file__).with_name("callgrind") / "baseline.json"
TOLERANCE = 0.03
SKIPPED = 77
# What a kernel works through in one measured call (see the driver): columns of two rows, or tokens.
COLUMNS, TOKENS = 2 * 32_003, 4096


class Unmeasurable(Exception):
    """Why nothing can be counted here."""


def compiler() -> str:
    """Name and version of the C++ compiler that setup.py uses."""
    command = [*os.environ.get("CXX", "c++").split(), "-dumpfullversion", "-dumpversion"]
    return (
        "c++ " + subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    )


def measure() -> dict[str, int]:
    """Build the driver, run it once under callgrind, and return instructions by measured function."""
    for tool in ("valgrind", "callgrind_annotate", os.environ.get("CXX", "c++").split()[0]):
        if shutil.which(tool) is None:
            raise Unmeasurable(f"{tool} is not installed")
    objects = [OBJECTS / name for name in NEEDED]
    if not all(path.exists() for path in objects):
        raise Unmeasurable("the library's object files are not there: run `make build`")
    beside = Path(sys.executable).with_name("ninja")
    ninja = str(beside) if beside.exists() else shutil.which("ninja")
    if ninja is None:
        raise Unmeasurable("ninja is not installed")
    command = [ninja, "-C", str(ROOT / "build" / "native"), "-n", *map(str, objects)]
    if "no work to do" not in subprocess.run(command, capture_output=True, text=True).stdout:
        raise Unmeasurable("csrc/cpu is newer than the library's object files: run `make build`")
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise Unmeasurable("torch, whose headers the kernels include, is not installed")
    include = ["-isystem", str(Path(spec.origin).parent / "include")]
    with tempfile.TemporaryDirectory() as folder:
        driver, counts = Path(folder) / "driver", Path(folder) / "counts"
        cxx = [*os.environ.get("CXX", "c++").split(), "-std=c++20", "-O2"]
        abi = "-DTORCH_TARGET_VERSION=0x020a000000000000"
        source = Path(__file__).with_name("callgrind") / "driver.cpp"
        subprocess.run([*cxx, abi, *include, source, *objects, "-o", driver], check=True)
        tool = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={counts}"]
        tool += ["--collect-atstart=no", "--toggle-collect=measured_*"]
        environment = os.environ | {"FASTGRPO_CPU_ISA": "avx2"}
        done = subprocess.run([*tool, driver], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise Unmeasurable(f"the driver failed under valgrind: {done.stdout}{done.stderr}")
        command = ["callgrind_annotate", "--inclusive=yes", "--threshold=100", counts]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^\s*([\d,]+) .*\bmeasured_(\w+)", text, re.MULTILINE)
    return {name: int(count.replace(",", "")) for count, name in sorted(found, key=lambda x: x[1])}


def regressions(counts: dict[str, int], baseline: dict[str, int]) -> list[str]:
    """Kernels that take more than TOLERANCE more instructions, or are not measured any more."""
    missing = [f"{name} is not measured any more" for name in baseline if name not in counts]
    return missing + [
        f"{name}: {counts[name]:,} instructions, {counts[name] / before - 1:+.1%} of {before:,}"
        for name, before in baseline.items()
        if name in counts and counts[name] > before * (1 + TOLERANCE)
    ]


def main(argv: list[str] | None = None) -> int:
    """Measure, print, compare or update."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write the counts to the baseline")
    args = parser.parse_args(argv)
    baselines: dict[str, dict[str, int]] = (
        json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    )
    try:
        counts, version = measure(), compiler()
    except Unmeasurable as reason:
        print(f"SKIPPED: no instruction counts: {reason}")
        return SKIPPED
    before = baselines.get(version, {})
    for name, count in counts.items():
        size, unit = (TOKENS, "token") if name.startswith("policy") else (COLUMNS, "element")
        change = f"{count / before[name] - 1:+7.2%}" if name in before else "   new"
        print(f"{name:26} {count:>9,} instructions  {count / size:8.2f} per {unit:8} {change}")
    if args.update:
        BASELINE.write_text(
            json.dumps(baselines | {version: counts}, indent=1, sort_keys=True) + "\n"
        )
        return 0
    if not before:
        print(
            f"SKIPPED: no baseline for {version} (known: {', '.join(baselines)}); --update makes one"
        )
        return SKIPPED
    worse = regressions(counts, before)
    for line in worse:
        print(f"REGRESSION: {line}")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
