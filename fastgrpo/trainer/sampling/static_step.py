"""Decoding steps whose tensors never change shape or place: on a GPU one CUDA graph, replayed for every token.

A step of a small model is a few dozen short kernels, and launching them takes longer than running them. With a fixed
number of rows and columns all launches are recorded once. The price is attention over columns that are still empty (the
bias hides them), which a GPU does not notice at these lengths. Rows leave only in halves, so that few graphs are made.

The arithmetic is tested on CPUs without the graph. It has not been timed on a GPU yet.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from fastgrpo.trainer.sampling.decoder import Decoder, KVCache

WARM_UP = 2  # runs before recording: libraries allocate and choose kernels in their first ones


def bucket(rows: int) -> int:
    """The number of rows that a batch of so many is kept at: the next power of two."""
    return 1 << (rows - 1).bit_length()


class StaticStep:
    """`decoder.step` for one cache, with every index on the device."""

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        self.decoder = decoder
        self.cache = cache
        self.column = torch.tensor([cache.length], device=cache.position.device)
        self.token_ids = torch.zeros_like(cache.position)
        cache.bias[..., cache.length :] = -torch.inf
        for columns in (
            *cache.key,
            *cache.value,
        ):  # what was never written may be NaN, and 0 x NaN is
            columns[:, :, cache.length :] = 0.0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits = torch.empty(0)
        if cache.position.is_cuda:
            self._record()

    def __call__(
        self, token_ids: Tensor
    ) -> Tensor:  # [B] -> [B, V], which the next call overwrites
        """Appends one token to every row and returns the logits of the next."""
        self.token_ids.copy_(token_ids)
        if self.graph is None:
            self.logits = self.run()
        else:
            self.graph.replay()
        self.cache.length += 1
        return self.logits

    @torch.no_grad()
    def run(self) -> Tensor:
        """One step from `token_ids`."""
        cache, column = self.cache, self.column
        cache.bias.index_fill_(3, column, 0.0)

        def store(columns: Tensor, new: Tensor) -> Tensor:
            return columns.index_copy_(2, column, new)

        logits = self.decoder.one_token(self.token_ids, cache, cache.position, cache.bias, store)
        cache.position += 1
        column += 1
        return logits

    @contextlib.contextmanager
    def put_back(self) -> Iterator[None]:
        """Whatever runs inside counts for nothing: what it writes into the cache lies in columns that later steps
        overwrite before they see them.
        """
        counters = (self.cache.bias, self.cache.position, self.column)
        saved = [tensor.clone() for tensor in counters]
        yield
        for tensor, value in zip(counters, saved, strict=True):
            tensor.copy_(value)

    def _record(self) -> None:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                with self.put_back():
                    self.run()
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with (
            self.put_back(),
            # Other threads (NCCL's) may use the device meanwhile.
            torch.cuda.graph(self.graph, capture_error_mode="thread_local"),
        ):
            self.logits = self.run()
