"""Which kernel serves which op: loads the compiled libraries and registers Triton's launchers.

Every op is defined with the eager reference as its kernel for every device. A kernel under a device's own dispatch key
takes precedence whatever the order of loading, so "falling back" is nothing but the absence of a better kernel.

FASTGRPO_BACKEND, read once, when this module is imported:
    auto         C++ for CPU tensors, Triton and CUDA C++ for CUDA tensors, as far as they are there
    reference    the eager reference everywhere
    triton       as auto, but CPU tensors go to Triton's interpreter (with TRITON_INTERPRET=1) instead of C++
"""

import importlib
import os
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from fastgrpo import host

NAMESPACE = "fastgrpo"
BACKENDS = ("auto", "reference", "triton")
FOLDER = Path(__file__).resolve().parent.parent

# The launcher of each op, imported when the op first runs. An op that is absent here has its CUDA kernel in C++.
LAUNCHERS = {
    "token_logprob_fwd": "fastgrpo.kernels.token_logprob:forward",
    "token_logprob_bwd": "fastgrpo.kernels.token_logprob:backward",
    "policy_loss": "fastgrpo.kernels.policy_loss:policy_loss",
    "grpo_loss": "fastgrpo.kernels.grpo_loss:grpo_loss",
    "kl_estimate": "fastgrpo.kernels.kl_estimate:kl_estimate",
    "scale_gradient_": "fastgrpo.kernels.scale_gradient:scale_gradient_",
}


@dataclass
class State:
    """What `load` found; why a library or Triton is not used, or the empty string."""

    backend: str
    loaded: bool = False
    missing: dict[str, str] = field(default_factory=dict)  # "_C_cpu", "_C_cuda", "triton"
    triton: set[tuple[str, str]] = field(default_factory=set)  # (op, device type)


def _backend_from_environment() -> str:
    backend = os.environ.get("FASTGRPO_BACKEND") or "auto"
    if backend not in BACKENDS:
        raise ValueError(f"FASTGRPO_BACKEND must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


state = State(_backend_from_environment())


def load() -> None:
    """Load the libraries and register the launchers; `fastgrpo.ops` calls it once all ops are defined."""
    if state.loaded:
        return
    state.loaded = True
    host.cpu_capability()  # an impossible FASTGRPO_CPU_ISA is an error here, not at the first kernel
    if state.backend == "reference":
        state.missing = dict.fromkeys(("_C_cpu", "_C_cuda", "triton"), "FASTGRPO_BACKEND=reference")
        return
    if state.backend == "triton":
        state.missing["_C_cpu"] = "FASTGRPO_BACKEND=triton"
    else:
        _load_library("_C_cpu")
    if torch.backends.cuda.is_built():
        _load_library("_C_cuda")
    else:
        state.missing["_C_cuda"] = "this torch is built without CUDA"
    _register_launchers()
    unbuilt = not (FOLDER / "_C_cpu.so").exists()
    if unbuilt and state.backend == "auto" and torch.cuda.device_count() == 0:
        warnings.warn(
            "fastgrpo was installed without its compiled CPU kernels: CPU tensors use the eager reference, right but "
            "slow. Install with a C++ compiler and `--no-build-isolation`; `fastgrpo doctor` tells what is missing.",
            stacklevel=2,
        )


def _load_library(name: str) -> None:
    path = FOLDER / f"{name}.so"
    if not path.exists():
        state.missing[name] = f"{path.name} was not built"
        return
    try:
        _require_whole(path)
        torch.ops.load_library(str(path))
    except OSError as error:
        state.missing[name] = f"{path.name} does not load: {error}"
        warnings.warn(f"fastgrpo: {state.missing[name]}; its ops use slower kernels", stacklevel=3)


def _require_whole(path: Path) -> None:
    """Raises OSError for a library that a full disk or a power cut has left short: loading it would be a bus error."""
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":
        return  # the loader says what it is
    table, entry, count = struct.unpack_from(
        "<Q10xHH", header, 40
    )  # ELF ends with its section headers
    if path.stat().st_size < table + entry * count:
        raise OSError("it is cut off; build it again")


def _register_launchers() -> None:
    if find_spec("triton") is None:
        if state.backend == "triton":
            raise ImportError("FASTGRPO_BACKEND=triton, but triton is not installed")
        state.missing["triton"] = "triton is not installed"
        return
    devices = ("cuda", "cpu") if state.backend == "triton" else ("cuda",)
    for op, target in LAUNCHERS.items():
        for device in devices:
            torch.library.register_kernel(f"{NAMESPACE}::{op}", device, _launcher(target, device))
            state.triton.add((op, device))


def _launcher(target: str, device: str) -> Callable[..., object]:
    """A kernel that imports its launcher when it is first called, so that importing the ops imports no Triton."""

    @cache
    def resolve() -> Callable[..., object]:
        if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError(
                "FASTGRPO_BACKEND=triton runs CPU tensors in Triton's interpreter: "
                "set TRITON_INTERPRET=1 before Python starts"
            )
        module, _, name = target.partition(":")
        function: Callable[..., object] = getattr(importlib.import_module(module), name)
        return function

    def launch(*args: object) -> object:
        return resolve()(*args)

    return launch


def is_triton(op: str, device: torch.device) -> bool:
    """Whether a Triton launcher serves this op on this device."""
    return (op, device.type) in state.triton
