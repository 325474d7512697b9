"""The performance goals of the project, row by row: what was asked, what was measured, passed or failed.

CPU goals are for one thread with AVX-512 and bfloat16 instructions, every provider in its best allocator setting (the
better of a run with and a run without THP_MEM_ALLOC_ENABLE=1); GPU goals for bfloat16. They are for the vocabularies of
real models. A goal whose rows were not measured gives no verdict, so that a short run does not look like a success.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fastgrpo.bench.rows import Row

SMALLEST_VOCABULARY = 32_000
COMPILE, TRL, LIGER = "torch.compile", "TRL", "Liger"


@dataclass(frozen=True)
class Verdict:
    """One goal on one case; `at_least`: whether the target is a lower bound."""

    case: str
    goal: str
    target: float
    value: float
    at_least: bool = True

    @property
    def passed(self) -> bool:
        """Whether the measurement reaches the target."""
        return self.value >= self.target if self.at_least else self.value <= self.target

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        outcome = "pass" if self.passed else "FAIL"
        return f"{outcome}: {self.goal} {sign} {self.target:g}, measured {self.value:.2f}"


Rows = dict[str, Row]  # of one case, by provider
Goal = Callable[[Rows, Row], Iterable[tuple[str, float, float, bool]]]


def _cpu(group: Rows, row: Row) -> Iterable[tuple[str, float, float, bool]]:
    against = {name: r.speedup_of_ours for name, r in group.items() if r.speedup_of_ours}
    logits_mib = row.tokens * row.vocabulary * (2 if row.dtype == "bfloat16" else 4) / 2**20
    if row.what == "logprob" and row.mode == "forward" and COMPILE in against:
        target = 2.5 if row.dtype == "bfloat16" else 2.0
        yield "times faster than torch.compile", target, against[COMPILE], True
    if row.what == "loss" and row.mode == "train":
        in_place = group.get("fastgrpo in place")
        if COMPILE in against:
            yield "times faster than torch.compile", 4.5, against[COMPILE], True
        if in_place and in_place.ms:
            yield "extra memory in units of the logits", 1.0, in_place.extra_mib / logits_mib, False
    if row.what == "linear" and row.mode == "train" and row.active == 1 and row.dtype == "bfloat16":
        peers = [v for name, v in against.items() if not group[name].ours]
        if peers and not row.frozen_head:
            yield "times faster than the best peer", 1.05, min(peers), True
        if LIGER in against and not row.frozen_head:
            yield "times faster than Liger", 2.7, against[LIGER], True
    if row.what == "linear" and row.mode == "train" and row.active == 0.4:
        # Rows packed by hand are work that the user has done; idle rows by advantage nobody else can leave out.
        ours = group.get("fastgrpo, active rows only") or group.get("fastgrpo")
        peers = [
            r.ms for name, r in group.items() if not r.ours and not r.floor and "packed" not in name
        ]
        if ours and peers and row.dtype == "bfloat16":
            yield (
                "times faster than the best peer given the same mask",
                1.9,
                min(peers) / ours.ms,
                True,
            )


def _gpu(group: Rows, row: Row) -> Iterable[tuple[str, float, float, bool]]:
    if row.dtype != "bfloat16":
        return
    ours = [r for r in group.values() if r.ours and r.to_floor]
    best = min((r.to_floor for r in ours if r.to_floor), default=None)
    trl = group[TRL].speedup_of_ours if TRL in group else None
    if row.what == "logprob" and row.mode in ("forward", "backward") and best:
        yield "times the bandwidth floor", 1.10, best, False
    if row.what == "loss" and row.mode == "train" and best:
        yield "times the floor of one read and one write", 1.2, best, False
    if row.what == "linear" and row.mode == "train" and not row.frozen_head:
        if best and row.active == 1 and row.hidden >= 2048:
            yield "times the floor of three GEMMs", 1.2, best, False
        if trl and row.active in (1, 0.4):
            yield "times faster than TRL", 1.3 if row.active == 1 else 2.0, trl, True


def _skipping(rows: list[Row]) -> Iterable[Verdict]:
    """Our own time with a share of the rows active against our dense time: 1 / share, or 3 GEMMs of which 2 shrink."""
    dense = {(r.dense_key, r.provider): r.ms for r in rows if r.active == 1}
    for row in rows:
        before = dense.get((row.dense_key, row.provider))
        if row.provider != "fastgrpo" or row.active == 1 or not before:
            continue
        share = row.active
        ideal = 1 / share if row.skip_by == "mask" else 3 / (1 + 2 * share)
        goal = f"times faster than with all rows active (ideal {ideal:.2f})"
        yield Verdict(row.case, goal, round(0.85 * ideal, 2), before / row.ms)


def verdicts(rows: Iterable[Row], is_cuda: bool) -> list[Verdict]:
    """Every goal that these rows can decide."""
    right = [r for r in rows if r.ms and not r.wrong and r.vocabulary >= SMALLEST_VOCABULARY]
    groups: dict[str, Rows] = defaultdict(dict)
    for row in right:
        groups[row.case][row.provider] = row
    found: list[Verdict] = []
    goal: Goal = _gpu if is_cuda else _cpu
    for case, group in groups.items():
        found += [Verdict(case, *parts) for parts in goal(group, next(iter(group.values())))]
    return found + list(_skipping(right))
