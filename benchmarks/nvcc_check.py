"""Compile csrc/cuda/*.cu for GPUs that need not be here and read what ptxas says about each kernel."""

import hashlib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "build" / "static_check"
_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for 'sm_(?P<sm>\d+)a?'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<usage>[^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class CudaKernel:
    """What ptxas reports."""

    file: str
    name: str
    sm: int
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int


def find_nvcc() -> str | None:
    """The CUDA compiler that `setup.py` would use."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    folders = os.pathsep.join((os.environ.get("PATH", ""), f"{home}/bin"))
    return os.environ.get("NVCC") or shutil.which("nvcc", path=folders)


class Compilation:
    """One source file being compiled, or its log where neither it nor the compiler has changed."""

    def __init__(self, source: Path, nvcc: str, sms: tuple[int, ...]) -> None:
        spec = find_spec("torch")
        if spec is None or spec.origin is None:
            raise RuntimeError("the CUDA files need torch's headers")
        include = Path(spec.origin).parent / "include"
        self.source = source
        command = [nvcc, "-std=c++20", "-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"]  # fmt: skip
        command += ["-isystem", str(include), "-Xptxas", "-v", "-fatbin"]
        command += [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in sms]
        version = subprocess.run([nvcc, "--version"], capture_output=True, check=True).stdout
        digest = hashlib.sha256(version + " ".join(command).encode())
        for path in sorted([*source.parent.parent.glob("*.h"), *source.parent.glob("*.h"), source]):
            digest.update(path.read_bytes())
        self.log = LOGS / f"{source.stem}.{digest.hexdigest()[:16]}.log"
        self.process: subprocess.Popen[str] | None = None
        if not self.log.exists():
            LOGS.mkdir(parents=True, exist_ok=True)
            self.fatbin = self.log.with_suffix(".fatbin")
            command += ["-o", str(self.fatbin), str(source)]
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )

    def kernels(self) -> list[CudaKernel]:
        """Wait for the compiler and read its log."""
        if self.process is not None:
            output, _ = self.process.communicate()
            if self.process.returncode:
                raise RuntimeError(f"nvcc failed on {self.source.name}:\n{output}")
            self.fatbin.unlink()
            self.log.write_text(output)
        found = []
        for match in _ENTRY.finditer(self.log.read_text()):
            shared = re.search(r"(\d+) bytes smem", match["usage"])
            found.append(
                CudaKernel(
                    file=self.source.name,
                    name=_readable(match["name"]),
                    sm=int(match["sm"]),
                    registers=int(match["registers"]),
                    spill_bytes=int(match["stores"]) + int(match["loads"]),
                    stack_bytes=int(match["stack"]),
                    shared_bytes=int(shared[1]) if shared else 0,
                )
            )
        if not found:
            raise RuntimeError(f"nvcc compiled no kernel of {self.source.name}")
        return found


def _readable(mangled: str) -> str:
    """The kernel's own name out of a mangled one, with its first template argument."""
    match = re.search(r"\d([a-z_]+_kernel)(I[a-zA-Z0-9]*?E)?", mangled)
    if match is None:
        return mangled
    arguments = {"Id": "<double", "If": "<float"}.get((match[2] or "")[:2], "")
    width = re.search(r"Li(\d+)E", mangled) if arguments else None
    return match[1] + arguments + (f", {width[1]}>" if width else ">" if arguments else "")


def start(sms: tuple[int, ...]) -> list[Compilation] | None:
    """Start compiling every file, or return None without nvcc."""
    nvcc = find_nvcc()
    if nvcc is None:
        return None
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True)
    sms = tuple(sm for sm in sms if f"sm_{sm}" in known.stdout.split())
    return [Compilation(path, nvcc, sms) for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
