"""What serves each public function, and why: nothing falls back silently."""

import logging
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from fastgrpo import host, reference
from fastgrpo.ops import backend, head_products

CALLS = {
    "token_logprob": ("token_logprob_fwd", "token_logprob_bwd"),
    "linear_token_logprob": ("token_logprob_fwd", "token_logprob_bwd"),
    "policy_loss": ("policy_loss", "scale_gradient_"),
    "grpo_loss": ("grpo_loss", "scale_gradient_"),
    "linear_grpo_loss": ("grpo_loss", "scale_gradient_"),
    "kl_estimate": ("kl_estimate",),
    "group_advantage": ("group_advantage_fwd", "group_advantage_bwd"),
    "process_advantage": ("group_advantage_fwd", "segment_scan"),
    "gae": ("segment_scan",),
    "support_logprob": (),
}
"""The public functions, and the ops that each needs; those from hidden states need matrix products as well."""
NO_CUDA = "this torch is built without CUDA"
_logger = logging.getLogger("fastgrpo")
_paths: dict[str, str] = {}
_logged: set[tuple[str, str]] = set()


@dataclass(frozen=True)
class Kernel:
    """What serves one op on one device."""

    name: str  # "C++", "CUDA C++", "Triton", "oneDNN + C++", ...; "Triton interpreter", "reference" or "none"
    why: str

    @property
    def native(self) -> bool:
        """Whether this is a kernel made for the device."""
        return self.name not in ("Triton interpreter", "reference", "none")


@dataclass(frozen=True)
class BackendReport:
    """The answer of `backend_report`."""

    backend: str  # FASTGRPO_BACKEND
    calls: dict[str, dict[str, Kernel]]  # public function -> device type ("cpu", "cuda") -> kernel
    ops: dict[str, dict[str, Kernel]]  # the same for the ops behind them
    paths: dict[str, str]  # linear function -> the path that it took last in this process, in words
    cpu_isa: str
    versions: dict[str, str]
    notes: tuple[str, ...]


def note_path(name: str, path: str) -> None:
    """Remember the path that a linear function takes, and log it the first time."""
    _paths[name] = path
    if (name, path) not in _logged:
        _logged.add((name, path))
        _logger.info("%s: %s", name, path)


def _call(name: str, device: str, ops: dict[str, dict[str, Kernel]]) -> Kernel:
    """What serves a public function: the slowest of its ops, beside its matrix products."""
    if device == "cuda" and not torch.backends.cuda.is_built():
        return Kernel("none", NO_CUDA)
    if not CALLS[name]:
        return Kernel("torch", "reads k entries per token: nothing to fuse")
    kernel = min((ops[op][device] for op in CALLS[name]), key=lambda kernel: kernel.native)
    if not name.startswith("linear_") or not kernel.native:
        return kernel
    if device == "cuda":
        return Kernel(f"cuBLAS + {kernel.name}", kernel.why)
    own = head_products.is_native(torch.device("cpu"))
    products = "bfloat16 products too, others by oneDNN" if own else "products by oneDNN"
    return Kernel(f"oneDNN + {kernel.name}", f"{kernel.why}; {products}")


def _has_kernel(op: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{backend.NAMESPACE}::{op}", key)


def _cpu_kernel(op: str) -> Kernel:
    if (op, "cpu") in backend.state.triton:
        return Kernel("Triton interpreter", "FASTGRPO_BACKEND=triton")
    if _has_kernel(op, "CPU"):
        return Kernel("C++", f"_C_cpu.so on {host.cpu_capability()}")
    return Kernel(
        "reference", backend.state.missing.get("_C_cpu", "_C_cpu.so has no kernel for this op")
    )


def _cuda_kernel(op: str) -> Kernel:
    if not torch.backends.cuda.is_built():
        return Kernel("none", NO_CUDA)
    if (op, "cuda") in backend.state.triton:
        return Kernel("Triton", backend.LAUNCHERS[op])
    if _has_kernel(op, "CUDA"):
        return Kernel("CUDA C++", "_C_cuda.so")
    absent = "triton" if op in backend.LAUNCHERS else "_C_cuda"
    return Kernel(
        "reference", backend.state.missing.get(absent, f"{absent} has no kernel for this op")
    )


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def backend_report() -> BackendReport:
    """Tell which kernel serves each function on each device, and why; and which paths the linear ones have taken.

    Reads the dispatcher, so it also tells what was registered by somebody else. Runs no kernel.
    """
    prefix = f"{backend.NAMESPACE}::"
    names = sorted(
        name.removeprefix(prefix).removesuffix(".default")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith(prefix)
    )
    ops = {name: {"cpu": _cpu_kernel(name), "cuda": _cuda_kernel(name)} for name in names}
    notes = [
        f"{name}: {why}" for name, why in backend.state.missing.items() if "does not load" in why
    ]
    if reference.SURROGATES:
        registered = ", ".join(sorted(reference.SURROGATES))
        notes.append(f"registered surrogates run as torch expressions on CPU: {registered}")
    return BackendReport(
        backend=backend.state.backend,
        calls={name: {d: _call(name, d, ops) for d in ("cpu", "cuda")} for name in CALLS},
        ops=ops,
        paths=dict(_paths),
        cpu_isa=host.cpu_capability(),
        versions={name: _version(name) for name in ("fastgrpo", "torch", "triton")},
        notes=tuple(notes),
    )
