"""Compile what a launcher would launch, for any GPU, on a machine without one.

Triton asks its driver for the target, hands it the binary and gets back something to call. A driver that names a
target, keeps the binary and calls nothing lets the real launchers run on CPU tensors: grid, flags and the
specialisation on divisible pointers, strides and sizes are exactly those of a real launch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver


@dataclass(frozen=True)
class Compiled:
    """A kernel as it would be launched."""

    name: str
    cubin: bytes
    shared_bytes: int


@dataclass
class _Utils:
    """What Triton loads binaries with."""

    compiled: list[Compiled] = field(default_factory=list)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[int, ...]:
        self.compiled.append(Compiled(name, cubin, shared))
        return 0, 0, 0, 0, 1024  # module, function, registers, spills, largest block

    def unload_module(self, module: int) -> None:
        pass


def _launcher(source: Any, metadata: Any) -> Callable[..., None]:
    return lambda *args: None


class OfflineDriver(DriverBase):
    """A GPU of compute capability `sm` / 10 that runs nothing."""

    def __init__(self, sm: int) -> None:
        self.sm = sm
        self.utils = _Utils()
        self.launcher_cls = _launcher

    @classmethod
    def is_active(cls) -> bool:
        """Not chosen by itself."""
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Only launchers in C need it."""
        raise NotImplementedError

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return GPUTarget("cuda", self.sm, 32)

    def get_current_device(self) -> int:
        """Triton keeps its compiled kernels by device: one device per target."""
        return self.sm

    def get_current_stream(self, device: int) -> int:
        """Nothing is launched on it."""
        return 0

    def get_active_torch_device(self) -> Any:
        """There is none."""
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        """Nothing can be timed."""
        raise NotImplementedError


def compile_launches(sm: int, launch: Callable[[], object]) -> list[Compiled]:
    """Return the kernels that `launch` compiles for sm_`sm`; those it has compiled before are not repeated."""
    offline = OfflineDriver(sm)
    driver.set_active(offline)
    launch()
    return offline.utils.compiled
