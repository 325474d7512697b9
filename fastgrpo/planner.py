"""`fastgrpo plan`: peak memory of a language-model head's loss and gradients, before anything is run.

Counts what exists at once above the hidden states, the weight and the optimizer: logits and their copies, gradients of
hidden states and weight. `--measure` runs each contender in a process of its own and prints how far the formula is off.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec

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


def run(name: str, case: Case) -> None:
    """One forward and backward of a contender."""
    g = torch.Generator().manual_seed(0)
    dtype, device = DTYPES[case.dtype], torch.device(case.device)
    shape = (1, case.tokens)
    hidden = torch.randn(*shape, case.hidden, generator=g).to(device, dtype).requires_grad_()
    weight = torch.randn(case.vocabulary, case.hidden, generator=g).mul_(0.02).to(device, dtype)
    weight.requires_grad_(not case.frozen)
    ids = torch.randint(case.vocabulary, shape, generator=g).to(device)
    token_weight = (torch.rand(shape, generator=g) < case.active).float().to(device)
    peak = Peak(device)
    if name == "fastgrpo":
        from fastgrpo.linear_losses import linear_grpo_loss

        mask = torch.ones(shape, dtype=torch.bool, device=device)
        loss = linear_grpo_loss(
            hidden, weight, ids, torch.ones(1, device=device), mask, token_weight=token_weight,
            logits_precision=case.precision, workspace_bytes=case.workspace_bytes,  # type: ignore[arg-type]
        ).loss  # fmt: skip
    elif name == "eager":
        logprob = (hidden @ weight.t()).float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        loss = -(logprob * token_weight).mean()
    else:
        from trl.trainer.utils import _ChunkedLogProbFunction

        logprob = _ChunkedLogProbFunction.apply(
            hidden[0], weight, None, ids[0], 1.0, TRL_COLUMNS, None, 1.0, ()
        )[0]
        loss = -(logprob * token_weight[0]).mean()
    loss.backward()
    print(json.dumps(peak.read()))


class Peak:
    """Peak memory above what is in use when this is made."""

    def __init__(self, device: torch.device) -> None:
        """Start from here."""
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            with open("/proc/self/clear_refs", "w") as refs:
                refs.write("5")
            self.before = self._status("VmRSS")

    def read(self) -> int:
        """Bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return self._status("VmHWM") - self.before

    @staticmethod
    def _status(key: str) -> int:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def measure(name: str, case: Case) -> int:
    """Measured peak of a contender, in a fresh process that has run a small case before."""
    small = Case(hidden=64, vocabulary=512, tokens=16, dtype=case.dtype, device=case.device)
    code = (
        "import sys, json; from fastgrpo.planner import Case, run; name, *cases = json.load(sys.stdin); "
        "[run(name, Case(**case)) for case in cases]"
    )
    given = json.dumps([name, asdict(small), asdict(case)])
    done = subprocess.run(
        [sys.executable, "-c", code], input=given, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"measuring {name} failed: {done.stderr.strip().splitlines()[-1]}")
    return int(done.stdout.split()[-1])


def plan(case: Case, measured: bool) -> list[dict[str, object]]:
    """A row per contender: name, planned bytes, and measured ones if asked for."""
    rows: list[dict[str, object]] = []
    for name, formula in PLANS.items():
        row: dict[str, object] = {"name": name, "planned_bytes": formula(case)}
        if measured and (name != "TRL 1.16" or find_spec("trl")):
            row["measured_bytes"] = measure(name, case)
        rows.append(row)
    return rows


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fastgrpo plan", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--hidden", type=int, required=True, help="hidden size H")
    parser.add_argument("--vocab", type=int, required=True, help="vocabulary V")
    parser.add_argument(
        "--tokens", type=int, required=True, help="tokens N of a micro-batch that are scored"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--frozen", action="store_true", help="the head's weight gets no gradient (LoRA)"
    )
    parser.add_argument(
        "--active", type=float, default=1.0, help="share of tokens with a gradient (default 1)"
    )
    parser.add_argument("--precision", choices=("auto", "float32", "input"), default="auto")
    parser.add_argument(
        "--workspace-bytes", type=int, default=None, help="memory for logits (default by device)"
    )
    parser.add_argument("--measure", action="store_true", help="run each contender and compare")
    parser.add_argument("--json", action="store_true", help="print JSON")
    found = parser.parse_args(argv)
    for name in ("hidden", "vocab", "tokens"):
        if getattr(found, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(found, name)}")
    if not 0 <= found.active <= 1:
        parser.error(f"--active must be within 0 and 1, got {found.active}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan; returns the exit code."""
    options = _arguments(argv)
    case = Case(
        hidden=options.hidden,
        vocabulary=options.vocab,
        tokens=options.tokens,
        dtype=options.dtype,
        device=options.device,
        frozen=options.frozen,
        active=options.active,
        precision=options.precision,
        workspace_bytes=options.workspace_bytes,
    )
    rows = plan(case, options.measure)
    if options.json:
        print(json.dumps({"case": asdict(case), "rows": rows}))
        return 0
    parameters = case.vocabulary * case.hidden * case.item
    kind = "frozen" if case.frozen else "trained"
    size = f"{case.vocabulary:,} x {case.hidden:,} {case.dtype}, {parameters / MIB:,.0f} MiB"
    print(f"{kind} head ({size}) on {case.device}")
    print(f"peak of loss and gradients for {case.tokens:,} tokens, in MiB")
    for row in rows:
        line = f"  {row['name']:<10} {_mib(row['planned_bytes']):>10}"
        if "measured_bytes" in row:
            line += f"   measured {_mib(row['measured_bytes']):>10}"
        print(line)
    return 0


def _mib(value: object) -> str:
    assert isinstance(value, int)
    return f"{value / MIB:,.0f}"
