"""Electric fence: runs the ops on inputs that end at, or begin behind, a page that must not be touched.

`python -m tests.tools.fence [--cases N]` prints the name of each case before it runs it, so that whoever started it can
tell which one died of SIGSEGV. It is a program because a fault ends the process.
"""

import argparse
import ctypes
import mmap
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastgrpo.functional.linear.gemm_mixed
import fastgrpo.ops  # noqa: F401 (defines the others)
from fastgrpo import Objective
from fastgrpo.batch import LossInputs, prepare
from fastgrpo.functional.numbers import number_tensor
from fastgrpo.testing import make_inputs

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_mapped: list[tuple[int, int]] = []


def fenced(value: Tensor, at_end: bool) -> Tensor:
    """A copy of `value`, strides kept, whose last (or first) byte touches a page without any access right."""
    span = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
    span = span if value.numel() else 0
    item = value.element_size()
    pages = max(1, -(-span * item // PAGE))
    size = (pages + 2) * PAGE
    base = _libc.mmap(
        None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0
    )
    assert base not in (None, ctypes.c_void_p(-1).value)
    _mapped.append((base, size))
    for guard in (base, base + (pages + 1) * PAGE):
        assert _libc.mprotect(guard, PAGE, 0) == 0
    start = base + (pages + 1) * PAGE - span * item if at_end else base + PAGE
    if span == 0:
        return value.clone()
    buffer = (ctypes.c_char * (span * item)).from_address(start)
    flat = torch.frombuffer(buffer, dtype=value.dtype, count=span)
    copy = flat.as_strided(value.shape, value.stride())
    return copy.copy_(value)


def release() -> None:
    """Give all fenced memory back."""
    while _mapped:
        _libc.munmap(*_mapped.pop())


class Case(NamedTuple):
    """A call of an op; `refused` if it must raise instead of touching the fence."""

    name: str
    op: str
    args: tuple[Any, ...]
    refused: bool = False


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Around every vector width (4 to 32 lanes), loop body (up to 256) and page; 1 and 2 are all tail.
VOCABULARIES = (
    *(1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65),
    *(127, 128, 129, 255, 256, 257, 1023, 1024, 1025, 4099),
)
BAD_IDS = (-100, -1, 2**31, -(2**31), 2**62)


def _rows(rows: int, vocabulary: int, dtype: torch.dtype, stride: int) -> Tensor:
    """Logits [rows, V] with a row stride; the memory ends with the last logit, not with the last stride."""
    memory = torch.randn((rows - 1) * stride + vocabulary).to(dtype)
    return memory.as_strided((rows, vocabulary), (stride, 1))


def token_cases(
    vocabulary: int, dtype: torch.dtype, stride: int, bad_id: int | None
) -> Iterator[Case]:
    """Forward, backward and backward in place of the row ops; one live and one masked row hold a bad id."""
    rows = 3
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logits = _rows(rows, vocabulary, dtype, stride)
    ids = torch.tensor([0, vocabulary - 1, vocabulary // 2])
    mask = torch.tensor([True, True, False])
    ids[2] = -100
    if bad_id is not None:
        ids[1] = bad_id
    temperature, params = torch.full((rows,), 0.7, dtype=wide), torch.tensor([0.5, 9.0], dtype=wide)
    name = f"V={vocabulary} {dtype} stride={stride} id={bad_id}"
    nothing, ones = torch.empty(0, dtype=wide), torch.ones(rows, dtype=wide)
    for label, t, p in (("plain", ones[:1], nothing), ("softcap", temperature, params)):
        row = (logits, ids, mask, t, p)
        yield Case(f"forward {label} {name}", "token_logprob_fwd", (*row, True))
        stats = (-ones, ones, ones)  # of no logits at all: only the addresses matter here
        out = torch.empty_like(logits)
        backward = (logits, ids, t, p, *stats, ones, ones)
        yield Case(f"backward {label} {name}", "token_logprob_bwd", (*backward, out))
    loss = loss_arguments(logits, ids, dtype, Objective.grpo(beta=0.1))
    yield Case(f"one pass {name}", "grpo_loss", (*loss, torch.empty_like(logits)))


def loss_arguments(
    logits: Tensor, ids: Tensor, dtype: torch.dtype, objective: Objective
) -> tuple[Any, ...]:
    """Arguments of `grpo_loss` up to `with_entropy` for one packed sequence of all rows and an empty one."""
    rows = logits.shape[0]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    side = -torch.rand(rows, dtype=wide)
    inputs = LossInputs(
        advantage=torch.ones(rows, dtype=wide), mask=torch.arange(rows) < rows - 1, objective=objective,
        old_logprob=side, ref_logprob=side, token_weight=-side, kl_weight=-side,
        cu_seqlens=torch.tensor([0, rows, rows], dtype=torch.int32),
    )  # fmt: skip
    batch = prepare(inputs, torch.Size([rows]), side, wide, has_entropy=True)
    one = number_tensor([1.0], wide, logits.device)
    return (
        logits, ids, one, one[:0], batch.advantage, batch.mask, batch.weight, *batch.sides(), batch.entropy_weight,
        batch.cu_seqlens, batch.params, one * 2, batch.spec, batch.surrogate, True,
    )  # fmt: skip


def flat_cases(tokens: int) -> Iterator[Case]:
    """The ops on [N]: lengths around every vector width."""
    data = make_inputs(1, tokens, 5, seed=tokens)
    flat = [x.reshape(-1) for x in (data.old_logprob, data.ref_logprob, data.old_logprob - 0.1)]
    limits = torch.tensor([20.0, 30.0, 2.0])
    yield Case(f"kl N={tokens}", "kl_estimate", (*flat, limits, 3, 2))
    yield Case(
        f"scale N={tokens}", "scale_gradient_", (flat[0].to(torch.bfloat16), torch.tensor([3.0]))
    )
    for name in ("grpo", "gspo", "dppo_kl"):
        logits = torch.randn(tokens, 2)
        objective = getattr(Objective, name)()
        args = loss_arguments(
            logits, torch.zeros(tokens, dtype=torch.int64), torch.float32, objective
        )
        policy = (flat[0], *args[4:13], -flat[0], args[13], args[14], args[15], *args[17:19])
        yield Case(f"policy {name} N={tokens}", "policy_loss", policy)


def head_cases(rows: int, vocabulary: int, hidden: int) -> Iterator[Case]:
    """The products of a head; sizes that fill no vector, tile or panel, ids outside of the vocabulary, padded rows."""
    bf16 = torch.bfloat16
    states, weight = torch.randn(rows, hidden).to(bf16), torch.randn(vocabulary, hidden).to(bf16)
    wide = _rows(rows, vocabulary, torch.float32, vocabulary + 5)
    residual, nothing = torch.rand(rows), torch.empty(0)
    ids = torch.randint(vocabulary, (rows,))
    ids[-1] = -100
    name, linear = f"n={rows} V={vocabulary} H={hidden}", "fastgrpo_linear::head_"
    yield Case(f"logits {name}", f"{linear}logits", (states, weight, wide))
    for kind in (bf16, torch.float32):
        dlogits = _rows(rows, vocabulary, kind, vocabulary + 3)
        split = kind == torch.float32
        for extra in ((residual, ids), (nothing, ids[:0])):
            tail = (*extra, split)
            out = torch.empty(rows, hidden, dtype=kind)
            yield Case(
                f"hidden {kind} {name}", f"{linear}hidden_gradient", (dlogits, weight, *tail, out)
            )
            total = torch.zeros(vocabulary, hidden)
            yield Case(
                f"weight {kind} {name}",
                f"{linear}weight_gradient",
                (dlogits, states, *tail, True, total),
            )
    index = torch.arange(0, rows, 2)
    narrow = torch.empty(len(index), vocabulary, dtype=bf16)
    yield Case(f"narrow {name}", "fastgrpo_linear::narrow_rows", (wide, index, narrow))


def refused_cases() -> Iterator[Case]:
    """Tensors too short or of the wrong type for the others, as a faulty caller of the ops would pass them."""
    valid = next(
        case for case in token_cases(33, torch.float32, 40, None) if case.op == "grpo_loss"
    )
    policy = next(case for case in flat_cases(9) if case.op == "policy_loss")
    kl = next(case for case in flat_cases(9) if case.op == "kl_estimate")
    for case in (valid, policy, kl):
        for position, value in enumerate(case.args):
            if (
                not isinstance(value, Tensor)
                or value.numel() <= 1
                or (case.op == "grpo_loss" and position == 0)
            ):
                continue
            cut = (
                value[:-2] if value.dtype == torch.int32 else value[:-1]
            )  # the last sequence is empty
            short = (*case.args[:position], cut, *case.args[position + 1 :])
            yield Case(f"{case.op} argument {position} short", case.op, short, refused=True)
            wrong = (*case.args[:position], value.to(torch.int16), *case.args[position + 1 :])
            yield Case(f"{case.op} argument {position} int16", case.op, wrong, refused=True)


def cases(checked: bool) -> Iterator[Case]:
    """All cases; those that must be refused only for a backend that checks what it is given."""
    for k, vocabulary in enumerate(VOCABULARIES):
        dtype = DTYPES[k % 4]
        yield from token_cases(vocabulary, dtype, vocabulary, None)
        yield from token_cases(vocabulary, DTYPES[(k + 1) % 4], vocabulary + 3, BAD_IDS[k % 5])
    for k, vocabulary in enumerate((1, 7, 15, 16, 17, 31, 33, 63, 65, 129, 257)):
        yield from head_cases(1 + k * 3, vocabulary, (1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 65)[k])
    for tokens in (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 65, 129):
        yield from flat_cases(tokens)
    if checked:
        yield from refused_cases()


def run(case: Case, at_end: bool) -> None:
    """Call the op on fenced copies of its tensors."""
    args = tuple(fenced(a, at_end) if isinstance(a, Tensor) else a for a in case.args)
    namespace, _, name = case.op.rpartition("::")
    op = getattr(getattr(torch.ops, namespace or "fastgrpo"), name)
    try:
        op(*args)
    except (RuntimeError, ValueError, TypeError):
        if not case.refused:
            raise
    else:
        assert not case.refused, f"{case.name} was accepted"
    release()


def main() -> int:
    """Run the cases and print how many were run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=10**9, help="stop after this many calls")
    parser.add_argument(
        "--every", type=int, default=1, help="run every n-th case only (slow backends)"
    )
    parser.add_argument(
        "--control", action="store_true", help="read one byte behind a tensor: must die"
    )
    parser.add_argument("--unchecked", action="store_true", help="leave out what must be refused")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.control:
        last = fenced(torch.zeros(3), at_end=True)
        print(ctypes.c_char.from_address(last.data_ptr() + 12).value)
        return 0
    count = 0
    for index, case in enumerate(cases(not options.unchecked)):
        if index % options.every:
            continue
        for at_end in (True, False):
            if count == options.limit:
                break
            print("case", case.name, "end" if at_end else "start", flush=True)
            run(case, at_end)
            count += 1
    print("done", count)
    return 0


if __name__ == "__main__":
    sys.exit(main())
