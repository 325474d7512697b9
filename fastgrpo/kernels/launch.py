"""The checked-in launch table and what every launcher needs. Nothing is tuned at run time."""

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

# Contraction of a * b + c is asked for, never inherited from a default that Triton versions change.
COMPILE = {"enable_fp_fusion": True}


class RowConfig(NamedTuple):
    """How one program walks a row: 32 * warps threads, each with `loads` 16-byte loads in flight."""

    warps: int
    loads: int
    registers: int | None = 64  # cap; 64 let 1024 threads share a multiprocessor

    def options(self) -> dict[str, bool | int]:
        """Compiler options of the launch."""
        cap = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, **cap, **COMPILE}


# Bytes of a row up to which the entry holds -> configuration.
_ROW_PASS = ((4 << 10, RowConfig(2, 2)), (64 << 10, RowConfig(4, 4)), (None, RowConfig(8, 4)))
# Rows that are read twice should be found in the L2 cache the second time: many threads per row keep few in flight.
_ONE_PASS = ((4 << 10, RowConfig(2, 2)), (64 << 10, RowConfig(8, 2)), (None, RowConfig(16, 2)))


def row_config(logits: Tensor, softcap: bool, one_pass: bool = False) -> RowConfig:
    """Configuration for logits [N, V] of any dtype."""
    row_bytes = logits.shape[1] * logits.element_size()
    table = _ONE_PASS if one_pass else _ROW_PASS
    config = next(config for limit, config in table if limit is None or row_bytes <= limit)
    if logits.dtype == torch.float64:
        return config._replace(warps=min(config.warps, 8), loads=2, registers=None)
    # A softcap and the masks of unaligned rows take registers: smaller tiles and a higher cap keep them from spilling.
    if softcap or not row_shape(logits, config).ALIGNED:
        return RowConfig(min(config.warps, 8), 2, 96)
    return config


class RowShape(NamedTuple):
    """Compile-time facts about rows of logits; see `kernels.row`."""

    ROWS: int
    VEC: int
    LOADS: int
    ALIGNED: bool


def row_shape(logits: Tensor, config: RowConfig) -> RowShape:
    """Tile shape, and whether every row starts and ends at a 16-byte boundary."""
    item = logits.element_size()
    vec = 16 // item
    aligned = (
        logits.data_ptr() % 16 == 0 and logits.stride(0) % vec == 0 and logits.shape[1] % vec == 0
    )
    return RowShape(32 * config.warps, vec, config.loads, aligned)


def same_shift(logits: Tensor, out: Tensor) -> bool:
    """Whether rows of the two tensors lie equally to 16-byte boundaries, so that stores can be as wide as loads."""
    vec = 16 // logits.element_size()
    return (logits.data_ptr() - out.data_ptr()) % 16 == 0 and (
        logits.stride(0) - out.stride(0)
    ) % vec == 0


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launch on the tensor's device; CPU tensors reach a launcher only in the interpreter."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
