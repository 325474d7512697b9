"""What exists at once above the hidden states, the weight and the optimizer: logits and their copies, gradients."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastgrpo.functional.linear.gemm import HALF, Mode, choose_mode
from fastgrpo.functional.linear.plan import PlannedRows
from fastgrpo.functional.linear.room import Room, default_workspace_bytes, row_stride
from fastgrpo.functional.linear.rows import Selection
from fastgrpo.functional.linear.weight_sum import slab_count

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TRL_TOKENS, TRL_COLUMNS = 4096, 32768  # the tile of TRL's fused head
ONEDNN_BYTES = 16 << 20  # what its half-precision products hold, measured
HIDDEN_SUMS = 9  # of the compiled hidden gradient with several threads: parts of the vocabulary, and the total
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Case:
    """A head and a micro-batch."""

    hidden: int
    vocabulary: int
    tokens: int
    dtype: str = "bf16"
    device: str = "cpu"
    frozen: bool = False  # the head's weight gets no gradient
    active: float = 1.0  # share of the tokens that have a gradient
    precision: str = "auto"
    workspace_bytes: int | None = None

    @property
    def item(self) -> int:
        """Bytes of a number."""
        return DTYPES[self.dtype].itemsize

    @property
    def weight_gradient(self) -> int:
        """Bytes of the gradient of the weight, in its own dtype."""
        return 0 if self.frozen else self.vocabulary * self.hidden * self.item


def eager_bytes(case: Case) -> int:
    """logits -> float32 -> log_softmax -> gather: backward holds log_softmax, its gradient and the result at once."""
    logits = case.tokens * case.vocabulary
    narrow = 0 if case.dtype == "fp32" else case.item  # rounded on the way back to the product
    softmax = 12 * logits
    products = (
        narrow * logits + case.weight_gradient if narrow else 4 * logits + case.weight_gradient
    )
    return max(softmax, (4 + narrow) * logits, products)


def trl_bytes(case: Case) -> int:
    """Chunks as TRL 1.16 cuts them: a tile of logits, float32 sums of both gradients, then their casts.

    Without a GPU TRL computes the gradient of a tile in float32 torch code: 31 bytes per entry next to the tile.
    """
    rows, columns = min(case.tokens, TRL_TOKENS), min(case.vocabulary, TRL_COLUMNS)
    tile = rows * columns * case.item
    torch_code = 0 if case.device == "cuda" else 29 * rows * columns
    sums = 4 * case.tokens * case.hidden + (0 if case.frozen else 4 * case.vocabulary * case.hidden)
    casts = (
        0 if case.dtype == "fp32" else case.tokens * case.hidden * case.item + case.weight_gradient
    )
    return sums + max(tile + torch_code, casts)


def fastgrpo_bytes(case: Case) -> int:
    """The workspace, the gradients, and a float32 sum of the weight's gradient where there is more than one product."""
    device, dtype = torch.device(case.device), DTYPES[case.dtype]
    mode = choose_mode(case.precision, dtype, device)  # type: ignore[arg-type]  # argparse has checked it
    active = round(case.tokens * case.active)
    room, workspace = _workspace(case, mode, device, max(active, case.tokens - active))
    products, _ = PlannedRows(Selection.every(active)).rehearse(room)
    gradient, sum_bytes, final = case.weight_gradient, 0, 0
    native = device.type == "cpu" and mode in ("mixed", "split")
    if gradient:
        one = products == 1 and (mode in ("direct", "upcast") or native)
        one = one and dtype != torch.float16  # whose scale is undone in backward, in float32
        narrow = one or dtype == torch.float32
        sum_bytes = gradient if narrow else 4 * case.vocabulary * case.hidden
        if not narrow:
            whole = device.type == "cuda" or dtype == torch.float16
            final = gradient if whole else gradient // slab_count(sum_bytes)
    rows = min(room.units, active) if native else min(room.limit, active)
    sums = 2 if torch.get_num_threads() == 1 else HIDDEN_SUMS
    scratch = (
        sums * 4 * rows * case.hidden if native else 0
    )  # float32, of the hidden states' gradient
    if mode == "upcast":
        scratch = 32 * MIB  # float32 copy of a block of the weight
    held = 0
    if mode == "direct" and dtype in HALF and device.type == "cpu":
        held = ONEDNN_BYTES
        scratch = 16 * MIB if sum_bytes != gradient else 0  # a block of the weight's gradient
    hidden = case.tokens * case.hidden * case.item
    kept = workspace if device.type == "cpu" else 0  # a CPU workspace stays for the next call
    return hidden + held + sum_bytes + max(workspace + scratch, kept + final)


def _workspace(case: Case, mode: Mode, device: torch.device, rows: int) -> tuple[Room, int]:
    """Room for the rows of the larger class, and its bytes: on a CPU those that are touched."""
    budget = (
        default_workspace_bytes(device) if case.workspace_bytes is None else case.workspace_bytes
    )
    logits = case.item if mode == "direct" else 4
    unit = row_stride(case.vocabulary, logits) * logits
    if mode == "mixed" and device.type == "cpu":
        unit = row_stride(case.vocabulary, case.item) * case.item
        room = Room.of(budget, rows, unit, 2)
        return room, room.units * unit
    if mode in ("mixed", "split") and device.type == "cuda":
        unit += row_stride(case.vocabulary, case.item) * case.item
    room = Room.of(budget, rows, unit, 1)
    return room, (room.units if device.type == "cuda" else room.next_size(rows)) * unit


PLANS: dict[str, Callable[[Case], int]] = {
    "eager": eager_bytes,
    "TRL 1.16": trl_bytes,
    "fastgrpo": fastgrpo_bytes,
}
