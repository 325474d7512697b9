"""How many rows of logits exist at a time: one byte budget, whatever the number of tokens."""

from collections.abc import Sequence

import torch

from fastgrpo.functional.linear.rows import Chunk

MIB = 1 << 20
ALIGN_BYTES = 64  # rows of a workspace start at cache lines, whatever V is
ROW_MULTIPLE = 16  # chunk sizes that matrix units like


def default_workspace_bytes(device: torch.device) -> int:
    """Logits that may exist at a time: 160 MiB on a CPU; a 32nd of a GPU's memory, within 1 to 2.5 GiB.

    Every chunk streams the weight and its gradient once, so fewer chunks are faster; beyond this size it hardly shows.
    """
    if device.type != "cuda":
        return 160 * MIB
    total = torch.cuda.get_device_properties(device).total_memory
    return min(max(total // 32, 1024 * MIB), 2560 * MIB)


def row_stride(vocabulary: int, itemsize: int) -> int:
    """Elements from one workspace row to the next."""
    unit = ALIGN_BYTES // itemsize
    return -(-vocabulary // unit) * unit


def rows_per_chunk(row_bytes: int, workspace_bytes: int) -> int:
    """Rows that fit the budget, at least 1."""
    return max(workspace_bytes // max(row_bytes, 1), 1)


def chunk_rows(count: int, limit: int) -> list[Chunk]:
    """Split `count` rows into chunks of nearly equal size, none above `limit`."""
    if count == 0:
        return []
    size = -(-count // -(-count // limit))
    rounded = -(-size // ROW_MULTIPLE) * ROW_MULTIPLE
    size = rounded if rounded <= limit else size
    return [Chunk(a, min(a + size, count)) for a in range(0, count, size)]


def chunk_sequences(ends: Sequence[int], limit: int) -> list[Chunk]:
    """Split rows at ends of sequences. A chunk above `limit` is one sequence that does not fit by itself.

    `ends[i]` is the number of rows up to and including sequence i.
    """
    chunks: list[Chunk] = []
    start, first = 0, 0
    for index, end in enumerate(ends):
        if end - start > limit and index > first:
            chunks.append(Chunk(start, ends[index - 1], first, index))
            start, first = ends[index - 1], index
    if ends:
        chunks.append(Chunk(start, ends[-1], first, len(ends)))
    return [chunk for chunk in chunks if chunk.size]
