"""Read GPU machine code: registers, spills, and the instructions and memory accesses of each loop."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

_TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", re.MULTILINE)
_BRANCH = re.compile(r"^BRA\S*\s.*?(?:0x([0-9a-f]+))$")
_SPILL = re.compile(r"^(?:STL|LDL)")


@dataclass(frozen=True)
class Loop:
    """Body of a loop, counted per thread and iteration."""

    instructions: int
    wide_loads: int  # of 128 bits, from global memory
    narrow_loads: int
    wide_stores: int
    narrow_stores: int
    exponentials: int

    def per_element(self, item_bytes: int) -> float:
        """Instructions per element that is loaded 128 bits at a time."""
        return self.instructions / (self.wide_loads * 16 // item_bytes)


@dataclass(frozen=True)
class Code:
    """A compiled kernel."""

    registers: int
    stack_bytes: int
    spills: int
    instructions: int
    loops: tuple[Loop, ...]

    def main_loop(self, *, storing: bool) -> Loop | None:
        """The loop that streams the row: most accesses of 128 bits, exponentials, and wide stores or no stores.

        Edges stream too, with comparisons on top, so the leanest of several is meant.
        """
        streams = [
            loop
            for loop in self.loops
            if loop.wide_loads
            and loop.exponentials
            and (loop.wide_stores if storing else not loop.narrow_stores + loop.wide_stores)
        ]
        return min(
            streams,
            key=lambda loop: (-loop.wide_loads, loop.instructions),
            default=None,
        )


def _count(body: list[str]) -> Loop:
    loads = [x for x in body if x.startswith("LDG")]
    stores = [x for x in body if x.startswith("STG")]
    wide_loads = sum(".128" in x for x in loads)
    wide_stores = sum(".128" in x for x in stores)
    return Loop(
        instructions=len(body),
        wide_loads=wide_loads,
        narrow_loads=len(loads) - wide_loads,
        wide_stores=wide_stores,
        narrow_stores=len(stores) - wide_stores,
        exponentials=sum(x.startswith("MUFU.EX2") for x in body),
    )


def parse(sass: str, resources: str) -> Code:
    """Parse the output of `cuobjdump -sass` and `-res-usage` of a binary with one kernel."""
    code = [(int(address, 16), text) for address, text in _INSTRUCTION.findall(sass)]
    code = [(address, text) for address, text in code if text != "NOP"]
    branches = ((address, _BRANCH.match(text)) for address, text in code)
    spans = [
        (int(to[1], 16), address) for address, to in branches if to and int(to[1], 16) < address
    ]
    # Innermost ones: a branch from code that was moved out of line spans other loops, which are not its body.
    inner = [x for x in spans if not any(x != y and x[0] <= y[0] and y[1] <= x[1] for y in spans)]
    loops = [_count([text for at, text in code if start <= at <= end]) for start, end in inner]
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", resources)}
    spills = sum(bool(_SPILL.match(text)) for _, text in code)
    return Code(usage["REG"], usage["STACK"], spills, len(code), tuple(loops))


def disassemble(cubin: bytes) -> Code:
    """Disassemble with the tools that Triton brings."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass, resources = (
            subprocess.run(
                [_TOOL, option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("-sass", "-res-usage")
        )
    return parse(sass, resources)
