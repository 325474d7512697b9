"""Rows of one class, active or only scored, and the pieces they are worked through in."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrpo.functional.linear.chunking import chunk_rows, chunk_sequences
from fastgrpo.functional.linear.rows import Chunk, Selection
from fastgrpo.functional.numbers import number_tensor


@dataclass(frozen=True)
class PlannedRows:
    """Selected rows; the last two fields where an objective looks at whole sequences."""

    selection: Selection
    offsets: Tensor | None = None  # [B + 1] int32: selected rows before each sequence
    ends: list[int] | None = (
        None  # offsets[1:] on the host; None: unknown, so all rows are one piece
    )

    def pieces(self, limit: int) -> list[Chunk]:
        """Chunks of rows; one of more than `limit` rows has to be scored before it is differentiated."""
        if self.offsets is None:
            return chunk_rows(self.selection.count, limit)
        if self.ends is not None:
            return chunk_sequences(self.ends, limit)
        everything = Chunk(0, self.selection.count, 0, self.offsets.numel() - 1)
        return [everything] if everything.size else []

    def piece_offsets(self, piece: Chunk, device: torch.device) -> Tensor:
        """cu_seqlens of a piece; a token-level loss sees one sequence."""
        if self.offsets is None:
            return number_tensor([0, piece.size], torch.int32, device)
        local = self.offsets[piece.first : piece.last + 1]
        return local - local[0]

    def products(self, limit: int) -> int:
        """How many chunks contribute to the gradient of the weight, at most."""
        return sum(-(-piece.size // limit) for piece in self.pieces(limit))
