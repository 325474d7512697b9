"""The arithmetic of the workspace: chunk sizes, when waiting gradients are multiplied, and what a budget holds."""

import pytest
import torch

from fastgrpo.functional.linear.plan import PlannedRows, pieces_of_rows
from fastgrpo.functional.linear.room import MIB, Room, default_workspace_bytes, row_stride
from fastgrpo.functional.linear.rows import Chunk, Selection


def take_all(room, pieces):
    """Work through pieces as the losses do; returns them and how often waiting rows were multiplied."""
    found = []
    for piece in pieces(room, room.clear):
        assert piece.size <= room.rows
        room.keep(piece.size)
        assert room.kept <= room.units
        found.append(piece)
    room.clear()
    return found


@pytest.mark.parametrize("per_row", [1, 2])  # plain and narrowing
@pytest.mark.parametrize(
    ("count", "units"),
    [(0, 4), (1, 4), (5, 4), (1000, 300), (1000, 2), (33, 32), (512, 552), (5000, 552)],
)
def test_pieces_of_rows(count, units, per_row):
    room = Room(units, per_row)
    chunks = take_all(room, lambda room, flush: pieces_of_rows(count, room, flush))
    assert [i for c in chunks for i in range(c.start, c.stop)] == list(range(count))
    assert all(0 < c.size <= room.limit for c in chunks)
    assert room.products >= -(-count // units)


def test_the_default_on_a_cpu():
    """512 rows of 151,936 in 160 MiB: one pair of gradient products after four passes over the weight."""
    unit = row_stride(151_936, 2) * 2
    room = Room.of(default_workspace_bytes(torch.device("cpu")), 512, unit, 2)
    assert room.units == 160 * MIB // unit == 552
    chunks = take_all(room, lambda room, flush: pieces_of_rows(512, room, flush))
    assert [c.size for c in chunks] == [276, 138, 66, 32]
    assert room.products == 1


def test_a_workspace_is_no_larger_than_its_work():
    assert Room.of(10**9, 7, 100, 1).units == 7
    assert Room.of(10**9, 7, 100, 2).units == 14  # all rows in one pass
    assert Room.of(1, 7, 100, 2).units == 2  # never less than one row
    assert Room.of(1, 0, 0, 1).limit == 1


def test_plain_chunks_are_of_equal_size():
    """The last chunk is no remnant: 1000 rows in chunks of up to 300."""
    chunks = take_all(Room(300, 1), lambda room, flush: pieces_of_rows(1000, room, flush))
    assert [c.size for c in chunks] == [256, 256, 256, 232]


@pytest.mark.parametrize(
    ("ends", "limit", "expected"),
    [
        ([], 4, []),
        ([0, 0], 4, []),  # only empty sequences
        ([2, 4, 6], 4, [(0, 4), (4, 6)]),
        ([2, 4, 6], 9, [(0, 6)]),
        ([9, 10, 11], 4, [(0, 9), (9, 11)]),  # the first does not fit by itself
        ([1, 10, 10, 11], 4, [(0, 1), (1, 10), (10, 11)]),
    ],
)
def test_pieces_of_sequences(ends, limit, expected):
    total = ends[-1] if ends else 0
    offsets = torch.tensor([0, *ends], dtype=torch.int32)
    planned = PlannedRows(Selection.every(total), offsets, ends)
    room = Room(limit, 1)
    chunks = list(planned.pieces(room, room.clear))
    assert [(c.start, c.stop) for c in chunks] == expected
    bounds = [0, *ends]
    for c in chunks:
        assert (bounds[c.first], bounds[c.last]) == (c.start, c.stop)
        local = planned.piece_offsets(c, torch.device("cpu"))
        assert (local[0], local[-1]) == (0, c.size)
    assert planned.rehearse(room)[1] == sum(c.size > limit for c in chunks)


def test_sequences_in_a_narrowing_workspace():
    """Sequences of 40 in 100 units (50 rows): the second leaves room only after the first was multiplied."""
    ends = [40, 80, 120]
    offsets = torch.tensor([0, *ends], dtype=torch.int32)
    planned = PlannedRows(Selection.every(120), offsets, ends)
    room = Room(100, 2)
    assert planned.rehearse(room) == (3, 0)
    assert room == Room(100, 2)  # a rehearsal leaves no trace
    assert planned.rehearse(Room(120, 2)) == (2, 0)  # 40 wait, 40 more rows fit next to them
    assert planned.rehearse(Room(60, 2)) == (3, 3)  # none fits: each is recomputed by itself


def test_selections():
    every = Selection.every(10)
    value = torch.arange(10)
    part = every.piece(Chunk(2, 7))
    assert part.take(value).tolist() == [2, 3, 4, 5, 6]
    odd = part.then(torch.tensor([True, False, True, False, True]))
    assert odd.take(value).tolist() == [2, 4, 6]
    assert odd.piece(Chunk(1, 3)).take(value).tolist() == [4, 6]
    assert Selection.join([part, every.piece(Chunk(7, 9))]) == Selection(10, None, 2, 9)
    assert Selection.join([part, odd]).take(value).tolist() == [2, 3, 4, 5, 6, 2, 4, 6]
    assert odd.put(torch.ones(3)).tolist() == [0, 0, 1, 0, 1, 0, 1, 0, 0, 0]
    assert part.then(torch.ones(5, dtype=torch.bool)) is part
