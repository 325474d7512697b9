"""Copies of the state that a save in the background can write while training changes the state itself."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fastgrpo.trainer.checkpoint.files import File
from fastgrpo.trainer.checkpoint.weights import Keep


class Staging:
    """Host memory for one copy; the next one uses it again, because new memory costs more time than the copy.

    Beside a GPU the memory is page-locked, and all copies run at once.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def collect(self, files: Callable[[Keep], Iterable[File]]) -> list[File]:
        """Files whose tensors are copies. They hold until the next call."""
        kept: dict[str, Tensor] = {}

        def keep(name: str, tensor: Tensor) -> Tensor:
            kept[name] = self._buffer(name, tensor).copy_(tensor.detach(), non_blocking=True)
            return kept[name]

        found = list(files(keep))
        self._buffers = kept
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return found

    def _buffer(self, name: str, tensor: Tensor) -> Tensor:
        had = self._buffers.get(name)
        if had is not None and (had.shape, had.dtype) == (tensor.shape, tensor.dtype):
            return had
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
