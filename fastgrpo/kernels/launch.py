"""The checked-in launch table and what every launcher needs. Nothing is tuned at run time."""

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

# Contraction of a * b + c is asked for, never inherited from a default that Triton versions change.
COMPILE = {"enable_fp_fusion": True}


class RowConfig(NamedTuple):
    """How one program walks a row: tiles of 32 * warps threads, `loads` 16-byte loads in flight per thread."""

    warps: int
    loads: int

    def options(self, logits: Tensor, softcap: bool) -> dict[str, bool | int]:
        """Compiler options. 64 registers let 1024 threads share a multiprocessor; softcap and float64 need more."""
        cap = {} if logits.dtype == torch.float64 else {"maxnreg": 96 if softcap else 64}
        return {"num_warps": self.warps, **cap, **COMPILE}


# Bytes of a row up to which the entry holds -> configuration.
_ROW_PASS = ((4 << 10, RowConfig(2, 2)), (64 << 10, RowConfig(4, 4)), (None, RowConfig(8, 4)))
# One row per program is read twice; the second read should find it in the L2 cache, so few rows are in flight.
_ONE_PASS = ((4 << 10, RowConfig(2, 2)), (64 << 10, RowConfig(8, 2)), (None, RowConfig(16, 2)))


def row_config(logits: Tensor, softcap: bool, one_pass: bool = False) -> RowConfig:
    """Configuration for logits [N, V] of any dtype."""
    row_bytes = logits.shape[1] * logits.element_size()
    table = _ONE_PASS if one_pass else _ROW_PASS
    config = next(config for limit, config in table if limit is None or row_bytes <= limit)
    # Softcap and the masks of unaligned rows take registers: half the tile keeps them from spilling.
    small = softcap or not row_shape(logits, config).ALIGNED
    return config._replace(loads=min(config.loads, 2)) if small else config


class RowShape(NamedTuple):
    """Compile-time facts about rows of logits; see `kernels.row`."""

    ROWS: int
    VEC: int
    ALIGNED: bool


def row_shape(logits: Tensor, config: RowConfig) -> RowShape:
    """Tile shape, and whether every row starts and ends at a 16-byte boundary."""
    item = logits.element_size()
    vec = 16 // item
    aligned = (
        logits.data_ptr() % 16 == 0 and logits.stride(0) % vec == 0 and logits.shape[1] % vec == 0
    )
    return RowShape(32 * config.warps * config.loads, vec, aligned)


def same_shift(logits: Tensor, out: Tensor) -> bool:
    """Whether rows of the two tensors lie equally to 16-byte boundaries, so that stores can be as wide as loads."""
    vec = 16 // logits.element_size()
    return (logits.data_ptr() - out.data_ptr()) % 16 == 0 and (
        logits.stride(0) - out.stride(0)
    ) % vec == 0


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launch on the tensor's device; CPU tensors reach a launcher only in the interpreter."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
