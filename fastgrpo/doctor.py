"""`fastgrpo doctor`: what this machine has, what serves each function and why, and what to do about a slow one."""

import json
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version

import torch

from fastgrpo.integrations.contracts import installed
from fastgrpo.ops.report import BackendReport, backend_report
from fastgrpo.words import Parser

LIBRARIES = ("transformers", "tokenizers", "safetensors", "numpy", "rich", "tyro")
HOSTS = (
    "trl",
    "verl",
    "openrlhf",
    "prime-rl",
    "nemo-rl",
    "liger-kernel",
    "peft",
    "accelerate",
    "datasets",
    "vllm",
    "math-verify",
)


@dataclass(frozen=True)
class Diagnosis:
    """Everything that `fastgrpo doctor` prints."""

    device: str
    device_type: str  # the key of `report.calls` that counts here: "cuda" or "cpu"
    python: str
    tools: dict[str, str | None]  # compiler, nvcc, ninja -> path
    libraries: dict[str, str | None]
    hosts: dict[str, str | None]
    report: BackendReport
    contracts: dict[str, str] = field(default_factory=dict)  # host -> "ok", or what does not match

    @property
    def broken_contracts(self) -> dict[str, str]:
        """Hosts whose adapter does not know the installed version, with the reason."""
        return {host: found for host, found in self.contracts.items() if found != "ok"}

    @property
    def slow(self) -> dict[str, str]:
        """The functions without a native kernel for this device, with the reason."""
        served = {
            name: by_device[self.device_type] for name, by_device in self.report.calls.items()
        }
        return {name: f"{k.name} ({k.why})" for name, k in served.items() if not k.native}


def diagnose(check_hosts: bool = False) -> Diagnosis:
    """Look at the machine and at the dispatcher. Runs no kernel, and imports a host only to check its contract."""
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        device = f"{torch.cuda.get_device_name()} (sm_{major}{minor}), CUDA {torch.version.cuda}"
    else:
        device = f"{_cpu_name()}, {torch.get_num_threads()} thread(s)"
    tools = {"C++ compiler": ("c++", "g++", "clang++"), "nvcc": ("nvcc",), "ninja": ("ninja",)}
    return Diagnosis(
        device=device,
        device_type="cuda" if torch.cuda.is_available() else "cpu",
        python=platform.python_version(),
        tools={
            name: next(filter(None, map(shutil.which, names)), None)
            for name, names in tools.items()
        },
        libraries={name: _version(name) for name in LIBRARIES},
        hosts={name: _version(name) for name in HOSTS},
        report=backend_report(),
        contracts={s.host: s.problem or "ok" for s in installed()} if check_hosts else {},
    )


def render(diagnosis: Diagnosis) -> str:
    """The diagnosis as text for a terminal."""
    report = diagnosis.report
    facts = {
        "device": diagnosis.device,
        "CPU kernels run on": report.cpu_isa,
        "python": diagnosis.python,
        **report.versions,
        **{name: found or "not installed" for name, found in diagnosis.libraries.items()},
        **{name: path or "not found" for name, path in diagnosis.tools.items()},
        "FASTGRPO_BACKEND": report.backend,
    }
    lines = [f"{name:<20}{value}" for name, value in facts.items()]
    present = [f"{name} {found}" for name, found in diagnosis.hosts.items() if found]
    lines += [f"{'optional, installed':<20}{', '.join(present) or 'none'}", ""]
    for host, found in diagnosis.contracts.items():
        known = "adapter matches" if found == "ok" else f"adapter does not match: {found}"
        lines.append(f"{host:<20}{known}")
    lines += [""] if diagnosis.contracts else []
    lines.append(f"{'function':<22}{'on ' + diagnosis.device_type:<20}why")
    for name, by_device in report.calls.items():
        kernel = by_device[diagnosis.device_type]
        lines.append(f"{name:<22}{kernel.name:<20}{kernel.why}")
    lines += ["", *(f"note: {note}" for note in report.notes), _verdict(diagnosis)]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report. Returns 0 if everything has a native kernel and every host's adapter matches, else 1."""
    parser = Parser(prog="fastgrpo doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="do not import hosts such as TRL to check their adapters",
    )
    arguments = parser.parse_args(argv)
    diagnosis = diagnose(check_hosts=not arguments.quick)
    if arguments.json:
        print(json.dumps({**asdict(diagnosis), "slow": diagnosis.slow}, indent=2))
    else:
        print(render(diagnosis))
    return 1 if diagnosis.slow or diagnosis.broken_contracts else 0


def _verdict(diagnosis: Diagnosis) -> str:
    slow, total = diagnosis.slow, len(diagnosis.report.calls)
    if not slow:
        return f"ok: everything has a native kernel for {diagnosis.device_type}."
    reasons = "; ".join(sorted(set(slow.values())))
    text = f"slow: {len(slow)} of {total} functions have no native kernel here: {reasons}."
    if "was not built" in text:
        text += " To build: pip install --no-build-isolation --force-reinstall --no-deps fastgrpo"
        needed = ["C++ compiler", "ninja", *(["nvcc"] if "_C_cuda" in text else [])]
        missing = [name for name in needed if diagnosis.tools[name] is None]
        text += f" (first install: {', '.join(missing)})." if missing else "."
    return text


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
