"""Check the machine code of every GPU kernel without a GPU; run by `make test`.

    python -m benchmarks.static_check [--sm 90]

Every Triton launcher is run on CPU tensors with a driver that compiles and launches nothing (`offline`); the CUDA files
are compiled by nvcc where it is installed. Printed per kernel: registers, spills, shared memory, and for the loops that
stream a row the instructions per element and the accesses of 128 bits and of less per iteration. Fails if anything
spills, if a loop with a budget exceeds it on sm_90, or if it touches memory in pieces smaller than 128 bits.
"""

import argparse
import os
import sys
import time

from benchmarks import nvcc_check
from benchmarks.offline import compile_launches
from benchmarks.sass import Code, disassemble
from benchmarks.static_cases import Case, cases

ARCHITECTURES = (80, 90, 100)
BUDGETED = 90
_LAYOUT = "{:<7}{:<17}{:<35}{:>5}{:>7}{:>7}{:>7}  {:<14}{}"


def _check(sm: int, case: Case, code: Code) -> tuple[str, str, list[str]]:
    """Text of the two last columns and what is wrong."""
    wrong = []
    if code.spills or code.stack_bytes:
        wrong.append(f"spills: {code.spills} accesses, {code.stack_bytes} bytes of stack")
    costs, accesses = [], []
    for storing in case.passes:
        loop = code.main_loop(storing=storing)
        if loop is None:
            wrong.append("no loop streams the row in accesses of 128 bits")
            continue
        narrow = loop.narrow_loads + loop.narrow_stores
        if narrow and case.budget is not None:
            wrong.append("the main loop has accesses of less than 128 bits")
        costs.append(loop.per_element(case.item_bytes))
        accesses.append(
            f"{loop.wide_loads}+{loop.wide_stores} wide" + (f", {narrow} narrow" if narrow else "")
        )
    text = " + ".join(f"{cost:.2f}" for cost in costs)
    if case.budget is not None and sm == BUDGETED:
        text += f" / {case.budget:g}"
        if sum(costs) > case.budget:
            wrong.append(f"{sum(costs):.2f} instructions per element exceed {case.budget:g}")
    return text, "; ".join(accesses), wrong


def check_triton(sms: tuple[int, ...]) -> list[str]:
    """Compile and print every case; return what is wrong."""
    failures = []
    for sm in sms:
        for case in cases():
            if sm != BUDGETED and not case.everywhere:
                continue
            for kernel in compile_launches(sm, case.launch):
                code = disassemble(kernel.cubin)
                streaming = case if kernel.name in _STREAMING else Case(case.name, case.launch)
                cost, accesses, wrong = _check(sm, streaming, code)
                name = kernel.name.strip("_").removesuffix("_kernel")
                print(
                    _LAYOUT.format(
                        f"sm_{sm}", name, case.name, code.registers, code.spills, kernel.shared_bytes,
                        code.instructions, cost, f"  {accesses}",
                    )
                )  # fmt: skip
                failures += [f"sm_{sm} {name}, {case.name}: {x}" for x in wrong]
    return failures


_STREAMING = ("_forward_kernel", "_backward_kernel", "_row_kernel")


def check_cuda(compilations: list[nvcc_check.Compilation] | None) -> list[str]:
    """Print what nvcc says; return what is wrong."""
    if compilations is None:
        print("\nSKIPPED: csrc/cuda was not compiled, there is no nvcc in PATH, CUDA_HOME or NVCC")
        return []
    print()
    failures = []
    for compilation in compilations:
        for kernel in compilation.kernels():
            print(
                f"sm_{kernel.sm:<4}{kernel.file:<20}{kernel.name:<32}{kernel.registers:>5}{kernel.spill_bytes:>7}"
                f"{kernel.shared_bytes:>7}"
            )
            if kernel.spill_bytes:
                failures.append(f"sm_{kernel.sm} {kernel.file} {kernel.name}: spills")
    return failures


def main(arguments: list[str] | None = None) -> int:
    """Run the checks; 1 if one of them fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sm", type=int, action="append", choices=ARCHITECTURES, help="default: all"
    )
    chosen = tuple(parser.parse_args(arguments).sm or ARCHITECTURES)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("unset TRITON_INTERPRET: an interpreted kernel has no machine code")
    began = time.monotonic()
    compilations = nvcc_check.start(chosen)
    print(
        _LAYOUT.format(
            "", "kernel", "case", "regs", "spills", "shared", "instr", "instr/element", "  per iteration"
        )
    )  # fmt: skip
    failures = check_triton(chosen) + check_cuda(compilations)
    print(f"\n{time.monotonic() - began:.0f} s; {len(failures)} failures")
    for failure in failures:
        print(f"FAILED {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
