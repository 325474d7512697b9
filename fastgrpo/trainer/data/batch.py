"""From lists of token ids to what a forward pass needs, with no work on padding.

A row is `prompt + completion`, padded on the right. Under a causal mask no real token ever sees padding, so neither an
attention mask nor position ids are needed. The head then runs on the positions that predict a completion token and
on nothing else: `predict` picks them out of the hidden states as one packed `[N]` list of tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """B sequences; N = all their completion tokens, packed."""

    input_ids: Tensor  # [B, T] int64
    predict: Tensor  # [N] int64: flat positions in [B * T] whose hidden state predicts a completion token
    token_ids: Tensor  # [N] int64: the tokens they predict
    cu_seqlens: Tensor  # [B + 1] int32: completion b is tokens cu_seqlens[b] : cu_seqlens[b + 1]
    position_ids: Tensor | None = (
        None  # [rows, T]; given where a row holds several sequences (packing.py)
    )

    def to(self, device: torch.device) -> "TokenBatch":
        """The same batch on a device."""
        return TokenBatch(
            self.input_ids.to(device),
            self.predict.to(device),
            self.token_ids.to(device),
            self.cu_seqlens.to(device),
            None if self.position_ids is None else self.position_ids.to(device),
        )


def make_batch(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad_id: int
) -> TokenBatch:
    """Pads and indexes B prompts and their completions (each of at least one token)."""
    rows = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
    width = max(map(len, rows))
    input_ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows])
    predict = [
        row * width + column
        for row, (p, c) in enumerate(zip(prompts, completions, strict=True))
        for column in range(len(p) - 1, len(p) + len(c) - 1)
    ]
    lengths = torch.tensor([0, *(len(c) for c in completions)])
    return TokenBatch(
        input_ids=input_ids,
        predict=torch.tensor(predict),
        token_ids=torch.tensor([token for c in completions for token in c]),
        cu_seqlens=lengths.cumsum(0).to(torch.int32),
    )


def micro_batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices of rows in groups of at most `size`, neighbours in length together so that little is padded."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for start in range(0, len(order), size):
        yield order[start : start + size]
