"""From hidden states to loss and gradients, beside every peer that is installed: interleaved CPU time of one thread.

    python benchmarks/linear_compare.py [--quick] [--rounds N] [--out results.jsonl]

Run it once as it is and once with THP_MEM_ALLOC_ENABLE=1 (huge pages for PyTorch's allocator). Every contender gets the
mask; TRL drops masked rows, as it does on a GPU, and plain PyTorch is shown with and without rows packed by hand. Only
this package can drop rows of zero advantage. Figures are medians of process CPU time; the ratio of a peer is its median
over ours, below 1 where it wins.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from fastgrpo import Objective, linear_grpo_loss, path_report

TOO_SLOW = 25.0  # a peer whose first call takes this many times ours is not called again


@dataclass(frozen=True)
class Case:
    """A head, a micro-batch and its share of rows with a gradient."""

    tokens: int
    vocabulary: int
    hidden: int = 896
    active: float = 1.0
    idle_by: str = "mask"  # what makes the other rows inactive: mask, or zero advantage
    frozen: bool = False
    forward: bool = False  # score only

    def __str__(self) -> str:
        marks = [f"active {self.active:.0%} by {self.idle_by}"] if self.active < 1 else ["dense"]
        marks += ["frozen head"] * self.frozen + ["forward only"] * self.forward
        return f"N={self.tokens} V={self.vocabulary:,} H={self.hidden} bf16, {', '.join(marks)}"


@dataclass
class Batch:
    """Tensors of a case: 8 completions."""

    hidden: Tensor
    weight: Tensor
    ids: Tensor
    mask: Tensor
    advantage: Tensor
    old: Tensor


def make_batch(case: Case) -> Batch:
    """Peaked rows, tokens that were sampled from them, an old policy that is a little off."""
    g = torch.Generator().manual_seed(0)
    shape = (8, case.tokens // 8)
    hidden = torch.randn(*shape, case.hidden, generator=g).bfloat16()
    weight = (
        torch.randn(case.vocabulary, case.hidden, generator=g) * (4 / case.hidden**0.5)
    ).bfloat16()
    logprob = torch.cat([(h @ weight.t()).float().log_softmax(-1) for h in hidden])
    ids = torch.multinomial(logprob.exp(), 1, generator=g)
    old = (logprob.gather(1, ids) + 0.05 * torch.randn(case.tokens, 1, generator=g)).view(shape)
    mask, advantage = torch.ones(shape, dtype=torch.bool), torch.randn(8, generator=g)
    if case.idle_by == "mask":
        mask[:, round(case.active * shape[1]) :] = False
    else:
        advantage[round(case.active * 8) :] = 0.0
    return Batch(hidden, weight, ids.view(shape), mask, advantage, old)


Run = Callable[[Batch, Tensor, Tensor], Tensor]  # batch, hidden, weight -> loss


def clipped(batch: Batch, logprob: Tensor, packed: bool = True) -> Tensor:
    """PPO's clipped loss, mean over the live rows, which `packed` log-probs are alone."""
    old, advantage = batch.old, batch.advantage[:, None].expand_as(batch.old)
    if packed:
        old, advantage = old[batch.mask], advantage[batch.mask]
    ratio = torch.exp(logprob - old)
    loss = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    return loss.mean() if packed else (loss * batch.mask).sum() / batch.mask.sum()


