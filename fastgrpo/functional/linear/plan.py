"""Which rows of a batch get gradient products, which only a score, and the pieces they are worked through in."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastgrpo.functional.linear.room import Room
from fastgrpo.functional.linear.rows import Chunk, Selection
from fastgrpo.functional.numbers import number_tensor


@dataclass(frozen=True)
class PlannedRows:
    """Rows of one class; the last two fields where an objective looks at whole sequences."""

    selection: Selection
    offsets: Tensor | None = None  # [B + 1] int32: selected rows before each sequence
    ends: list[int] | None = (
        None  # offsets[1:] on the host; None: unknown, so all rows are one piece
    )

    def pieces(self, room: Room, flush: Callable[[], None]) -> Iterator[Chunk]:
        """Chunks of rows, each as large as the room allows when it is asked for; `flush` makes room.

        A chunk that does not fit is one sequence (or all rows) to be scored before it is differentiated.
        """
        if self.offsets is None:
            yield from pieces_of_rows(self.selection.count, room, flush)
        elif self.ends is not None:
            yield from _pieces_of_sequences(self.ends, room, flush)
        elif self.selection.count:
            flush()
            yield Chunk(0, self.selection.count, 0, self.offsets.numel() - 1)

    def piece_offsets(self, piece: Chunk, device: torch.device) -> Tensor:
        """cu_seqlens of a piece; a token-level loss sees one sequence."""
        if self.offsets is None:
            return number_tensor([0, piece.size], torch.int32, device)
        local = self.offsets[piece.first : piece.last + 1]
        return local - local[0]

    def rehearse(self, room: Room) -> tuple[int, int]:
        """Products that gradients of all rows take, and pieces that have to be recomputed; `room` is not changed."""
        room = replace(room)
        long = 0
        for piece in self.pieces(room, room.clear):
            if piece.size <= room.rows:
                room.keep(piece.size)
                continue
            long += 1
            room.clear()
            for part in pieces_of_rows(piece.size, room, room.clear):
                room.keep(part.size)
        room.clear()
        return room.products, long


def pieces_of_rows(count: int, room: Room, flush: Callable[[], None]) -> Iterator[Chunk]:
    """Cut `count` rows anywhere."""
    at = 0
    while at < count:
        if room.is_full(count - at):
            flush()
        size = room.next_size(count - at)
        yield Chunk(at, at + size)
        at += size


def _pieces_of_sequences(ends: list[int], room: Room, flush: Callable[[], None]) -> Iterator[Chunk]:
    """Cut rows at ends of sequences; `ends[i]` is the number of rows up to and including sequence i."""
    at, first = 0, 0
    while first < len(ends):
        if ends[first] == at:
            first += 1
            continue
        if room.is_full(ends[-1] - at, min(ends[first] - at, room.limit)):
            flush()
        last = first + 1
        while last < len(ends) and ends[last] - at <= room.rows:
            last += 1
        yield Chunk(at, ends[last - 1], first, last)
        at, first = ends[last - 1], last


@dataclass(frozen=True)
class RowClasses:
    """What becomes of the rows: gradients and metrics, or metrics alone; rows in neither are not touched."""

    active: PlannedRows
    scored: PlannedRows
    overflow: Tensor | None = None  # [] bool: a static plan has too few rows, so everything is NaN

    def describe(self, room: Room) -> str:
        """One line for the log and the report."""
        _, long = self.active.rehearse(room)
        text = f"up to {room.limit} rows at a time"
        return (
            text
            + f"; {long} piece(s) of whole sequences above that, scored and then recomputed"
            * (long > 0)
        )


@dataclass(frozen=True, kw_only=True)
class RowPlan:
    """Flat indices of the tokens of one batch by what is done with them; tokens in neither list are left out.

    The fields after `score_index` are there where the objective looks at whole sequences, or with `capacity`.
    """

    num_tokens: int
    active_index: Tensor  # [A] int64, ascending: score, loss and gradient
    score_index: Tensor  # [S] int64, ascending: score and metrics; their gradient is exactly 0
    active_offsets: Tensor | None = None  # [B + 1] int32: active tokens before each sequence
    score_offsets: Tensor | None = None
    active_ends: list[int] | None = None  # active_offsets[1:] on the host
    score_ends: list[int] | None = None
    overflow: Tensor | None = None  # [] bool: more tokens were live than `capacity` holds

    @property
    def num_active(self) -> int:
        """Tokens that take part in the gradient products."""
        return self.active_index.numel()

    @property
    def num_scored(self) -> int:
        """Tokens that are only scored."""
        return self.score_index.numel()

    def to(self, device: torch.device | str) -> "RowPlan":
        """The plan with its tensors on `device`, copied without waiting for it."""
        device = torch.device(device)

        def move(value: Tensor | None) -> Tensor | None:
            if value is None or value.device == device:
                return value
            pinned = value.pin_memory() if device.type == "cuda" else value
            return pinned.to(device, non_blocking=True)

        names = ("active_index", "score_index", "active_offsets", "score_offsets", "overflow")
        return RowPlan(**(self.__dict__ | {name: move(getattr(self, name)) for name in names}))

    def row_classes(self) -> RowClasses:
        """The plan as the loss takes it."""

        def rows(index: Tensor, offsets: Tensor | None, ends: list[int] | None) -> PlannedRows:
            total = self.num_tokens
            everything = index.numel() == total
            selection = Selection.every(total) if everything else Selection.of(total, index)
            return PlannedRows(selection, offsets, ends)

        return RowClasses(
            rows(self.active_index, self.active_offsets, self.active_ends),
            rows(self.score_index, self.score_offsets, self.score_ends),
            self.overflow,
        )


def classify(
    live: Tensor,  # [N] bool
    active: Tensor,  # [N] bool: live tokens whose gradient may be other than 0
    cu_seqlens: Tensor,  # [B + 1] int32
    *,
    by_sequence: bool,
    score_inactive: bool,
    capacity: int | None,
) -> RowPlan:
    """The plan of a flat batch. One read by the host of two numbers, or of 2 B if sequences have to stay whole."""
    total = live.numel()
    if by_sequence:
        active = live & _spread(_count_before(active, cu_seqlens).diff() > 0, cu_seqlens, total)
    scored = live & ~active
    if capacity is not None:
        return _static(live if score_inactive else active, cu_seqlens, by_sequence, capacity)
    if not score_inactive:
        scored = torch.zeros_like(scored)
    order = torch.where(active, 0, torch.where(scored, 1, 2)).sort(stable=True).indices
    offsets = [
        _count_before(kind, cu_seqlens) if by_sequence else None for kind in (active, scored)
    ]
    counts = [value[1:] for value in offsets if value is not None] or [active.sum(), scored.sum()]
    host: list[int] = torch.cat([value.reshape(-1) for value in counts]).tolist()
    half = len(host) // 2
    ends = (host[:half], host[half:])
    num_active, num_scored = (values[-1] if values else 0 for values in ends)
    return RowPlan(
        num_tokens=total,
        active_index=order[:num_active],
        score_index=order[num_active : num_active + num_scored],
        active_offsets=offsets[0],
        score_offsets=offsets[1],
        active_ends=ends[0] if by_sequence else None,
        score_ends=ends[1] if by_sequence else None,
    )


def plan_from_indices(
    active_index: Tensor, score_index: Tensor, cu_seqlens: Tensor, total: int, by_sequence: bool
) -> RowPlan:
    """A plan from its index lists alone; offsets of sequences are made anew (and read by the host)."""
    plan = RowPlan(num_tokens=total, active_index=active_index, score_index=score_index)
    if not by_sequence:
        return plan
    nothing = torch.zeros(total, dtype=torch.bool, device=cu_seqlens.device)
    offsets = [
        _count_before(nothing.index_fill(0, index, True), cu_seqlens)
        for index in (active_index, score_index)
    ]
    return replace(
        plan,
        active_offsets=offsets[0],
        score_offsets=offsets[1],
        active_ends=offsets[0][1:].tolist(),
        score_ends=offsets[1][1:].tolist(),
    )


def _count_before(chosen: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Chosen tokens before each sequence, [B + 1] int32."""
    running = torch.nn.functional.pad(chosen.cumsum(0), (1, 0))
    return running[cu_seqlens.long()].to(torch.int32)


def _spread(per_sequence: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    """Give each token the value of its sequence."""
    position = torch.arange(total, dtype=torch.int32, device=cu_seqlens.device)
    index = torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)
    return per_sequence[index]


def _static(wanted: Tensor, cu_seqlens: Tensor, by_sequence: bool, capacity: int) -> RowPlan:
    """`capacity` rows whatever the data: the wanted ones first, then dead ones that the mask keeps out."""
    if capacity >= wanted.numel():
        index, offsets = torch.arange(wanted.numel(), device=wanted.device), cu_seqlens
    else:
        index = wanted.sort(descending=True, stable=True).indices[:capacity]
        offsets = _count_before(wanted, cu_seqlens).clamp(max=capacity)
        offsets[-1] = capacity  # dead rows follow the last sequence
    return RowPlan(
        num_tokens=wanted.numel(),
        active_index=index,
        score_index=index[:0],
        active_offsets=offsets if by_sequence else None,
        score_offsets=offsets * 0 if by_sequence else None,
        overflow=wanted.sum() > capacity,
    )
