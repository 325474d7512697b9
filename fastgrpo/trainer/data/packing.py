"""Several examples in one row, so that SFT computes nothing for padding; attention never crosses from one to another.

Positions start again at 0 with every example. transformers reads that as the end of a sequence and masks attention
accordingly (a test holds a packed batch equal to the examples by themselves).
"""

from collections.abc import Sequence

import torch

from fastgrpo.trainer.data.batch import TokenBatch


def concatenate(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Indices of examples by row: each joins the row before it while there is room, in the order given.

    DeepSeekMath (arXiv:2402.03300, 3.1): examples are randomly concatenated up to the maximum length.
    """
    rows: list[list[int]] = []
    room = 0
    for index, length in enumerate(lengths):
        if length > max_length:
            raise ValueError(
                f"example {index} has {length} tokens, more than max_length ({max_length})"
            )
        if length > room:
            rows.append([])
            room = max_length
        rows[-1].append(index)
        room -= length
    return rows


def pack(
    rows: Sequence[Sequence[int]],  # indices of examples by row
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    pad_id: int,
) -> TokenBatch:
    """The examples of some rows as one batch."""
    lengths = [[len(prompts[i]) + len(completions[i]) for i in row] for row in rows]
    width = max(map(sum, lengths))
    input_ids = torch.full((len(rows), width), pad_id)
    position_ids = torch.zeros(len(rows), width, dtype=torch.int64)
    predict, token_ids, sizes = list[int](), list[int](), [0]
    for number, row in enumerate(rows):
        start = 0
        for i in row:
            prompt, completion = prompts[i], completions[i]
            end = start + len(prompt) + len(completion)
            input_ids[number, start:end] = torch.tensor([*prompt, *completion])
            position_ids[number, start:end] = torch.arange(end - start)
            first = number * width + start + len(prompt) - 1
            predict += range(first, first + len(completion))
            token_ids += completion
            sizes.append(len(completion))
            start = end
    return TokenBatch(
        input_ids,
        torch.tensor(predict),
        torch.tensor(token_ids),
        torch.tensor(sizes).cumsum(0).int(),
        position_ids,
    )