def score(rows: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Log-probs the plain way: float32 softmax of the rounded logits."""
    return (rows @ weight.t()).float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]


compiled_score = torch.compile(score, dynamic=False)


def plain(score: Callable[[Tensor, Tensor, Tensor], Tensor], packed: bool) -> Run:
    """Log-probs of all rows, or of the live rows copied together first, and the loss."""

    def run(batch: Batch, hidden: Tensor, weight: Tensor) -> Tensor:
        if packed:
            return clipped(batch, score(hidden[batch.mask], weight, batch.ids[batch.mask]))
        return clipped(batch, score(hidden, weight, batch.ids), packed=False)

    return run


def trl(batch: Batch, hidden: Tensor, weight: Tensor) -> Tensor:
    """TRL's fused head on the live rows."""
    from trl.trainer.utils import _ChunkedLogProbFunction

    rows, ids = hidden[batch.mask], batch.ids[batch.mask]
    return clipped(
        batch, _ChunkedLogProbFunction.apply(rows, weight, None, ids, 1.0, 32768, None, 1.0, ())[0]
    )


def torch_chunked(batch: Batch, hidden: Tensor, weight: Tensor) -> Tensor:
    """PyTorch's chunked cross-entropy per token, on the live rows."""
    options = torch.nn.LinearCrossEntropyOptions()
    rows, ids = hidden[batch.mask], batch.ids[batch.mask]
    nll = torch.nn.functional.linear_cross_entropy(
        rows, weight, ids, reduction="none", options=options
    )
    return clipped(batch, -nll.float())


def liger(batch: Batch, hidden: Tensor, weight: Tensor) -> Tensor:
    """Liger's chunked loss, which takes the mask."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    module = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=False, use_ref_model=False, chunk_size=1, epsilon_low=0.2, epsilon_high=0.2, loss_type="bnpo"
    )  # fmt: skip
    loss, _ = module(
        hidden, weight, batch.ids, batch.mask.int(), batch.advantage, old_per_token_logps=batch.old
    )  # fmt: skip
    return loss


def ours(precision: str) -> Run:
    """`linear_grpo_loss`, entropy included."""

    def run(batch: Batch, hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_grpo_loss(
            hidden, weight, batch.ids, batch.advantage, batch.mask, old_logprob=batch.old, objective=Objective.bnpo(),
            logits_precision=precision,  # type: ignore[arg-type]
        ).loss  # fmt: skip

    return run


OURS = {
    "fastgrpo": ours("auto"),
    "fastgrpo input": ours("input"),
    "fastgrpo float32": ours("float32"),
}
PEERS: dict[str, Run] = {
    "eager": plain(score, False),
    "torch.compile": plain(compiled_score, False),
}
PACKED = {
    "eager, rows packed": plain(score, True),
    "torch.compile, rows packed": plain(compiled_score, True),
}
if find_spec("trl"):
    PEERS["TRL"] = trl
if hasattr(torch.nn, "LinearCrossEntropyOptions"):
    PEERS["F.linear_cross_entropy"] = torch_chunked
if find_spec("liger_kernel"):
    PEERS["Liger"] = liger


def once(case: Case, batch: Batch, run: Run) -> tuple[float, list[Tensor]]:
    """CPU seconds of one step, and its results."""
    hidden = batch.hidden.detach().requires_grad_(not case.forward)
    weight = batch.weight.detach().requires_grad_(not case.forward and not case.frozen)
    start = time.process_time()
    loss = run(batch, hidden, weight)
    if not case.forward:
        loss.backward()
    seconds = time.process_time() - start
    return seconds, [t.detach() for t in (loss, hidden.grad, weight.grad) if t is not None]


def agree(results: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether a contender computed the same thing, to bfloat16's precision."""
    norms = [
        (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)
        for a, b in zip(results, expected, strict=True)
    ]
    return len(results) == len(expected) and all(float(n) < 0.1 for n in norms)


def compare(case: Case, rounds: int) -> dict[str, object]:
    """Medians of all contenders in milliseconds, in turns."""
    batch = make_batch(case)
    contenders = OURS | PEERS | (PACKED if case.active < 1 and case.idle_by == "mask" else {})
    if case.vocabulary > 100_000:
        contenders.pop(
            "F.linear_cross_entropy", None
        )  # per token and chunked it takes minutes there
    times: dict[str, list[float]] = {}
    wrong, slow = [], []
    expected: list[Tensor] = []
    for name, run in list(contenders.items()):
        seconds, results = once(case, batch, run)  # compiles and loads too
        if not times or seconds < TOO_SLOW * times["fastgrpo"][0]:
            seconds, results = once(case, batch, run)
        expected = expected or results
        times[name] = [seconds]
        if not agree(results, expected):
            wrong.append(name)
        if seconds > TOO_SLOW * times["fastgrpo"][0]:
            slow.append(name)
    for _ in range(rounds - 1):
        for name, run in contenders.items():
            if name not in slow:
                times[name].append(once(case, batch, run)[0])
    return {
        "case": str(case), **asdict(case), "ms": {n: 1e3 * statistics.median(t) for n, t in times.items()},
        "disagree": wrong, "once": slow, "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
    }  # fmt: skip


def show(row: dict[str, object]) -> None:
    """Print a case: milliseconds, ratio to ours, and the best peer."""
    ms = row["ms"]
    assert isinstance(ms, dict)
    print(f"\n{row['case']}")
    base = ms["fastgrpo"]
    for name, value in ms.items():
        note = " (results differ)" * (name in row["disagree"]) + " (one call)" * (
            name in row["once"]
        )  # type: ignore[operator]
        print(f"  {name:<24} {value:9.1f} ms   x {value / base:5.2f}{note}")
    for label, names in (("peers", PEERS), ("peers with rows packed by hand", PACKED)):
        times = {name: ms[name] for name in names if name in ms}
        if times:
            best = min(times, key=lambda name: times[name])
            verdict = "win" if times[best] > base else "LOSS"
            print(f"  -> {verdict} against the best of {label}, {best}: {times[best] / base:.2f}")


def cases(quick: bool) -> list[Case]:
    """Shapes and shares of the issue; `quick` keeps a minute's worth."""
    if quick:
        return [
            Case(256, 32_000),
            Case(256, 32_000, active=0.4),
            Case(256, 32_000, active=0.4, idle_by="advantage"),
        ]
    found = [
        Case(n, v, active=f, idle_by=by)
        for n, v in ((512, 32_000), (256, 151_936))
        for by in ("mask", "advantage")
        for f in (1.0, 0.625, 0.375, 0.25)
        if f < 1 or by == "mask"
    ]
    return [*found, *(Case(512, 32_000, **k) for k in ({"frozen": True}, {"forward": True}))]


def main() -> None:
    """Run all cases, print and store them."""
    parser = argparse.ArgumentParser(
        description="linear losses beside their peers, CPU time of one thread"
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--out", default="", help="append JSON lines to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    huge = "on" if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" else "off"
    print(f"torch {torch.__version__}, one thread, huge pages {huge}")
    for case in cases(options.quick):
        if options.case not in str(case):
            continue
        row = compare(case, options.rounds)
        show(row)
        if options.out:
            with open(options.out, "a") as file:
                file.write(json.dumps(row) + "\n")
    print(f"\n{path_report()['linear_grpo_loss']}")


if __name__ == "__main__":
    main()
